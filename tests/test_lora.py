"""Adapters against the package peft: the same logits, gradients and losses; what is trained, saved and merged."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers

from kqv.build import restore_model
from kqv.data import Split
from kqv.hub import FAMILIES, layer_names
from kqv.lora import LoRALinear, add_lora, merged_weights, peft_adapter, weights_to_save
from kqv.meta import read_meta
from model import GPT, GPTConfig
from tests.test_hub import save, tokenizer_json  # noqa: F401  a fixture
from tests.test_model import tokens

THEIR_TARGETS = {
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def save_gpt2(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_positions": 64, "n_layer": 2, "n_head": 4, "n_embd": 32}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**sizes, **dropouts, initializer_range=0.2, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def pretrained(folder: Path, family: str) -> GPT:
    save_gpt2(folder) if family == "gpt2" else save(folder, "Llama")
    return GPT.from_pretrained(str(folder))


def adapted(folder: Path, family: str, seed: int = 1) -> GPT:
    """A model with random adapters."""
    model = pretrained(folder, family)
    torch.manual_seed(seed)
    add_lora(model, {"name": str(folder), "sha256": ""}, rank=4, alpha=8.0)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B, std=0.2)
    return model.eval()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_only_the_adapters_are_trained_and_merging_changes_no_logit(tmp_path, family):
    plain, model, idx = pretrained(tmp_path, family), adapted(tmp_path, family), tokens(2, 16, vocab_size=300)
    assert all((".lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())
    assert all(".lora_" in name for name in weights_to_save(model)["model"])
    logits = model(idx, idx)[0]
    assert (logits - plain(idx, idx)[0]).abs().max() > 0.1
    plain.load_state_dict(merged_weights(model))
    torch.testing.assert_close(plain(idx, idx)[0], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_training_step_is_that_of_peft(tmp_path, family):
    """The same adapters give the same logits, and the same gradients of the loss."""
    ours, idx = adapted(tmp_path, family), tokens(2, 16, vocab_size=300)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=THEIR_TARGETS[family])).eval()
    family_table = FAMILIES[family]
    adapter = peft_adapter(ours, layer_names(family_table, ours.config), family_table.transposed)
    result = peft.set_peft_model_state_dict(theirs, adapter["weights"])
    assert not result.unexpected_keys
    loss = ours(idx[:, :-1], idx[:, 1:])[1]
    their_loss = theirs(idx, labels=idx).loss
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    their_loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for module in ours.modules():
        if isinstance(module, LoRALinear):
            module.lora_A.data, module.lora_B.data = module.lora_A.grad, module.lora_B.grad
    ours_as_theirs = peft_adapter(ours, layer_names(family_table, ours.config), family_table.transposed)["weights"]
    assert len(ours_as_theirs) == len(gradients)
    for name, gradient in ours_as_theirs.items():
        torch.testing.assert_close(
            gradient, gradients[name.replace(".weight", ".default.weight")], rtol=1e-4, atol=1e-6
        )


@pytest.fixture
def llama(tmp_path, tokenizer_json, command):  # noqa: F811
    """A tiny Llama with its tokenizer, in the folder "llama", and the data set "own" of its tokens."""
    save(tmp_path / "llama", "Llama")
    shutil.copy(tokenizer_json, tmp_path / "llama")
    (tmp_path / "text.txt").write_text("the keys and the values of the queries, then the keys again\n" * 200)
    made = command("prepare/text.py", "--input=text.txt", "--tokenizer=llama", "--name=own", "--data_dir=data")
    assert made.code in (0, None), made.err
    return tmp_path / "llama"


RUN = ("--dataset=own", "--data_dir=data", "--init_from=llama", "--learning_rate=1e-3", "--decay_lr=False")
LORA = ("--lora_rank=4", "--lora_alpha=8")


def losses(out_dir: Path) -> list[float]:
    records = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    return [record["train_loss"] for record in records if "train_loss" in record]


def test_a_run_saves_only_adapters_resumes_to_the_bit_and_is_exported(tmp_path, llama, train, command):
    assert train(*RUN, *LORA, "--out_dir=whole", "--max_iters=8", "--eval_interval=4").code == 0
    assert train(*RUN, *LORA, "--out_dir=half", "--max_iters=4", "--eval_interval=4").code == 0
    resumed = train(*RUN, *LORA, "--init_from=resume", "--out_dir=half", "--max_iters=8", "--eval_interval=4")
    assert resumed.code == 0, resumed.err
    whole, half = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("whole", "half"))
    assert all(".lora_" in name for name in whole["model"]) and len(whole["model"]) == 2 * 2 * 4
    assert whole["model"].keys() == half["model"].keys()
    assert all(torch.equal(whole["model"][name], half["model"][name]) for name in whole["model"])
    assert len(whole["optimizer"]["state"]) == len(whole["model"])

    sample = ("--start=the keys", "--temperature=0", "--num_samples=1", "--max_new_tokens=9")
    ours = command("sample.py", "--out_dir=whole", *sample)
    assert ours.code in (0, None), ours.err
    assert command("export.py", "whole", "merged").code in (0, None)
    exported = command("export.py", "whole", "adapter", "--adapter")
    assert exported.code in (0, None) and "adapters of rank 4" in exported.out, exported.err
    assert command("sample.py", "--init_from=merged", *sample).out == ours.out
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    idx = tokens(2, 16, vocab_size=300)
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, merged(idx).logits, rtol=1e-5, atol=1e-5)

    refused = command("sample.py", "--init_from=adapter")
    assert refused.code == 2 and "it holds an adapter; --init_from takes the model under it" in refused.err
    changed = save(tmp_path / "other", "Llama", rms_norm_eps=1e-3)
    changed.lm_head.weight.data += 1
    changed.save_pretrained(llama)
    refused = command("sample.py", "--out_dir=whole")
    assert refused.code == 2 and "adapters to other weights than those that are now in" in refused.err
    shutil.rmtree(llama)
    refused = command("export.py", "whole", "again")
    assert refused.code == 2 and "the model under them cannot be had" in refused.err


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_fifty_steps_are_those_of_transformers_trainer(tmp_path, llama, train, lora):
    """The same data, order and settings: each loss within 1%."""
    options = ("--out_dir=out", "--max_iters=50", "--eval_interval=50", "--batch_size=4", "--block_size=16")
    assert train(*RUN, *options, *(LORA if lora else ()), "--learning_rate=3e-3", "--weight_decay=0.1").code == 0
    ours = losses(tmp_path / "out")

    folder = tmp_path / "data" / "own"
    split = Split(folder, "train", 16, read_meta(folder))
    x, y = split.batch(1337, 0, 50 * 4)
    rows = [{"input_ids": row, "labels": row} for row in torch.cat((x, y[:, -1:]), dim=1)]

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    if lora:
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=THEIR_TARGETS["llama"]))
        start_alike(model, tmp_path / "out", train)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=50,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = InOrder(model, arguments, train_dataset=rows)
    trainer.train()
    theirs = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(ours) == len(theirs) == 50 and theirs[-1] < 0.8 * theirs[0]
    assert max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)) < 0.01


def start_alike(model, out_dir: Path, train) -> None:
    """Give peft's adapters the random start that ours had: that of a run without a step."""
    assert train(*RUN, *LORA, f"--out_dir={out_dir}-start", "--max_iters=0", "--block_size=16").code == 0
    saved = torch.load(Path(f"{out_dir}-start") / "ckpt.pt", weights_only=True)
    ours = restore_model(saved, out_dir, GPT, GPTConfig, dropout=0.0)
    adapter = peft_adapter(ours, layer_names(FAMILIES["llama"], ours.config), transposed=False)
    peft.set_peft_model_state_dict(model, adapter["weights"])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lora_rank=4", "--lora_targets=attn.q"], "lora_targets='attn.q': no layer has this name"),
        (["--freeze=wte"], "freeze='wte': matches no weight"),
        (["--freeze=*"], "no weight is left to train"),
        (["--lora_rank=4", "--init_from=scratch"], "lora_rank: adapts a model from Hugging Face"),
        (["--lora_rank=4", "--optimizer=muon"], "lora_rank: works with optimizer=adamw"),
    ],
    ids=str,
)
def test_wrong_settings_are_one_line(llama, train, options, message):
    result = train(*RUN, "--max_iters=1", *options)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1


def test_frozen_weights_stay_as_they_are(tmp_path, llama, train):
    assert train(*RUN, "--max_iters=3", "--freeze=transformer.wte.*", "--freeze=*.h.0.*", "--out_dir=out").code == 0
    before = GPT.from_pretrained(str(llama)).state_dict()
    after = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["model"]
    for name, weight in before.items():
        frozen = name.startswith(("transformer.wte.", "transformer.h.0."))
        assert torch.equal(weight, after[name]) == frozen, name
