"""Write text with a trained GPT: from train.py's out_dir, from nanoGPT's ckpt.pt, or from GPT-2.

python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3

python sample.py --init_from=gpt2 --start="What is the answer to life, the universe, and everything?" --stream

The text goes to standard output, all else to standard error.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while Python imports ends quietly, without a traceback

import codecs
import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from kqv.cli import parse_command_line
from kqv.errors import UserError, one_line_errors
from kqv.machine import limit_spinning, resolve_device, resolve_dtype
from kqv.settings import SampleConfig

# Parsed before torch is imported, so that --help and a misspelt setting are answered at once.
SETTINGS = parse_command_line(SampleConfig, __doc__) if __name__ == "__main__" else None
limit_spinning()

import torch

from kqv.build import load_trained
from kqv.generate import FastGeneration
from kqv.quantized import pack, prefers_16_bit_weights
from kqv.tokenizer import Tokenizer
from model import GPT, GPTConfig, KVCache, next_token

SEPARATOR = "---------------"  # between samples, as nanoGPT prints it


class Text:
    """One sample's text as its tokens arrive: whole UTF-8 characters, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.shown, self.done = "", 0, False

    def add(self, token: int) -> None:
        if not self.done:
            self.extend(self.decoder.decode(self.tokenizer.decode_bytes([token])))

    def extend(self, piece: str) -> None:
        before = len(self.text)
        self.text += piece
        # a stop string may begin in earlier text, so look back by all but its last character
        found = [at for stop in self.stop if (at := self.text.find(stop, max(0, before - len(stop) + 1))) >= 0]
        if found:
            self.text, self.done = self.text[: min(found)], True

    def ready(self) -> str:
        """The text that can be shown now: all that was not yet shown, except an end that may begin a stop string."""
        held = 0
        if not self.done:
            starts = (n for stop in self.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
            held = max(starts, default=0)
        piece = self.text[self.shown : len(self.text) - held]
        self.shown += len(piece)
        return piece

    def finish(self) -> str:
        """The rest of the text, after the last token; an incomplete character becomes a replacement character."""
        if not self.done:
            self.extend(self.decoder.decode(b"", final=True))
        self.done = True
        return self.ready()


def read_prompt(start: str) -> str:
    try:
        if start == "-":
            return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8").read()  # any line ends, as from a file
        if start.startswith("FILE:"):
            return Path(start.removeprefix("FILE:")).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"start={start}: not UTF-8 text") from None
    return start


def with_progress(steps: Iterable, total: int) -> Iterable:
    """`steps`, with a progress bar on a terminal."""
    if not sys.stderr.isatty():
        return steps
    from rich.console import Console
    from rich.progress import track

    return track(steps, "writing", total, console=Console(stderr=True), transient=True)


def make_fast(model: GPT, cfg: SampleConfig, batch_size: int) -> Callable[..., Iterator[torch.Tensor]]:
    """Move the model to its device and dtype and speed it up; returns GPT.generate, or a faster one."""
    device, n_embd = resolve_device(cfg.device), model.config.n_embd
    fixed_shapes = cfg.compile is True or (device.type == "cuda" and cfg.kv_cache and not cfg.quantize)
    rows = batch_size * (1 if cfg.kv_cache else model.config.block_size)  # of each product, for a new token
    wanted = cfg.dtype
    if wanted == "auto" and cfg.quantize:  # the 8-bit weights are rounded from float32, not from 16-bit numbers
        wanted = "float32"
    elif wanted == "auto" and not fixed_shapes and prefers_16_bit_weights(device, rows, n_embd):
        wanted = "bfloat16"
    # a token takes the time of reading the weights, which is that of 30 rows
    dtype = resolve_dtype(wanted, device, work=max(30 * batch_size, rows) * n_embd**2)
    for parameter in model.parameters():  # each token reads every weight, so half the bytes take half the time
        parameter.data = parameter.data.to(device, dtype)
    model.eval()
    print(f"on {device} in {dtype}", file=sys.stderr)
    if cfg.compile is True:  # not "auto": on CPUs it gains nothing
        print("compiling the model takes half a minute", file=sys.stderr)
    if fixed_shapes:
        return FastGeneration(model, KVCache, next_token, cfg.compile is True)
    pack(model, rows, cfg.quantize)
    return partial(model.generate, kv_cache=cfg.kv_cache)


