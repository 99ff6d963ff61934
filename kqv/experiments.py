"""What if a transformer lacked one of its parts, and why longer contexts fail: experiments on baby GPTs.

Each experiment trains by train.main, in a folder of its own and with --init_from=auto: a stopped one continues where it
was, a finished one is not repeated. Callers pass the module model.py and the function train.main.
"""

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from kqv import checkpoint
from kqv.build import restore_model
from kqv.cli import parse
from kqv.data import open_dataset
from kqv.errors import UserError
from kqv.resume import NOT_RESTORED
from kqv.rundir import LAST, read_run
from kqv.settings import TrainConfig
from kqv.signals import StopRequests
from kqv.tables import Table
from kqv.tokenizer import from_description
from kqv.variants import VARIANTS, Variant, in_place

# A model that 2 CPU cores train in seconds, at a learning rate that is too high without warm-up. On a CPU in float32
# the same settings give the same numbers to the bit, on one machine with one number of threads.
BABY = ("--n_layer=4", "--n_head=4", "--n_embd=128", "--block_size=64", "--dropout=0.1", "--batch_size=12")
BABY += ("--gradient_accumulation_steps=1", "--learning_rate=3e-3", "--min_lr=3e-4", "--beta2=0.99")
BABY += ("--device=cpu", "--dtype=float32", "--compile=False", "--eval_iters=20", "--save_interval=50")
# a short window, so that a model without a mask soon finds the next token in it
WHATIF = (*BABY, "--block_size=32", "--batch_size=16", "--attention=explicit")
WHATIF += ("--max_iters=300", "--eval_interval=300", "--warmup_iters=50")
CONTEXT = (*BABY, "--max_iters=1000", "--eval_interval=1000", "--warmup_iters=100", "--dropout=0")
EVALUATED_LENGTHS = 4  # context measures the loss up to this multiple of block_size
WINDOWS = 100  # windows of that length, for each of eval_iters
PROMPT, NEW_TOKENS = 16, 200  # tokens of a sample


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass
class Experiment:
    """A run of train.main, in the folder cfg.out_dir."""

    variant: Variant
    cfg: TrainConfig
    origin: dict[str, str]
    finished: bool  # when it was parsed

    @classmethod
    def of(cls, variant: Variant, flags: list[str], out_dir: Path) -> "Experiment":
        """Parse the flags; later ones win. Raises UserError if out_dir has a run with other settings."""
        cfg, origin = parse(TrainConfig, [*flags, f"--out_dir={out_dir}", "--init_from=auto"])
        finished = False
        if (out_dir / LAST).exists():
            saved = checkpoint.load(out_dir / LAST, mmap=True)
            before, finished = saved["config"], saved["iter_num"] >= cfg.max_iters
            given = {key for key, source in origin.items() if source != "default"} - NOT_RESTORED
            for key in sorted(given & before.keys()):
                if before[key] != getattr(cfg, key):
                    trained = f"{out_dir} was trained with {before[key]}"
                    raise UserError(f"{key}={getattr(cfg, key)!r}: {trained}; give another folder")
        return cls(variant, cfg, origin, finished)

    @property
    def folder(self) -> Path:
        return Path(self.cfg.out_dir)

    def val_loss(self) -> float:
        """The last validation loss that the run recorded."""
        return read_run(self.folder).having("val_loss")[-1]["val_loss"]

    def sample(self, model: ModuleType) -> str:
        """The first tokens of val, continued by the trained model. Every token is computed from its whole window."""
        saved = checkpoint.load(self.folder / LAST)
        tokenizer = from_description(saved["tokenizer"])
        val = open_dataset(self.cfg.data_dir, self.cfg.dataset, self.cfg.block_size, 1).splits["val"]
        prompt = torch.from_numpy(val.shards[0][: min(PROMPT, self.cfg.block_size)].astype(np.int64))[None]  # (1, T)
        with in_place(model, self.variant):
            gpt = restore_model(saved, self.folder / LAST, model.GPT, model.GPTConfig).eval()
            generators = [torch.Generator().manual_seed(self.cfg.seed)]
            drawing = {"vocab_size": tokenizer.vocab_size, "kv_cache": False, "temperature": 0.8, "top_k": 200}
            new = list(gpt.generate(prompt, NEW_TOKENS, generators, **drawing))
        return tokenizer.decode(torch.cat([prompt, *new], dim=1)[0].tolist())


