"""Look inside a GPT: the shape of every tensor, what attends to what, the loss of each token, and what if?

python explain.py shapes --n_layer=2 --n_head=4 --n_embd=64 --position=rope
python explain.py attention --out_dir=out-python-stdlib --text="def __init__(self"
python explain.py loss FILE --out_dir=out-python-stdlib

shapes and positions take a model or a model's settings, attention and loss a model; context and whatif train models.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while Python imports ends quietly, without a traceback

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from kqv.cli import parse_command_line
from kqv.errors import UserError, one_line_errors
from kqv.machine import limit_spinning
from kqv.settings import Model, at_least, check_init_from

COMMANDS = ("shapes", "attention", "positions", "loss", "context", "whatif")


@dataclass(kw_only=True)
class Explanation:
    POSITIONAL: ClassVar[str] = "words"
    words: Annotated[tuple[str, ...], "shapes | attention | positions | loss [FILE] | context | whatif"] = ()
    init_from: Annotated[
        str, "resume: the model in out_dir | gpt2 ... | a Hugging Face folder | OWNER/NAME on the hub"
    ] = "resume"
    out_dir: Annotated[str, "folder of the model, or its checkpoint; context, whatif: folder for their runs"] = "out"
    data_dir: Annotated[str, "folder of data sets; nanoGPT's checkpoints need DATASET/meta.pkl in it"] = "data"
    text: Annotated[str | None, "attention, loss: the text; None: a sentence for attention"] = None
    token: Annotated[str | None, "attention: list the strongest keys of this query, a token of the text"] = None
    layer: Annotated[int | None, "attention: only this layer, from 0"] = None
    head: Annotated[int | None, "attention: only this head, from 0"] = None
    dataset: Annotated[str, "context, whatif: the data set to train on"] = "python_stdlib"
    only: Annotated[tuple[str, ...], "whatif: only this variant; can be given more than once"] = ()
    seeds: Annotated[int, "whatif: number of runs of each variant"] = 3
    backward: Annotated[bool, "shapes: also the shapes of the gradients"] = False
    png: Annotated[str | None, "the picture; None: explain-COMMAND.png beside the model, or here"] = None
    html: Annotated[str | None, "the page; None: explain-COMMAND.html beside the model, or here"] = None
    json: Annotated[str | None, "also write the numbers to this file"] = None


@dataclass(kw_only=True)
class Explain(Model, Explanation):
    block_size: Annotated[int, "shapes, positions: context length of a model made from settings"] = 64
    vocab_size: Annotated[int, "shapes: vocabulary of a model made from settings"] = 50304

    def __post_init__(self):
        if not self.words or self.words[0] not in COMMANDS:
            unknown = f"command {self.words[0]!r}" if self.words else "which command?"
            raise UserError(f"{unknown}: expected {' | '.join(COMMANDS)}")
        if len(self.words) > (2 if self.words[0] == "loss" else 1):
            raise UserError(f"unexpected {self.words[-1]!r}; settings are given as --key=value")
        check_init_from(self.init_from, "resume")
        at_least(self, 0, "layer", "head")
        at_least(self, 1, "seeds")


# Parsed before torch is imported, so that --help and a misspelt setting are answered at once.
SETTINGS = parse_command_line(Explain, __doc__) if __name__ == "__main__" else None
limit_spinning()

import torch

import model as model_module
from kqv import inside, maps, pages, plots
from kqv.build import load_trained, model_config
from kqv.documents import open_text
from kqv.rundir import printable, write_whole
from kqv.shapes import forward_steps, table_of
from kqv.tables import print_losses, print_table
from kqv.tokenizer import Tokenizer
from model import ATTENTIONS, GPT, GPTConfig, explicit_attention

KINDS = {"png": "picture", "html": "page", "json": "numbers"}
SENTENCE = "The pizza came out of the oven and it tasted good."
MOST_TOKENS = 256  # in attention maps: the page of more would be too large for a browser


def names_a_model(origin: dict[str, str]) -> bool:
    return any(origin[key] != "default" for key in ("out_dir", "init_from"))


def load(cfg: Explain) -> tuple[GPT, Tokenizer]:
    model, tokenizer, description = load_trained(cfg.init_from, cfg.out_dir, cfg.data_dir, GPT, GPTConfig)
    print(description, file=sys.stderr)
    return model, tokenizer


def load_or_make(cfg: Explain, origin: dict[str, str]) -> GPT:
    """The model that is given, or an untrained one with these settings."""
    if names_a_model(origin):
        return load(cfg)[0]
    torch.manual_seed(1337)
    return GPT(model_config(GPTConfig, cfg, cfg.vocab_size))


def title(cfg: Explain) -> str:
    return f"{cfg.words[0]} of {printable(cfg.out_dir if cfg.init_from == 'resume' else cfg.init_from)}"


def write(cfg: Explain, kind: str, contents: str | bytes) -> None:
    """Write a "png", "html" or "json": into the file that is given, or into one beside the model."""
    folder = Path(cfg.out_dir) if cfg.init_from == "resume" and Path(cfg.out_dir).is_dir() else Path()
    path = Path(getattr(cfg, kind) or folder / f"explain-{cfg.words[0]}.{kind}")
    write_whole(path, contents)
    print(f"{KINDS[kind]}: {path}")


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = tokenizer.encode_prompt(text)
    if not ids:
        raise UserError("text is empty: at least one token is needed")
    return ids


# -- the commands: each returns the numbers for --json -----------------------------------------------------------------


def shapes(cfg: Explain, origin: dict[str, str]) -> list[dict[str, Any]]:
    """Print a line for each step of the forward pass, on a sequence of block_size tokens, at most 1,024."""
    gpt = load_or_make(cfg, origin)
    gpt.config.attention = "sdpa" if cfg.attention == "sdpa" else "explicit"  # the fused kernel shows no scores
    for block in gpt.transformer.h:
        block.attn.attention = ATTENTIONS[gpt.config.attention]
    T = min(gpt.config.block_size, 1024)  # all steps are kept, and longer texts' scores would fill the memory
    tokens = torch.arange(T)[None] % gpt.config.vocab_size  # (1, T)
    steps = forward_steps(gpt, tokens, tokens, GPT, cfg.backward)
    print_table(table_of(steps, cfg.backward), left=("shape", "in numbers", "operation", "why"))
    print(f"{sum(step.parameters for step in steps):,} parameters, {sum(step.flops for step in steps):,} FLOPs forward")
    return [{key: value for key, value in asdict(step).items() if key != "result"} for step in steps]


def attention(cfg: Explain, origin: dict[str, str]) -> dict[str, Any]:
    """Draw the attention maps of all heads, write a page to explore them, and list strong keys of a token."""
    gpt, tokenizer = load(cfg)
    ids = encode(tokenizer, SENTENCE if cfg.text is None else cfg.text)
    size = min(gpt.config.block_size, MOST_TOKENS)
    if len(ids) > size:
        print(f"only the first {size} of {len(ids)} tokens: block_size, and at most {MOST_TOKENS}", file=sys.stderr)
    ids = ids[:size]
    labels = [inside.label(tokenizer, token) for token in ids]
    weights = inside.attention_maps(gpt, torch.tensor([ids]), explicit_attention)  # (L, H, T, T)
    for key, count in (("layer", weights.size(0)), ("head", weights.size(1))):
        if getattr(cfg, key) is not None and getattr(cfg, key) >= count:
            raise UserError(f"{key}={getattr(cfg, key)}: the model has {count} {key}s, from 0 to {count - 1}")
    if cfg.token is not None:
        list_keys(cfg, tokenizer, ids, labels, weights)
    numbers = {"tokens": labels, "weights": weights.tolist(), "rollout": inside.rollout(weights).tolist()}
    layers = list(range(weights.size(0))) if cfg.layer is None else [cfg.layer]
    heads = list(range(weights.size(1))) if cfg.head is None else [cfg.head]
    write(cfg, "png", maps.draw_attention(weights, labels, layers, heads, title(cfg)))
    write(cfg, "html", pages.attention_page(numbers, title(cfg)))
    return numbers


def list_keys(cfg: Explain, tokenizer: Tokenizer, ids: list[int], labels: list[str], weights: torch.Tensor) -> None:
    """Print the strongest keys of the query cfg.token: of the last token with that text, with or without a space."""
    texts = [tokenizer.decode([token]) for token in ids]
    places = [place for place, text in enumerate(texts) if cfg.token in (text, text.strip(), labels[place])]
    if not places:
        raise UserError(f"token={cfg.token!r}: not a token of the text; it has {' '.join(labels)}")
    query = places[-1]
    chosen = weights if cfg.layer is None else weights[cfg.layer : cfg.layer + 1]
    chosen = chosen if cfg.head is None else chosen[:, cfg.head : cfg.head + 1]
    table = [["token", "position", "layer", "head", "weight"]]
    for layer, head, key, weight in inside.strongest(chosen, query, count=10):
        place = (key, layer + (cfg.layer or 0), head + (cfg.head or 0))
        table.append([labels[key], *map(str, place), f"{weight:.3f}"])
    print(f"the strongest keys of {labels[query]!r}, token {query}:")
    print_table(table)


def positions(cfg: Explain, origin: dict[str, str]) -> dict[str, Any]:
    """Draw the position table and how similar two positions are by their distance."""
    gpt = load_or_make(cfg, origin)
    if (config := gpt.config).position == "none":
        raise UserError("position='none': this model has no positions; the causal mask alone tells it the order")
    table = inside.position_table(model_module, gpt)
    similarity = inside.similarity_by_distance(model_module, config, table)
    when = ", before training" if config.position == "learned" and not names_a_model(origin) else ""
    heading = f"{config.position} positions{when}: {config.block_size} positions, {table.size(1)} channels"
    write(cfg, "png", maps.draw_positions(table, similarity, heading))
    return {"position": config.position, "table": table.tolist(), "similarity": similarity.tolist()}


def loss(cfg: Explain, origin: dict[str, str]) -> dict[str, Any]:
    """Print a text with each token coloured by its loss, and write a page with what the model would have said."""
    text = cfg.text
    if len(cfg.words) == 2:
        with open_text(Path(cfg.words[1])) as file:
            text = file.read()
    if text is None:
        raise UserError("which text? explain.py loss FILE, or --text=...")
    gpt, tokenizer = load(cfg)
    ids = encode(tokenizer, text)
    found = inside.token_losses(gpt, ids, tokenizer)
    if found.windows > 1:
        windows = f"{found.windows} windows of {gpt.config.block_size} that overlap by half"
        print(f"{len(ids)} tokens, read in {windows}", file=sys.stderr)
    numbers = found.in_text(ids, tokenizer)
    print_losses(numbers["tokens"], found.losses)
    if len(ids) == 1:
        print("one token: nothing comes before it, so nothing is predicted")
    else:
        print(f"loss {found.loss:.4f} nats per token, {found.bits_per_byte:.4f} bits per byte, {len(ids)} tokens")
    write(cfg, "html", pages.loss_page(numbers, title(cfg)))
    return numbers


def experiment(cfg: Explain, origin: dict[str, str]) -> tuple[list[str], Path]:
    """Flags for the runs of context or whatif, and their folder: out-context or out-whatif, if none is given."""
    cfg.out_dir = f"out-{cfg.words[0]}" if origin["out_dir"] == "default" else cfg.out_dir
    return [f"--dataset={cfg.dataset}", f"--data_dir={cfg.data_dir}"], Path(cfg.out_dir)


def whatif(cfg: Explain, origin: dict[str, str]) -> list[dict[str, Any]]:
    """Train small models that lack a part, or do it differently; print, draw and explain how they learn."""
    from kqv.experiments import whatif, whatif_table
    from train import main as train_main

    results = whatif(model_module, train_main, *experiment(cfg, origin), cfg.only, cfg.seeds)
    print_table(whatif_table(results), left=("what is different",))
    for result in results:
        print(f"{result['variant']}: {result['outcome']}\n")
    write(cfg, "png", plots.draw_whatif(results))
    return results


def context(cfg: Explain, origin: dict[str, str]) -> dict[str, Any]:
    """Train four models with different positions; print and draw their loss by position, past block_size too."""
    from kqv.experiments import context, context_table
    from train import main as train_main

    result = context(model_module, train_main, *experiment(cfg, origin))
    print_table(context_table(result))
    for position, explanation in result["explanations"].items():
        print(f"{position}: {explanation}\n")
    write(cfg, "png", plots.draw_context(result))
    return result


def main(cfg: Explain, origin: dict[str, str]) -> None:
    commands = dict(zip(COMMANDS, (shapes, attention, positions, loss, context, whatif), strict=True))
    numbers = commands[cfg.words[0]](cfg, origin)
    if cfg.json:
        write(cfg, "json", json.dumps(numbers, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main(*SETTINGS)
