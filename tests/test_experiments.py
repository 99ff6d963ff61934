"""Experiments: variants against closed forms, runs against plain train.py, stop and resume, losses by position."""

import statistics

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import model
from kqv import checkpoint
from kqv.build import restore_model
from kqv.data import open_dataset
from kqv.errors import UserError
from kqv.experiments import WHATIF, Experiment, context, lengthened, losses_by_position, whatif
from kqv.plots import draw_context, draw_whatif
from kqv.rundir import read_run
from kqv.variants import VARIANTS, Variant, in_place
from tests.conftest import TINY
from train import main

BY_NAME = {variant.name: variant for variant in VARIANTS}
B, H, T, D = 2, 3, 5, 4


@pytest.fixture
def settings(data_dir):
    return [f"--data_dir={data_dir}", *TINY, "--max_iters=8", "--eval_interval=8"]


# -- variants ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def qkv():
    return torch.randn(3, B, H, T, D, generator=torch.Generator().manual_seed(0))


def attend(name, qkv):
    with in_place(model, BY_NAME[name]):
        return model.ATTENTIONS["explicit"](*qkv, nn.Dropout(0.0))


CAUSAL = torch.ones(T, T).tril().bool()
SCORES = {
    "squares": (lambda q, k: torch.einsum("bhtd,bhtd,bhsd,bhsd->bhts", q, q, k, k) / D**0.5, CAUSAL),
    "unscaled": (lambda q, k: torch.einsum("bhtd,bhsd->bhts", q, k), CAUSAL),
    "other-triangle": (lambda q, k: torch.einsum("bhtd,bhsd->bhts", q, k) / D**0.5, CAUSAL.T),
    "no-mask": (lambda q, k: torch.einsum("bhtd,bhsd->bhts", q, k) / D**0.5, torch.ones(T, T).bool()),
    "dot": (lambda q, k: torch.einsum("bhtd,bhsd->bhts", q, k) / D**0.5, CAUSAL),
}


@pytest.mark.parametrize("name", SCORES)
def test_attention_of_a_variant_is_its_formula(name, qkv):
    scores, mask = SCORES[name]
    weights = torch.where(mask, scores(qkv[0], qkv[1]), -torch.inf).softmax(-1)
    torch.testing.assert_close(attend(name, qkv), weights @ qkv[2])


@pytest.mark.parametrize(
    "name, seen", [("dot", [0, 1, 2]), ("other-triangle", [2, 3, 4]), ("no-mask", [0, 1, 2, 3, 4])]
)
def test_token_2_reads_the_tokens_that_its_variant_shows_it(name, seen, qkv):
    values = torch.eye(T).expand(B, H, T, T)  # so that the output is the weights
    weights = attend(name, (qkv[0], qkv[1], values))
    assert [s for s in range(T) if (weights[:, :, 2, s] > 0).all()] == seen
    assert (weights > 0).sum() == B * H * {"dot": 15, "other-triangle": 15, "no-mask": 25}[name]


def block_and_input():
    torch.manual_seed(0)
    block = model.Block(model.GPTConfig(n_embd=8, n_head=2, block_size=T, bias=False))
    return block, torch.randn(B, T, 8)


def test_no_residual_and_post_norm_are_their_formulas():
    block, x = block_and_input()
    with in_place(model, BY_NAME["no-residual"]):
        torch.testing.assert_close(block(x, None, None), block.mlp(block.ln_2(block.attn(block.ln_1(x), None, None))))
    with in_place(model, BY_NAME["post-norm"]):
        inner = block.ln_1(x + block.attn(x, None, None))
        torch.testing.assert_close(block(x, None, None), block.ln_2(inner + block.mlp(inner)))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_the_model_is_restored_also_after_an_error(variant):
    attentions, forward = dict(model.ATTENTIONS), model.Block.forward
    with pytest.raises(ZeroDivisionError), in_place(model, variant):
        raise ZeroDivisionError
    assert attentions == model.ATTENTIONS and forward is model.Block.forward


def test_every_variant_has_a_title_and_two_sentences():
    assert all(variant.title and variant.outcome.count(". ") >= 1 for variant in VARIANTS)
    assert "dot" in BY_NAME and len(BY_NAME) == len(VARIANTS) == 11


# -- what if -----------------------------------------------------------------------------------------------------------


