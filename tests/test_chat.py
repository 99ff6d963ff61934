"""Responses that are learned and prompts that are not; documents that do not see each other."""

import json
import random
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from kqv.data import Split, open_dataset
from kqv.loss import NextTokenLoss
from kqv.meta import read_meta
from kqv.tokenizer import from_description
from model import GPT, GPTConfig
from tests.test_hub import save, tokenizer_json  # noqa: F401  a fixture

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = ["what are keys", "what are queries", "who looks back", "what was the token", "which values"]
SMALL = {"block_size": 32, "vocab_size": 257, "n_layer": 2, "n_head": 4, "n_embd": 32}


@pytest.fixture
def rows(tmp_path) -> list[dict]:
    draw = random.Random(0)
    rows = [{"prompt": draw.choice(QUESTIONS) + f" {n}? ", "response": f"the keys {n}"} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return rows


@pytest.fixture
def chat_folder(tmp_path, tokenizer_json) -> Path:  # noqa: F811
    folder = tmp_path / "chat"
    save(folder, "Llama")
    shutil.copy(tokenizer_json, folder)
    config = {"eos_token": "<|endoftext|>", "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def stored(folder: Path) -> tuple[list[int], list[bool]]:
    """All ids of a data set, train and val, and whether each is learned."""
    meta = read_meta(folder)
    raw = np.concatenate([np.fromfile(folder / f"{split}.bin", dtype=meta["dtype"]) for split in ("train", "val")])
    bit = 2 ** (np.dtype(meta["dtype"]).itemsize * 8 - 1)
    return (raw & (bit - 1)).tolist(), ((raw & bit) == 0).tolist()


def test_only_responses_and_their_ends_are_learned(tmp_path, command, rows):
    made = command("prepare/chat.py", "--input=rows.jsonl", "--tokenizer=byte", "--data_dir=data")
    assert made.code in (0, None), made.err
    ids, learned = stored(tmp_path / "data" / "rows")
    marked = [("|" if index == 256 else chr(index), is_learned) for index, is_learned in zip(ids, learned, strict=True)]
    texts = ["".join(char for char, is_learned in marked if is_learned == kind) for kind in (False, True)]
    assert sorted(texts[1].split("|")[:-1]) == sorted(row["response"] for row in rows)
    assert len(texts[0]) == sum(len(row["prompt"]) for row in rows) and "|" not in texts[0]
    again = command("prepare/chat.py", "--input=rows.jsonl", "--tokenizer=byte", "--data_dir=data", "--name=again")
    assert again.code in (0, None)
    assert stored(tmp_path / "data" / "again") == (ids, learned)


def test_a_chat_template_writes_what_transformers_writes(tmp_path, command, chat_folder):
    roles = ("user", "assistant")
    messages = [
        [{"role": "system", "content": "be brief"}]
        + [{"role": role, "content": f"{role} {n} the keys"} for role in roles]
        + [{"role": role, "content": f"again {role}"} for role in roles]
        for n in range(9)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in messages))
    made = command(
        "prepare/chat.py", "--input=chats.jsonl", "--tokenizer=chat", "--data_dir=data", "--val_fraction=0.3"
    )
    assert made.code in (0, None), made.err
    ids, learned = stored(tmp_path / "data" / "chats")
    theirs = transformers.AutoTokenizer.from_pretrained(chat_folder)
    expected = [theirs.apply_chat_template(m, tokenize=True, return_dict=False) for m in messages]
    tokenizer = from_description(read_meta(tmp_path / "data" / "chats")["tokenizer"])
    assert sum(map(len, expected)) + len(messages) == len(ids)
    for one in expected:
        assert tokenizer.decode(one) in tokenizer.decode(ids)
    spoken = tokenizer.decode([index for index, is_learned in zip(ids, learned, strict=True) if is_learned])
    assert "user" not in spoken and "brief" not in spoken and "im_start" not in spoken
    assert spoken.count("assistant 3 the keys<|endoftext|>\n") == 1 and spoken.count("again assistant") == 9


def test_the_loss_is_that_of_the_responses_by_hand(tmp_path, command, rows):
    assert command("prepare/chat.py", "--input=rows.jsonl", "--tokenizer=byte", "--data_dir=data").code in (0, None)
    folder = tmp_path / "data" / "rows"
    split = Split(folder, "train", 32, read_meta(folder))
    x, y = split.batch(0, 0, 8)
    raw = np.fromfile(folder / "train.bin", dtype="<u2").tolist()
    assert (y == -1).any() and (y != -1).any()
    for row_x, row_y in zip(x.tolist(), y.tolist(), strict=True):
        at = next(i for i in range(len(raw)) if [n & 0x7FFF for n in raw[i : i + 32]] == row_x)
        assert row_y == [-1 if n >> 15 else n for n in raw[at + 1 : at + 33]]
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL))
    loss = NextTokenLoss(model)(x, y)
    logits = model(x, x)[0].log_softmax(dim=-1)
    by_hand = [-logits[b, t, y[b, t]] for b in range(8) for t in range(32) if y[b, t] != -1]
    torch.testing.assert_close(loss, sum(by_hand) / len(by_hand))
    # and the evaluation's windows: each learned target of the split once
    windows = split.eval_windows()
    assert sum(int((y != -1).sum()) for _, _, y in split.eval_batches(windows)) == sum(n < 2**15 for n in raw[1:])


