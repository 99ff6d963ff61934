"""Exported folders in the engines that people use: the server of transformers with openai's client, and lm_eval."""

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from tests.test_chat import chat_folder  # noqa: F401  a fixture
from tests.test_hub import tokenizer_json  # noqa: F401  a fixture

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@contextmanager
def served(folder: Path) -> Iterator[openai.OpenAI]:
    """The real server on loopback with one model, whose name there is "./" and that of its folder; a client of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", f"./{folder.name}", "--host=127.0.0.1"]
    with (folder.parent / "serve.log").open("w") as log:
        options = {"cwd": folder.parent, "stdout": log, "stderr": log, "env": os.environ | OFFLINE}
        server = subprocess.Popen([*command, f"--port={port}"], **options)
    try:
        for _ in range(240):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, (folder.parent / "serve.log").read_text()
            time.sleep(0.5)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    finally:
        server.terminate()
        server.wait(timeout=30)


def bytes_data(tmp_path: Path, command) -> None:
    text = "the keys look back at what the queries was, and the values of the token.\n"
    (tmp_path / "text.txt").write_text(text * 100)
    made = command("prepare/text.py", "--input=text.txt", "--tokenizer=byte", "--data_dir=data")
    assert made.code in (0, None), made.err


@pytest.mark.slow
@pytest.mark.parametrize("switches", [(), ("--position=rope", "--norm=rmsnorm", "--mlp=swiglu")], ids=["gpt2", "llama"])
def test_a_served_model_writes_what_sample_writes(tmp_path, command, train, switches):
    bytes_data(tmp_path, command)
    run = train("--data_dir=data", "--dataset=text", "--block_size=64", "--max_iters=60", "--out_dir=out", *switches)
    assert run.code == 0, run.err
    assert command("export.py", "out", "model").code in (0, None)
    sample = ("--start=the keys", "--temperature=0", "--num_samples=1", "--max_new_tokens=40")
    ours = command("sample.py", "--out_dir=out", *sample).out.removeprefix("the keys").removesuffix("\n")
    with served(tmp_path / "model") as client:
        ask = {"model": "./model", "prompt": "the keys", "max_tokens": 40, "temperature": 0}
        assert client.completions.create(**ask).choices[0].text == ours
        stream = client.completions.create(**ask, stream=True)
        assert "".join(part.choices[0].text for part in stream if part.choices) == ours


@pytest.mark.slow
def test_a_finetuned_chat_model_is_served(tmp_path, command, train, chat_folder):  # noqa: F811
    rows = [{"prompt": f"what are the keys of {n}?", "response": "the keys are keys again"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert command("prepare/chat.py", "--input=rows.jsonl", "--tokenizer=chat", "--data_dir=data").code in (0, None)
    options = ("--data_dir=data", "--dataset=rows", "--init_from=chat", "--block_size=64", "--out_dir=out")
    run = train(*options, "--max_iters=60", "--learning_rate=1e-2")
    assert run.code == 0, run.err
    assert command("export.py", "out", "model").code in (0, None)
    with served(tmp_path / "model") as client:
        messages = [{"role": "user", "content": "what are the keys of 100?"}]
        answer = client.chat.completions.create(model="./model", messages=messages, max_tokens=40, temperature=0)
    assert answer.choices[0].message.content == "the keys are keys again"


TASK = """task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{continuation}}}}"
target_delimiter: ""
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
"""


@pytest.mark.slow
def test_lm_eval_scores_what_explain_scores(tmp_path, command, train):
    bytes_data(tmp_path, command)
    run = train("--data_dir=data", "--dataset=text", "--block_size=64", "--max_iters=60", "--out_dir=out")
    assert run.code == 0, run.err
    assert command("export.py", "out", "model").code in (0, None)
    (tmp_path / "tasks").mkdir()
    rows = [{"context": "the keys", "continuation": " of the token"}, {"context": "what", "continuation": " was"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    evaluate = [Path(sys.executable).parent / "lm_eval", "--model", "hf", "--model_args", "pretrained=./model"]
    evaluate += ["--tasks", "local", "--include_path", "tasks", "--device", "cpu", "--log_samples"]
    environment = os.environ | OFFLINE | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 250}
    done = subprocess.run([*evaluate, "--output_path", "results"], **options)
    assert done.returncode == 0, done.stderr[-2000:]
    [path] = (tmp_path / "results").rglob("samples_*.jsonl")
    scored = {sample["doc"]["context"]: float(sample["resps"][0][0][0]) for sample in map(json.loads, path.open())}
    for row in rows:
        text = row["context"] + row["continuation"]
        shown = command("explain.py", "loss", "--out_dir=out", f"--text={text}", "--json=numbers.json")
        assert shown.code in (0, None), shown.err
        losses = json.loads((tmp_path / "numbers.json").read_text())["losses"]
        assert math.isclose(scored[row["context"]], -sum(losses[len(row["context"]) :]), rel_tol=1e-4)
