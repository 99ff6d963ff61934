"""kqv/data.py: batches, evaluation windows, formats, damaged files."""

import hashlib
import json
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kqv.data import Split, find_dataset
from kqv.errors import UserError
from kqv.meta import read_meta

META = {"tokenizer": {"kind": "byte"}, "vocab_size": 70_000, "dtype": "uint16", "splits": {}}


@pytest.fixture
def counting(tmp_path):
    """Token i has the id i, so that ids show where a window was cut."""

    def make(n: int, block_size: int) -> Split:
        np.arange(n, dtype="<u2").tofile(tmp_path / "train.bin")
        return Split(tmp_path, "train", block_size, META)

    return make


def test_targets_are_the_next_tokens(counting):
    x, y = counting(1000, 16).batch(seed=1, first=0, batch_size=8)
    assert x.shape == y.shape == (8, 16)
    assert (y == x + 1).all() and (x.diff(dim=1) == 1).all()


@pytest.mark.parametrize("n, block_size", [(1000, 16), (17, 16), (33, 16), (100, 99), (50, 1)])
def test_an_epoch_has_each_window_once(counting, n, block_size):
    split = counting(n, block_size)
    windows = int(split.windows.sum())
    for epoch in range(3):
        x, y = split.batch(seed=1, first=epoch * windows, batch_size=windows)
        starts = sorted(x[:, 0].tolist())
        assert (np.diff(starts) == block_size).all()  # adjacent: none twice, none missing
        assert starts[0] < block_size and n - 1 - y.max() < block_size + (n % block_size or block_size)


def test_epochs_differ_in_order_and_cut_and_seeds_differ(counting):
    split = counting(1000, 16)
    windows = int(split.windows.sum())
    orders = [split.batch(seed, e * windows, windows)[0][:, 0].tolist() for seed in (1, 2) for e in range(3)]
    assert len({tuple(order) for order in orders}) == 6
    assert len({min(order) for order in orders}) > 1


