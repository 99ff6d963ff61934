"""The same work here and in a peer, nanoGPT or Hugging Face's transformers, side by side:

python bench.py train generate --peer=../nanoGPT --size=small --json=bench.json

Each side runs in processes of its own, in turn (A B A B ...), on the same shapes, data and threads. The table also
shows what share of this machine's limit is reached. The peer is a checkout of yours, run as it is; nothing is written
into it. This process never imports torch: on Linux, the peak memory of a child would not read lower than its own.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from kqv import ROOT, benchmarks, cli
from kqv.benchmarks import SHAPES
from kqv.errors import UserError
from kqv.gpu_benchmark import gpu
from kqv.machine import cpu_name, git
from kqv.measure import call, limits
from kqv.rundir import write_whole
from kqv.settings import at_least
from kqv.tables import print_table

TASKS = benchmarks.TASKS | {"gpu": gpu}


@dataclass(kw_only=True)
class Bench:
    POSITIONAL: ClassVar[str] = "tasks"
    tasks: Annotated[tuple[str, ...], "train | generate | prepare | loss | gpu, one or more"] = ()
    peer: Annotated[
        tuple[str, ...], "folder of a nanoGPT checkout, or hf: transformers, to generate; give it twice for both"
    ] = ()
    size: Annotated[
        tuple[str, ...], "baby | small | gpt2, the models of train and generate; can be given more than once"
    ] = ("baby",)
    repeats: Annotated[int, "how many times each side runs"] = 3
    steps: Annotated[int | None, "iterations that train times in each run; None: some seconds' worth"] = None
    device: Annotated[str, "auto | cpu | cuda | mps; loss: cpu, unless cuda is named; gpu: cuda, unless cpu is"] = (
        "auto"
    )
    threads: Annotated[int | None, "of both sides (OMP_NUM_THREADS); None: PyTorch's choice"] = None
    dtype: Annotated[Literal["float32", "bfloat16"], "of the weights of both sides in generate"] = "float32"
    quantize: Annotated[Literal["int8"] | None, "of our side in generate"] = None
    flags: Annotated[str, "more settings for our train.py in train and loss: '--compile --dtype=bfloat16'"] = ""
    peer_flags: Annotated[str, "more settings for the peer's train.py"] = ""
    config: Annotated[
        str | None, "what loss runs on our side; None: nanoGPT's recipe for the device, in gpu fast_shakespeare_char"
    ] = None
    input: Annotated[str | None, "loss: the text, None downloads tiny Shakespeare; prepare: file or folder"] = None
    megabytes: Annotated[int, "text for prepare: Python's own sources, or the input, over and over"] = 200
    json: Annotated[str | None, "also write the results to this file"] = None

    def __post_init__(self):
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            unknown = f"task {next(t for t in self.tasks if t not in TASKS)!r}" if self.tasks else "which task?"
            raise UserError(f"{unknown}: expected {' | '.join(TASKS)}")
        at_least(self, 1, "repeats", "steps", "threads", "megabytes")
        if unknown := set(self.size) - set(SHAPES):
            raise UserError(f"size={min(unknown)!r}: expected {' | '.join(SHAPES)}")
        for peer in self.peer:
            if peer != "hf" and not (peer and all((Path(peer) / name).is_file() for name in ("train.py", "model.py"))):
                raise UserError(f"peer={peer!r}: not a checkout of nanoGPT, it has no train.py and model.py")
        self.peer = tuple(dict.fromkeys(peer if peer == "hf" else str(Path(peer).resolve()) for peer in self.peer))
        if len(self.peer) > 1 + ("hf" in self.peer):
            raise UserError(f"peer={self.peer[-1]!r}: one checkout is enough, and hf beside it")
        if self.peer == ("hf",) and set(self.tasks) != {"generate"}:
            raise UserError("peer='hf' is for generate alone; the others need a nanoGPT checkout")
        if "loss" in self.tasks and self.device.partition(":")[0] not in ("auto", "cpu", "cuda"):
            raise UserError(f"device={self.device!r}: loss runs on cpu | cuda")
        for key in ("flags", "peer_flags"):
            try:
                shlex.split(getattr(self, key))
            except ValueError as error:
                raise UserError(f"{key}={getattr(self, key)!r}: {error}") from None
        if self.json and (Path(self.json).is_dir() or not Path(self.json).resolve().parent.is_dir()):
            raise UserError(f"json={self.json!r}: expected a file in an existing folder")

    @property
    def nanogpt(self) -> str | None:
        return next((peer for peer in self.peer if peer != "hf"), None)


# -- the report --------------------------------------------------------------------------------------------------------


def versions(peers: tuple[str, ...]) -> dict[str, Any]:
    found = {"python": platform.python_version(), "kqv": git("rev-parse", "HEAD"), "cpu": cpu_name()}
    packages = ("torch", "numpy", *(["transformers"] if "hf" in peers else []))
    found |= {name: importlib.metadata.version(name) for name in packages}
    folder = next((peer for peer in peers if peer != "hf"), None)
    return found | ({"peer": git("-C", folder, "rev-parse", "HEAD")} if folder else {})


def cells(result: dict[str, Any]) -> list[str]:
    """A row of the table: medians, with the least and the greatest value of all runs."""

    def shown(key: str, form: str) -> str:
        runs = result.get(f"{key}_runs", [])
        spread = f" ({min(runs):{form}} to {max(runs):{form}})" if len(runs) > 1 else ""
        return "-" if result[key] is None else f"{result[key]:{form}}{spread}"

    both = [f"{shown('share_of_limit', '.1%')} / {shown('peer_share_of_limit', '.1%')}"]
    both += [result["unit"], f"{shown('peak_rss_mb', ',.0f')} / {shown('peer_peak_rss_mb', ',.0f')}"]
    what = [result["task"], f"{result['size']}, {result['device']}"]
    return [*what, shown("ours", ",.4g"), shown("peer", ",.4g"), *both, shown("ratio", ".2f")]


def main(cfg: Bench, origin: dict[str, str]) -> None:
    """Measure kqv, alone or beside a peer: a table with medians, the spread, and at its end the ratio.

    python bench.py train | generate | prepare | loss | gpu [--peer=FOLDER_OF_NANOGPT] [--size=small] [--json=FILE]
    """
    known, rows, machine = versions(cfg.peer), [], {}
    if cfg.threads:
        os.environ["OMP_NUM_THREADS"] = str(cfg.threads)
    if {"train", "generate"} & set(cfg.tasks):
        machine = call("the machine's limits", limits, ROOT, device=cfg.device).found
        speeds = f"matrix products {machine['float32'] / 1e9:,.0f} GFLOP/s in float32"
        speeds += f", {machine['bfloat16'] / 1e9:,.0f} in bfloat16" if "bfloat16" in machine else ""
        speeds += f"; reads {machine['read'] / 1e9:,.1f} GB/s"
        print(f"{machine['name']}, {machine['threads']} threads: {speeds}", flush=True)
        known["threads"] = machine["threads"]
    try:
        for task in cfg.tasks:
            for size in cfg.size if task in ("train", "generate") else cfg.size[:1]:
                with tempfile.TemporaryDirectory(prefix="kqv-bench-") as work:
                    for result in TASKS[task](cfg, size, Path(work).resolve(), machine):
                        rows.append(result | {"versions": known})
            if cfg.json:
                write_whole(Path(cfg.json), json.dumps(rows[0] if len(rows) == 1 else rows, indent=1) + "\n")
    finally:  # also if a task fails
        heading = ["task", "size", "ours (spread)", "peer (spread)", "of limit", "unit", "peak MB", "ratio"]
        if rows:
            print_table([heading, *map(cells, rows)])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child is stopped and the folder removed
    cli.run(main, Bench)
