# make demo: from nothing to a trained GPT and its samples.  make test: lint and the fast tests.  make slow: the rest.
PYTHON ?= python3
BIN := .venv/bin
# as many tests at once as there are cores; threads that wait must sleep then. Two for each test: what depends on the
# order in which threads add shows with two
PYTEST := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist=worksteal
CONFIG := configs/train_python_stdlib.py

GPU_ENVIRONMENT := $(if $(filter .venv/bin,$(BIN)),.venv/test)
HAS_GPU = $(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("error: this needs a CUDA device")'

.PHONY: demo test slow gpu gpu-test gpu-bench

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

# on a machine with a GPU; each of the two ends in under four minutes. The second is beside a checkout of nanoGPT: make
# gpu-bench PEER=../nanoGPT, and BENCH="--input=FILE" where tiny Shakespeare cannot be downloaded. With BIN=FOLDER they
# use the Python there, and install nothing
gpu: gpu-test gpu-bench

gpu-test: $(GPU_ENVIRONMENT)
	@$(HAS_GPU)
	timeout 235 $(BIN)/python -m pytest -m gpu -n 8 --dist=worksteal

gpu-bench: $(GPU_ENVIRONMENT)
	$(if $(PEER),,$(error which checkout of nanoGPT? make gpu-bench PEER=../nanoGPT))
	@$(HAS_GPU)
	timeout 235 $(BIN)/python bench.py gpu --size=gpt2 --peer=$(PEER) --peer=hf --json=gpu.json $(BENCH)

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
