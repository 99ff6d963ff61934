# make demo: from nothing to a trained GPT and its samples.  make test: lint and the fast tests.  make slow: the rest.
PYTHON ?= python3
BIN := .venv/bin
# as many tests at once as there are cores; threads that wait must sleep then. Two for each test: what depends on the
# order in which threads add shows with two
PYTEST := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist=worksteal
CONFIG := configs/train_python_stdlib.py

.PHONY: demo test slow gpu

demo: out-python-stdlib/done
	$(BIN)/python sample.py --out_dir=out-python-stdlib --num_samples=2 --max_new_tokens=400 --start="def "

# what a second call finds done, it does not do again
out-python-stdlib/done: data/python_stdlib/meta.json
	$(BIN)/python train.py $(CONFIG)
	touch $@

data/python_stdlib/meta.json: | .venv/run
	$(BIN)/python prepare/python_stdlib.py

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST)

slow: .venv/test
	$(PYTEST) -m slow

# on a machine with a GPU, beside a checkout of nanoGPT: make gpu PEER=../nanoGPT, and BENCH=--input=FILE where tiny
# Shakespeare cannot be downloaded. Some minutes: each side runs once. The table comes also where a test fails
gpu: .venv/test
	$(if $(PEER),,$(error which checkout of nanoGPT? make gpu PEER=../nanoGPT))
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("error: make gpu needs a CUDA device")'
	$(BIN)/python -m pytest -m gpu; tests=$$?; \
	$(BIN)/python bench.py train generate loss prepare --size=gpt2 --device=cuda --dtype=bfloat16 --repeats=1 \
		--peer=$(PEER) --peer=hf --flags=--compile=True --config=configs/fast_shakespeare_char.py --megabytes=10 $(BENCH) \
		&& exit $$tests

# the environment: torch and what training needs, then what the tests need; again when pyproject.toml changes
.venv/run: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "kqv needs Python 3.10 or later, this is " + sys.version'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e .
	touch $@

.venv/test: .venv/run
	$(BIN)/pip install --quiet -e '.[gpt2,hub,code,lessons,wandb,test]'
	touch $@
