"""Lesson 5 against torch.nn.Transformer, cross_entropy, brute force and closed forms."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model import sinusoidal_table
from tests.lessons import load

lesson = load("5_transformer")
SIZES = {"vocab_size": 20, "d_model": 16, "N": 2, "h": 4, "d_ff": 24, "P_drop": 0.0}


def make(**sizes: int):
    torch.manual_seed(0)
    model = lesson.Transformer(**SIZES | sizes).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def copy_attention(ours, theirs: nn.MultiheadAttention) -> None:
    parts = (ours.W_q, ours.W_k, ours.W_v)
    theirs.in_proj_weight.data = torch.cat([part.weight for part in parts])
    theirs.in_proj_bias.data = torch.cat([part.bias for part in parts])
    theirs.out_proj.load_state_dict(ours.W_o.state_dict())


def as_torchs(model) -> nn.Transformer:
    """torch's own with the same weights; it has a norm after each stack, which the paper does not."""
    theirs = nn.Transformer(16, 4, 2, 2, 24, dropout=0.0, batch_first=True, norm_first=False)
    theirs.encoder.norm = theirs.decoder.norm = None
    for ours, layer in zip(
        [*model.encoder, *model.decoder], [*theirs.encoder.layers, *theirs.decoder.layers], strict=True
    ):
        copy_attention(ours.attention, layer.self_attn)
        names = {"norm1": ours.norm_1, "norm2": ours.norm_3}
        if ours.cross_attention is not None:
            copy_attention(ours.cross_attention, layer.multihead_attn)
            names = {"norm1": ours.norm_1, "norm2": ours.norm_2, "norm3": ours.norm_3}
        for name, norm in names.items():
            getattr(layer, name).load_state_dict(norm.state_dict())
        layer.linear1.load_state_dict(ours.feed_forward[0].state_dict())
        layer.linear2.load_state_dict(ours.feed_forward[2].state_dict())
    return theirs.eval()


def test_it_is_torchs_transformer():
    model = make()
    theirs = as_torchs(model)
    source = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, lesson.PAD, lesson.PAD]])
    target = torch.tensor([[1, 11, 12, 13], [1, 14, 15, 16]])
    padding = source == lesson.PAD
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    x, y = model.embed(source), model.embed(target)
    expected = theirs(x, y, tgt_mask=mask, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    torch.testing.assert_close(model(source, target), expected @ model.embedding.weight.T, rtol=1e-5, atol=1e-5)


def test_padding_of_the_source_and_later_tokens_of_the_target_change_nothing():
    model = make()
    source, target = torch.tensor([[3, 4, 5]]), torch.tensor([[1, 6, 7, 8]])
    logits = model(source, target)
    longer = torch.tensor([[3, 4, 5, lesson.PAD, lesson.PAD]])
    torch.testing.assert_close(model(longer, target), logits)
    other = torch.tensor([[1, 6, 9, 10]])
    torch.testing.assert_close(model(source, other)[:, :2], logits[:, :2])


def test_a_token_enters_as_its_vector_times_the_root_of_d_model_plus_its_position():
    model, ids = lesson.Transformer(5000, 64, 1, 4, 8, 0.0), torch.tensor([[3, 4, 3], [7, 7, 7]])
    expected = F.embedding(ids, 8 * model.embedding.weight) + sinusoidal_table(3, 64)
    torch.testing.assert_close(model.embed(ids), expected, rtol=1e-4, atol=1e-5)
    assert model.embedding.weight.std().item() == pytest.approx(1 / 8, rel=0.01)


def test_dropout_works_while_it_learns_and_only_then():
    model = make(P_drop=0.5)
    source, target = torch.tensor([[3, 4, 5]]), torch.tensor([[1, 6, 7]])
    torch.testing.assert_close(model(source, target), make()(source, target))
    model.train()
    assert not torch.allclose(model(source, target), model(source, target), atol=1e-2)


def test_positions_are_those_of_the_paper():
    torch.testing.assert_close(lesson.positions(50, 16), sinusoidal_table(50, 16), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_torchs(smoothing):
    logits = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(0))
    target = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(1))
    expected = F.cross_entropy(
        logits.flatten(0, 1), target.flatten(), ignore_index=lesson.PAD, label_smoothing=smoothing
    )
    torch.testing.assert_close(lesson.smoothed_loss(logits, target, smoothing), expected)


def test_the_rate_rises_to_its_peak_at_warmup_and_falls_as_a_root():
    rates = [lesson.noam_rate(step, 512, 4000) for step in (1, 4000, 16000)]
    assert rates == pytest.approx([512**-0.5 * 4000**-1.5, (512 * 4000) ** -0.5, (512 * 16000) ** -0.5])
    scheduler_rates = [lesson.noam_rate(step, 64, 10) for step in range(1, 40)]
    assert max(scheduler_rates) == scheduler_rates[9]