def train_all(
    model: ModuleType, train_main: Callable, experiments: list[Experiment], out_dir: Path, say: Callable[[str], None]
) -> None:
    """Train those that are not finished; `say` gets a line after each, OUT_DIR/log.txt what train.py prints.

    If it is asked to stop, the run in progress is saved and the program ends with train.py's exit code.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    stop = StopRequests()  # one for all runs, so that a signal between two of them is not lost
    left, began = [run for run in experiments if not run.finished], time.monotonic()
    if len(left) < len(experiments):
        say(f"{len(experiments) - len(left)} of {len(experiments)} runs are finished already")
    with (out_dir / "log.txt").open("a", encoding="utf-8") as log:
        for number, run in enumerate(left, start=1):
            with in_place(model, run.variant), redirect_stdout(log):
                code = train_main(run.cfg, run.origin, stop)
            if code:
                say(f"stopped in {run.folder}; the same command continues")
                sys.exit(code)
            stop.running = False  # until the next run begins, nothing needs saving
            minutes = (time.monotonic() - began) / number * (len(left) - number) / 60
            say(
                f"{run.folder.name}: val loss {run.val_loss():.4f}; {number} of {len(left)}, {minutes:.1f} minutes left"
            )


# -- what if -----------------------------------------------------------------------------------------------------------


def whatif(
    model: ModuleType,
    train_main: Callable,
    settings: list[str],
    out_dir: Path,
    only: tuple[str, ...] = (),
    seeds: int = 3,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Train each variant with the same data, steps and seeds: its losses, their mean and spread, a sample, the outcome.

    `settings` are flags of train.py, which win over WHATIF's. "spread" is the sample standard deviation, None for one
    seed. Raises UserError if `only` has an unknown name.
    """
    names = [variant.name for variant in VARIANTS]
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"only={unknown[0]!r}: expected {' | '.join(names)}")
    first = parse(TrainConfig, list(settings))[0].seed
    chosen = [variant for variant in VARIANTS if not only or variant.name in only]
    runs = {variant.name: [] for variant in chosen}
    for seed in range(first, first + seeds):  # the first seed of all variants first, so that a stopped series compares
        for variant in chosen:
            flags = [*WHATIF, *settings, *variant.flags, f"--seed={seed}"]
            runs[variant.name].append(Experiment.of(variant, flags, out_dir / f"{variant.name}-{seed}"))
    train_all(model, train_main, [run for group in zip(*runs.values(), strict=True) for run in group], out_dir, say)
    results = []
    for variant in chosen:
        losses = [run.val_loss() for run in runs[variant.name]]
        result = {"variant": variant.name, "title": variant.title, "losses": losses, "mean": statistics.mean(losses)}
        result["spread"] = statistics.stdev(losses) if seeds > 1 else None
        results.append(result | {"samples": {first: runs[variant.name][0].sample(model)}, "outcome": variant.outcome})
    return results


def whatif_table(results: list[dict[str, Any]]) -> Table:
    """The results as a table, a line for each variant."""
    table = [["variant", "val loss", "spread", "what is different"]]
    for result in results:
        spread = "-" if result["spread"] is None else f"{result['spread']:.4f}"
        table.append([result["variant"], f"{result['mean']:.4f}", spread, result["title"]])
    return table


# -- why longer contexts fail ------------------------------------------------------------------------------------------