def write(
    model: GPT,
    tokenizer: Tokenizer,
    generate: Callable[..., Iterator[torch.Tensor]],
    prompt: str,
    samples: Sequence[int],
    stream: bool,
    cfg: SampleConfig,
) -> int:
    """Print a continuation of the prompt for each of `samples`, as one batch; returns the number of new tokens."""
    ids = tokenizer.encode_prompt(prompt)
    if not ids:
        raise UserError("start is empty: the model needs at least one token to continue")
    idx = torch.tensor([ids], device=model.transformer.wte.weight.device)  # (1, T), read once for all samples
    generators = [torch.Generator().manual_seed(cfg.seed + sample) for sample in samples]
    options = {key: getattr(cfg, key) for key in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    options |= {"vocab_size": tokenizer.vocab_size}
    tokens = generate(idx, cfg.max_new_tokens, generators, **options)
    texts, made = [Text(tokenizer, cfg.stop) for _ in samples], 0
    if stream:
        print(prompt, end="", flush=True)
    try:
        for new in tokens if stream else with_progress(tokens, cfg.max_new_tokens):  # (B, 1)
            made += sum(not text.done for text in texts)
            for text, token in zip(texts, new[:, 0].tolist(), strict=True):
                text.add(token)
            if stream:
                print(texts[0].ready(), end="", flush=True)
            if all(text.done for text in texts):
                break
    except FloatingPointError as error:
        raise UserError(f"{error}: the weights are damaged, or their run had diverged") from None
    for sample, text in zip(samples, texts, strict=True):
        rest = text.finish()
        print(rest if stream else prompt + text.text)
        if sample < cfg.num_samples - 1:
            print(SEPARATOR)
    return made


def main(cfg: SampleConfig, origin: dict[str, str]) -> None:
    if cfg.interactive and origin["start"] != "default":
        raise UserError("start: does not work with --interactive, which asks for its prompts")
    if cfg.interactive and origin["num_samples"] == "default":
        cfg.num_samples = 1
    # streamed samples come one after the other; each draws from its own seed, so a batch in the same dtype gives the
    # same texts
    one_by_one = cfg.stream or cfg.interactive
    batches = [[sample] for sample in range(cfg.num_samples)] if one_by_one else [range(cfg.num_samples)]
    torch.backends.cuda.enable_cudnn_sdp(False)  # on an H100 it plans again for each cache length: 20 ms and more
    resolve_device(cfg.device)  # a missing device is reported before the model is read
    model, tokenizer, description = load_trained(cfg.init_from, cfg.out_dir, cfg.data_dir, GPT, GPTConfig)
    print(description, file=sys.stderr)
    generate = make_fast(model, cfg, batch_size=len(batches[0]))

    started, made = time.perf_counter(), 0
    if cfg.interactive:
        print("one prompt per line, Ctrl-D to end", file=sys.stderr)
    for prompt in iter_prompts() if cfg.interactive else [read_prompt(cfg.start)]:
        for samples in batches:
            try:
                made += write(model, tokenizer, generate, prompt, samples, one_by_one, cfg)
            except UserError as error:  # a prompt with characters that the tokenizer lacks does not end the session
                if not cfg.interactive:
                    raise
                print(f"error: {error}", file=sys.stderr)
                break
    seconds = time.perf_counter() - started
    print(f"{made} tokens in {seconds:.1f} s, {made / seconds:.1f} tokens/s", file=sys.stderr)


def iter_prompts() -> Iterable[str]:
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


if __name__ == "__main__":
    with one_line_errors():
        main(*SETTINGS)