@pytest.mark.parametrize("vocab_size", [257, 5000])  # logits as a whole, in chunks
def test_a_batch_of_prompts_only_has_loss_zero_and_no_gradient(vocab_size):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | {"vocab_size": vocab_size}))
    x = torch.randint(257, (2, 32))
    loss = NextTokenLoss(model)(x, torch.full_like(x, -1))
    loss.backward()
    assert loss == 0 and all(not p.grad.any() for p in model.parameters())


def test_a_run_on_responses_resumes_to_the_bit(tmp_path, command, rows, train):
    assert command("prepare/chat.py", "--input=rows.jsonl", "--tokenizer=byte", "--data_dir=data").code in (0, None)
    options = ("--data_dir=data", "--dataset=rows", "--eval_interval=4", "--decay_lr=False")
    assert train(*options, "--max_iters=8", "--out_dir=whole").code == 0
    assert train(*options, "--max_iters=4", "--out_dir=half").code == 0
    assert train(*options, "--max_iters=8", "--init_from=resume", "--out_dir=half").code == 0
    whole, half = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["model"] for name in ("whole", "half"))
    assert all(torch.equal(whole[name], half[name]) for name in whole)
    records = map(json.loads, (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines())
    assert not any("val_bpb" in record for record in records)  # bytes of all text, loss of some


@pytest.mark.parametrize("position", ["learned", "rope", "sinusoidal", "none"])
@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
def test_documents_in_a_window_are_as_if_run_apart(position, attention):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, position=position, attention=attention))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    end = 256
    documents = [torch.cat((torch.tensor([end]), torch.randint(256, (n,)))) for n in (9, 1, 13)]
    idx = torch.cat((torch.randint(256, (6,)), *documents, torch.tensor([end])))[None]  # (1, 33)
    x, y = idx[:, :-1], idx[:, 1:]
    first = x[:, :6]  # what is left of an earlier document
    starts = [0, 6, 16, 18, 32]
    apart = []
    for start, stop in pairwise(starts):
        logits = model(x[:, start:stop], y[:, start:stop])[0]
        apart.append(F.cross_entropy(logits[0], y[0, start:stop], reduction="sum"))
    loss = NextTokenLoss(model, end_of_text=end)(x, y)
    torch.testing.assert_close(loss, sum(apart) / 32)
    assert (loss - NextTokenLoss(model)(x, y)).abs() > 1e-3 and first.size(1) == 6


def test_document_mask_trains_and_resumes_to_the_bit(tmp_path, command, rows, train):
    assert command("prepare/chat.py", "--input=rows.jsonl", "--tokenizer=byte", "--data_dir=data").code in (0, None)
    options = ("--data_dir=data", "--dataset=rows", "--document_mask", "--eval_interval=4", "--decay_lr=False")
    assert train(*options, "--max_iters=8", "--out_dir=whole").code == 0
    assert train(*options, "--max_iters=4", "--out_dir=half").code == 0
    assert train(*options, "--max_iters=8", "--init_from=resume", "--out_dir=half").code == 0
    whole, half = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["model"] for name in ("whole", "half"))
    assert all(torch.equal(whole[name], half[name]) for name in whole)
    without = train("--max_iters=1", "--document_mask")
    assert without.code == 2 and "has no end of text between documents" in without.err


@pytest.mark.parametrize(
    "row, message",
    [
        ("[1]", 'line 1: neither "prompt" and "response" nor "messages"'),
        ('{"prompt": "a"}', "line 1: neither"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 1: neither"),
        ("{", "line 1: Expecting property name"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "need a tokenizer with a chat template"),
    ],
    ids=str,
)
def test_wrong_rows_are_named(tmp_path, command, row, message):
    (tmp_path / "rows.jsonl").write_text(row)
    result = command("prepare/chat.py", "--input=rows.jsonl", "--tokenizer=byte", "--data_dir=data")
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "data").exists() or not any((tmp_path / "data").iterdir())


def test_a_finetuned_chat_model_is_asked_through_its_template(tmp_path, command, chat_folder, rows, train):
    made = command("prepare/chat.py", "--input=rows.jsonl", "--tokenizer=chat", "--data_dir=data")
    assert made.code in (0, None), made.err
    run = train(
        "--data_dir=data", "--dataset=rows", "--init_from=chat", "--max_iters=3", "--lora_rank=2", "--out_dir=out"
    )
    assert run.code == 0, run.err
    assert command("export.py", "out", "model").code in (0, None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "what are keys?"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    before = transformers.AutoTokenizer.from_pretrained(chat_folder)
    assert ids == before.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert open_dataset("data", "rows", 16, 1).end_of_text() == theirs.eos_token_id