# what each encoding did with CONTEXT's settings on the Python standard library, where guessing by how often each
# character occurs has a loss of 3.27
EXPLANATIONS = {
    "learned": "One token past block_size the loss jumps from 1.9 to 2.5, ten tokens later it is 3.5, no better than a "
    "guess: training never saw these rows of the table, so they still hold their random initial values. A learned "
    "table ends where training ended.",
    "sinusoidal": "The formula has a vector for every position, but the layers have learnt to read the first 64 only: "
    "the loss rises from 2.5 to 3.6, and from position 180 on to 5, worse than a guess. Within the window it is the "
    "worst of the four, probably because the sines are 35 times as large as the first token embeddings.",
    "rope": "The loss stays at 1.65 for ten tokens past block_size, is 1.9 at position 100, then jumps to 2.4 and "
    "drifts to 2.7. No table ends here, but queries and keys meet at distances, so at angles, that they never met in "
    "training.",
    "none": "The loss rises slowly and without a jump, from 2.2 at the end of the window to 2.4 at four times its "
    "length: nothing is new but the number of tokens over which attention is spread. The price is paid within the "
    "window, 2.1 where rope has 1.7: the order of the tokens can be inferred from the mask alone, and with difficulty.",
}


def context(
    model: ModuleType, train_main: Callable, settings: list[str], out_dir: Path, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Train each position encoding alike; returns its validation losses by position, up to 4 times the trained window.

    "positions" counts the tokens that a prediction is made from, "losses" has the mean in nats for each encoding.
    """
    runs = {}
    for position in EXPLANATIONS:
        flags = [*CONTEXT, *settings, f"--position={position}"]
        runs[position] = Experiment.of(Variant(position, ""), flags, out_dir / position)
    train_all(model, train_main, list(runs.values()), out_dir, say)
    losses = {position: losses_by_position(model, run) for position, run in runs.items()}
    block_size = runs["learned"].cfg.block_size
    positions = list(range(1, EVALUATED_LENGTHS * block_size + 1))
    return {"block_size": block_size, "positions": positions, "losses": losses, "explanations": EXPLANATIONS}


@torch.inference_mode()
def losses_by_position(model: ModuleType, run: Experiment) -> list[float]:
    """The mean loss at each position of fixed windows of val that are 4 times as long as those of the training."""
    gpt = lengthened(model, run, EVALUATED_LENGTHS * run.cfg.block_size)
    val = open_dataset(run.cfg.data_dir, run.cfg.dataset, gpt.config.block_size, 1).splits["val"]
    total, count = torch.zeros(2, gpt.config.block_size, dtype=torch.float64)  # (4 T) each
    for _, x, y in val.eval_batches(val.eval_windows(WINDOWS * run.cfg.eval_iters)):  # (B, 4 T) each
        logits = gpt.lm_head(gpt.hidden_states(gpt.transformer.wte(x))).transpose(1, 2)  # (B, V, 4 T)
        total += F.cross_entropy(logits, y, reduction="none", ignore_index=-1).double().sum(0)
        count += (y >= 0).sum(0)
    return (total / count).tolist()


def lengthened(model: ModuleType, run: Experiment, block_size: int) -> nn.Module:
    """The trained model with a longer block_size. Positions that it was not trained on have their initial values:

    random rows of a learned table; a sinusoidal table follows its formula. Rope and no positions have no table.
    """
    saved = checkpoint.load(run.folder / LAST)
    torch.manual_seed(run.cfg.seed)
    gpt = model.GPT(model.GPTConfig(**saved["model_args"] | {"block_size": block_size})).eval()
    for name, weight in gpt.state_dict().items():
        weight[: len(saved["model"][name])] = saved["model"][name]
    return gpt


def context_table(result: dict[str, Any]) -> Table:
    """The result as a table: mean losses over half of block_size positions in each line."""
    half, losses = max(1, result["block_size"] // 2), result["losses"]
    table = [["position", *losses]]
    for first in range(0, len(result["positions"]), half):
        means = (f"{statistics.mean(values[first : first + half]):.4f}" for values in losses.values())
        table.append([f"{first + 1} to {first + half}", *means])
    return table