def test_training_is_adam_on_the_smoothed_loss_at_the_rates_of_the_schedule():
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 20, (30, 2, 4), generator=draw)
    pairs = [(torch.tensor([*s, lesson.END]), torch.tensor([lesson.START, *t[:n], lesson.END]))
             for n, (s, t) in zip([1, 2, 3] * 10, ids.tolist(), strict=True)]  # fmt: skip
    ours, theirs = make().double(), make().double()  # in float32, W_k.bias, whose gradient is 0, would follow rounding
    torch.manual_seed(3)
    lesson.train(ours, pairs, batch_size=4, steps=6, warmup=3, smoothing=0.1)
    torch.manual_seed(3)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: lesson.noam_rate(i + 1, 16, 3))
    for _ in range(6):
        batch = [pairs[i] for i in torch.randint(30, (4,))]
        source = torch.stack([s for s, _ in batch])
        longest = max(len(t) for _, t in batch)
        target = torch.stack([F.pad(t, (0, longest - len(t)), value=lesson.PAD) for _, t in batch])
        logits = theirs(source, target[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, target[:, 1:].flatten(), ignore_index=lesson.PAD, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    for p, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-8)


def by_brute_force(model, source: list[int], longest: int, alpha: float) -> list[int]:
    """The best of all translations of at most `longest` tokens."""
    best, best_score, vocabulary = [], -math.inf, model.embedding.num_embeddings
    for length in range(longest):
        for words in itertools.product(range(vocabulary), repeat=length):
            if lesson.END in words:
                continue
            target = torch.tensor([[lesson.START, *words, lesson.END]])
            log_p = model(torch.tensor([source]), target[:, :-1]).log_softmax(dim=-1)
            total = log_p.gather(-1, target[:, 1:, None]).sum().item()
            score = total / ((5 + length + 1) / 6) ** alpha
            if score > best_score:
                best, best_score = list(words), score
    return best


@pytest.mark.parametrize("seed", range(4))
def test_a_beam_of_all_beginnings_finds_the_best_translation(seed):
    torch.manual_seed(seed)
    model = lesson.Transformer(**SIZES | {"vocab_size": 6}).eval()
    for parameter in model.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    with torch.no_grad():
        expected = by_brute_force(model, [3, 4], 4, 0.6)
        assert lesson.translate(model, [3, 4], beam=6**4, alpha=0.6, longest=4) == expected


def test_a_beam_of_one_takes_the_likeliest_token_each_time():
    model = make()
    source, target = torch.tensor([[3, 4, 5]]), [lesson.START]
    with torch.no_grad():
        while len(target) < 20 and (token := int(model(source, torch.tensor([target]))[0, -1].argmax())) != lesson.END:
            target.append(token)
    assert lesson.translate(model, [3, 4, 5], beam=1, longest=19) == target[1:]


def test_number_words_are_split_into_their_parts_and_joined_again():
    english, german = lesson.numbers(300, torch.Generator().manual_seed(0))
    assert len(set(english)) == 300 and "four hundred and twenty-one" not in english
    assert lesson.number_tokens("vierhunderteinundzwanzig") == ["vier", "hundert", "ein", "und", "zwanzig"]
    assert lesson.number_tokens("four hundred and twenty-one") == ["four", "hundred", "and", "twenty", "-", "one"]
    assert all("".join(lesson.number_tokens(text)) == text for text in german)
    assert len({token for text in english + german for token in lesson.number_tokens(text)}) < 70


TINY = ["--d_model=16", "--N=1", "--h=2", "--d_ff=16", "--steps=3", "--beam=1"]


def test_numbers_are_learnt_translated_and_drawn(tmp_path, capsys):
    picture = tmp_path / "map.png"
    percent = lesson.main([*TINY, "--held_out=3", f"--picture={picture}"])
    assert f"{percent:.1f}% of 3 held-out" in capsys.readouterr().out and picture.stat().st_size > 5000


def test_files_are_learnt_with_byte_pairs(tmp_path, capsys):
    files = []
    for name, text in zip(("source", "target"), lesson.numbers(60, torch.Generator().manual_seed(0)), strict=True):
        (tmp_path / name).write_text("\n".join(text), encoding="utf-8")
        files.append(f"--{name}={tmp_path / name}")
    lesson.main([*TINY, *files, "--held_out=4", "--vocab_size=80"])
    assert "BLEU" in capsys.readouterr().out
    wrong = {"are needed together": files[:1], "more than --held_out": [*files, "--held_out=60"]}
    wrong |= {"nowhere": ["--source=nowhere", "--target=nowhere"], "multiple of 2 h": ["--h=5"]}
    wrong |= {"a .png file": ["--picture=map.doc"], "that exists": [f"--picture={tmp_path}/none/map.png"]}
    for message, options in wrong.items():
        with pytest.raises(SystemExit) as stop:
            lesson.main(options)
        assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_the_figure_of_the_head():
    """Fewer steps than by default, and nearly as good."""
    assert lesson.main(["--steps=500", "--warmup=250", "--beam=1"]) >= 90