@given(
    world_size=st.sampled_from([1, 2, 3, 6]),
    batch_size=st.integers(1, 7),
    step=st.integers(0, 50),
    seed=st.integers(0, 2**40),
)
def test_the_order_is_the_same_for_any_number_of_processes(tmp_path_factory, world_size, batch_size, step, seed):
    folder = tmp_path_factory.mktemp("order")
    np.arange(500, dtype="<u2").tofile(folder / "train.bin")
    accumulation = 6
    first = step * accumulation * batch_size
    expected = Split(folder, "train", 8, META).batch(seed, first, accumulation * batch_size)[0]
    seen = []
    for rank in range(world_size):  # each with its own reader, as in different processes
        split = Split(folder, "train", 8, META)
        for micro_step in range(accumulation // world_size):
            place = (step * accumulation + micro_step * world_size + rank) * batch_size
            seen.append((place, split.batch(seed, place, batch_size)[0]))
    assert np.concatenate([x for _, x in sorted(seen, key=lambda pair: pair[0])]).tolist() == expected.tolist()


@pytest.mark.parametrize("n, block_size", [(1000, 16), (1001, 16), (17, 16), (5000, 7)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluating_the_whole_split_predicts_every_token_once(counting, n, block_size, world_size):
    split = counting(n, block_size)
    windows = split.eval_windows()
    batches = [batch for rank in range(world_size) for batch in split.eval_batches(windows, rank, world_size)]
    assert sorted(number for number, _, _ in batches) == list(range(len(batches)))
    assert len({x.shape for _, x, _ in batches}) == 1
    targets = np.concatenate([y[y >= 0].numpy() for _, _, y in batches])
    assert sorted(targets.tolist()) == list(range(1, n))
    for _, x, y in batches:
        assert ((y == x + 1) | (y == -1)).all()


def test_fewer_windows_are_spread_evenly_and_fixed(counting):
    split = counting(10_000, 10)
    windows = split.eval_windows(limit=20)
    assert windows.tolist() == split.eval_windows(limit=20).tolist()
    assert len(windows) == 20 and set(np.diff(windows[:, 1])) == {500}
    assert len(split.eval_windows(limit=10**9)) == 1000


def test_batches_are_the_windows_that_the_epochs_name(tmp_path):
    """Window by window, over three shards and the ends of epochs."""
    for number, n in enumerate((100, 57, 230)):
        write_shard(tmp_path / f"train_{number}.bin", range(1000 * number, 1000 * number + n))
    split, T = Split(tmp_path, "train", 10, META), 10
    total, bounds = int(split.windows.sum()), np.append(0, split.windows.cumsum())
    for first, batch_size in ((0, total), (total - 3, 5), (5, 3 * total + 1), (2 * total, 1)):
        expected = []
        for place in range(first, first + batch_size):
            order, offsets = split.epoch(7, place // total)
            window = int(order[place % total])
            shard = int(np.searchsorted(bounds, window, side="right")) - 1
            start = int(offsets[shard]) + (window - int(bounds[shard])) * T
            expected.append(split.shards[shard][start : start + T + 1].tolist())
        x, y = split.batch(7, first, batch_size)
        assert np.column_stack([x, y[:, -1:]]).tolist() == expected
        assert (y[:, :-1] == x[:, 1:]).all()


def test_the_order_never_changes(counting):
    """The sequences are those of commit d943a9b, so that runs it started can be resumed."""
    x, _ = counting(100, 16).batch(seed=1337, first=3, batch_size=12)
    assert x[:, 0].tolist() == [24, 8, 51, 3, 35, 67, 19, 37, 69, 53, 21, 5]


# -- formats -----------------------------------------------------------------------------------------------------------


def write_shard(path, tokens, magic=20240520, version=1, stated=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if stated is None else stated
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def test_llm_c_shards_are_read_in_order_and_windows_do_not_cross_them(tmp_path):
    write_shard(tmp_path / "tiny_train_000001.bin", range(100))
    write_shard(tmp_path / "tiny_train_000002.bin", range(200, 250))
    write_shard(tmp_path / "tiny_val_000000.bin", range(300, 340))
    split = Split(tmp_path, "train", 10, META)
    assert split.tokens == 150
    x, _ = split.batch(0, 0, int(split.windows.sum()))
    assert (x.diff(dim=1) == 1).all() and x.max() >= 200
    targets = np.concatenate([y[y >= 0] for _, _, y in split.eval_batches(split.eval_windows())])
    assert sorted(targets.tolist()) == [*range(1, 100), *range(201, 250)]
    assert Split(tmp_path, "val", 10, META).tokens == 40


@pytest.mark.parametrize("wrong", [{"stated": 101}, {"version": 2}])
def test_damaged_shards(tmp_path, wrong):
    write_shard(tmp_path / "train.bin", range(100), **wrong)
    with pytest.raises(UserError, match=r"train.bin is damaged"):
        Split(tmp_path, "train", 10, META)


def test_uint32_ids(tmp_path):
    np.arange(65_000, 66_000, dtype="<u4").tofile(tmp_path / "train.bin")
    x, _ = Split(tmp_path, "train", 16, META | {"dtype": "uint32"}).batch(0, 0, 4)
    assert x.min() >= 65_000


def test_nanogpts_meta(tmp_path):
    assert read_meta(tmp_path)["tokenizer"] == {"kind": "gpt2"}  # no meta at all
    assert read_meta(tmp_path)["vocab_size"] == 50257
    meta = {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert read_meta(tmp_path)["tokenizer"]["chars"] == "ab"
    assert read_meta(tmp_path)["vocab_size"] == 2


# -- damaged data sets -----------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(data_dir, tmp_path):
    shutil.copytree(data_dir / "tiny", tmp_path / "tiny")
    return tmp_path / "tiny"


def edit_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps(meta | changes), encoding="utf-8")


def truncate_train(folder):
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-2000])


def odd_bytes(folder):
    (folder / "meta.json").unlink()
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-1])


def flip_a_byte(folder):
    data = bytearray((folder / "train.bin").read_bytes())
    data[1000] ^= 1
    (folder / "train.bin").write_bytes(data)


def foreign_ids(folder):
    data = np.fromfile(folder / "train.bin", dtype="<u2")
    data[5] = 999
    data.tofile(folder / "train.bin")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta["splits"]["train"]["sha256"] = hashlib.sha256(data.tobytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


@pytest.mark.parametrize(
    "damage, message",
    [
        (truncate_train, "train.bin is damaged: 35,"),
        (odd_bytes, "train.bin is damaged:"),
        (flip_a_byte, "train.bin is damaged: its SHA-256"),
        (foreign_ids, "train.bin has the id 999, beyond the vocabulary of"),
        (lambda f: (f / "train.bin").write_bytes(b""), "train.bin is damaged: 0 tokens"),
        (lambda f: (f / "train.bin").unlink(), "has no train.bin"),
        (lambda f: (f / "val.bin").unlink(), "has no val.bin"),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json is damaged"),
        (lambda f: (f / "meta.json").write_text("[]"), "meta.json is damaged"),
        (lambda f: (f / "meta.json").write_bytes(b"\xff\xfe"), "meta.json is damaged"),
        (lambda f: edit_meta(f, vocab_size=29), "meta.json is damaged: vocab_size 29 is not its tokenizer's"),
        (lambda f: edit_meta(f, vocab_size=28, tokenizer={"kind": "gpt2"}), "meta.json is damaged: vocab_size 28"),
        (lambda f: edit_meta(f, dtype="float64"), "meta.json is damaged"),
        (lambda f: edit_meta(f, vocab_size="65"), "meta.json is damaged"),
        (lambda f: edit_meta(f, splits={"train": 5}), "meta.json is damaged"),
        (lambda f: edit_meta(f, tokenizer={"kind": "none"}), "not the description of a tokenizer"),
    ],
)
def test_damaged_data_sets_are_named_and_nothing_is_written(train, damaged, tmp_path, damage, message):
    damage(damaged)
    result = train(f"--data_dir={tmp_path}", "--out_dir=o", "--max_iters=2")
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "o").exists()


def test_too_little_text_says_what_would_fit(train, tmp_path):
    result = train("--block_size=50000", "--out_dir=o", "--max_iters=2")
    assert result.code == 2
    assert "block_size=50000" in result.err and "the longest block_size that fits is" in result.err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "dataset, hint",
    [("shakespeare_char", "python prepare/shakespeare_char.py"), ("mine", "python prepare/text.py --name=mine")],
)
def test_a_missing_data_set_says_how_to_make_it(tmp_path, dataset, hint):
    with pytest.raises(UserError, match=f"dataset='{dataset}'.*{hint}"):
        find_dataset(str(tmp_path), dataset)