def test_dot_is_plain_train_py_and_a_rerun_gives_the_same_numbers(settings, tmp_path, command):
    lines = []
    results = whatif(model, main, settings, tmp_path / "a", only=("no-mask", "dot"), seeds=2, say=lines.append)
    assert [result["variant"] for result in results] == ["dot", "no-mask"]
    plain = []
    for seed in (1337, 1338):
        folder = tmp_path / f"plain-{seed}"
        assert command("train.py", *WHATIF, *settings, f"--seed={seed}", f"--out_dir={folder}").code == 0
        plain.append(read_run(folder).having("val_loss")[-1]["val_loss"])
    assert results[0]["losses"] == plain
    assert results[0]["mean"] == statistics.mean(plain) and results[0]["spread"] == statistics.stdev(plain)
    assert results[1]["losses"] != plain
    assert "2 of 4" in lines[1] and "minutes left" in lines[1] and "step 8: train loss" not in "".join(lines)
    assert "step 8: train loss" in (tmp_path / "a" / "log.txt").read_text()

    again = whatif(model, main, settings, tmp_path / "b", only=("no-mask",), seeds=1, say=lines.append)
    assert again[0]["losses"] == results[1]["losses"][:1] and again[0]["samples"] == results[1]["samples"]
    assert again[0]["spread"] is None

    kept = (tmp_path / "a" / "log.txt").read_text()
    assert whatif(model, main, settings, tmp_path / "a", only=("dot", "no-mask"), seeds=2, say=lines.append) == results
    assert (tmp_path / "a" / "log.txt").read_text() == kept and lines[-1] == "4 of 4 runs are finished already"
    for drawn in (results, again):
        assert draw_whatif(drawn).startswith(b"\x89PNG")

    with pytest.raises(UserError, match=r"n_embd=32: .* was trained with 16"):
        whatif(model, main, [*settings, "--n_embd=32"], tmp_path / "a", only=("dot",), say=lines.append)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_trains_and_generates(variant, settings, tmp_path):
    settings = [*settings, "--max_iters=2", "--n_layer=1", "--eval_iters=1"]
    (result,) = whatif(model, main, settings, tmp_path, only=(variant.name,), seeds=1, say=lambda line: None)
    assert result["losses"][0] > 0 and len(result["samples"][1337]) == 216


def test_a_stopped_experiment_continues_where_it_was(settings, tmp_path):
    def stopped_at_5(cfg, origin, stop):
        answers = iter([False] * 5)
        stop.requested = lambda processes: next(answers, True)
        return main(cfg, origin, stop)

    lines, chosen = [], {"only": ("no-residual",), "seeds": 1}
    with pytest.raises(SystemExit) as ended:
        whatif(model, stopped_at_5, settings, tmp_path / "stopped", **chosen, say=lines.append)
    assert ended.value.code == 75 and "continues" in lines[-1]
    assert checkpoint.load(tmp_path / "stopped" / "no-residual-1337" / "ckpt.pt")["iter_num"] == 5
    results = [
        whatif(model, main, settings, tmp_path / name, **chosen, say=lines.append) for name in ("stopped", "whole")
    ]
    assert results[0] == results[1]


def test_an_unknown_variant_is_one_line_that_lists_them(settings, tmp_path):
    with pytest.raises(UserError, match=r"only='no-brain': expected dot \| squares .* no-warmup"):
        whatif(model, main, settings, tmp_path / "new", only=("dot", "no-brain"))
    assert not (tmp_path / "new").exists()


# -- context -----------------------------------------------------------------------------------------------------------


def test_context_measures_each_position_up_to_4_times_the_block_size(settings, tmp_path):
    result = context(model, main, settings, tmp_path, say=lambda line: None)
    assert result["block_size"] == 16 and result["positions"] == list(range(1, 65))
    assert set(result["losses"]) == set(result["explanations"]) == {"learned", "sinusoidal", "rope", "none"}
    assert all(text.count(". ") >= 1 for text in result["explanations"].values())
    assert all(len(losses) == 64 for losses in result["losses"].values())
    assert draw_context(result).startswith(b"\x89PNG")

    for position in result["losses"]:
        run = Experiment.of(Variant(position, ""), [*settings, f"--position={position}"], tmp_path / position)
        saved = checkpoint.load(tmp_path / position / "ckpt.pt")
        longer = lengthened(model, run, 64)
        if position == "sinusoidal":
            assert torch.equal(longer.transformer.wpe.weight, model.sinusoidal_table(64, 16))
        if position == "learned":
            rows = longer.transformer.wpe.weight
            assert torch.equal(rows[:16], saved["model"]["transformer.wpe.weight"])
            assert 0.015 < rows[16:].std() < 0.025  # as initialised

        # within block_size the losses are those of the trained model itself
        trained = restore_model(saved, tmp_path, model.GPT, model.GPTConfig).eval()
        val = open_dataset(run.cfg.data_dir, "tiny", 64, 1).splits["val"]
        batches = [(x, y) for _, x, y in val.eval_batches(val.eval_windows(200))]
        x, y = (torch.cat(parts)[: len(val.eval_windows(200)), :16] for parts in zip(*batches, strict=True))
        with torch.no_grad():
            losses = F.cross_entropy(trained(x, y)[0].transpose(1, 2), y, reduction="none", ignore_index=-1)
        expected = losses.sum(0) / (y >= 0).sum(0)
        torch.testing.assert_close(torch.tensor(losses_by_position(model, run)[:16]), expected)
