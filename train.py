"""Train a GPT on token files that prepare/ has made. In one process, or in as many as torchrun starts:

python train.py configs/train_shakespeare_char.py --batch_size=32

torchrun --standalone --nproc_per_node=8 train.py configs/train_gpt2.py
"""

import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from types import FrameType

from kqv.cli import UserError, one_line_errors, parse_command_line, restore
from kqv.plan import check_strategy, learning_rate_concerns, micro_steps_of_each, padded_vocab_size, plan
from kqv.settings import TrainConfig

# torchrun sets RANK, LOCAL_RANK and WORLD_SIZE; some clusters set the last for every command
DISTRIBUTED = "RANK" in os.environ
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1)) if DISTRIBUTED else 1
# Before torch is imported, so that --help and a misspelt setting are answered at once.
SETTINGS = parse_command_line(TrainConfig, __doc__) if __name__ == "__main__" else None
if SETTINGS and SETTINGS[0].plan:
    with one_line_errors():
        print(plan(SETTINGS[0], WORLD_SIZE, SETTINGS[0].plan_device))
    sys.exit()

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from kqv import checkpoint, optim
from kqv.data import EVAL_BATCH, Split, find_dataset, read_meta
from kqv.distributed import (
    any_process,
    average_gradients,
    gather_full,
    init_distributed,
    is_sharded,
    shard,
    try_compile,
)
from kqv.log import Log
from kqv.loss import NextTokenLoss
from kqv.machine import describe_environment, peak_flops, resolve_device, resolve_dtype, utc_now
from kqv.rundir import hold, put_aside
from kqv.tokenizer import Tokenizer, from_description
from model import GPT, GPTConfig
from report import refresh_picture

RECENT = 50  # logged losses that a new one is compared with, to notice when it jumps
STOPPED_EARLY = 75  # exit code of a run that was asked to stop and can go on: EX_TEMPFAIL, "try again"
# settings of a checkpoint's run that do not carry over to the run that resumes it
NOT_RESTORED = {"init_from", "out_dir", "data_dir", "eval_only", "plan", "plan_device", "device", "compile", "backend"}
NOT_RESTORED |= {"strategy", "allow_other_data"}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    windows: np.ndarray,
    device: torch.device,
    autocast: torch.autocast,
    rank: int,
    world_size: int,
) -> float:
    """Mean loss, in nats a token, on fixed windows. Every process takes its share and all get the same answer.

    It is bit for bit the same whatever the batch size and the number of processes: each batch of windows is summed by
    one process, in one shape, and the sums are added up in one order.
    """
    model.eval()
    losses = []
    for number, x, y in split.eval_batches(windows, rank, world_size):
        with autocast:
            loss = model(x.to(device), y.to(device))
        if tokens := int((y >= 0).sum()):  # else the batch only keeps this process in step with the others
            losses.append((number, loss, tokens))
    model.train()
    sums = torch.zeros(len(windows), 2, dtype=torch.float64)  # by batch: loss in nats, tokens
    for number, loss, tokens in losses:
        sums[number] = torch.tensor([loss.item() * tokens, tokens])
    if world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)  # each row is zero but in one process, so adding loses nothing
    total, tokens = sums.cpu().sum(dim=0).tolist()
    return total / tokens


def model_config(cfg: TrainConfig, vocab_size: int) -> GPTConfig:
    """The GPTConfig that the settings ask for. UserError if there is no such model."""
    switches = {field.name: getattr(cfg, field.name) for field in fields(GPTConfig) if hasattr(cfg, field.name)}
    try:
        return GPTConfig(vocab_size=vocab_size, **switches)
    except ValueError as error:
        raise UserError(str(error)) from None


def write_samples(model: GPT, tokenizer: Tokenizer, prompt: Tensor, seed: int) -> list[str]:
    """Two continuations of the prompt (T), 100 tokens each: always the same for the same weights and seed."""
    generators = [torch.Generator().manual_seed(seed + sample) for sample in range(2)]
    new = model.generate(prompt[None], 100, generators, vocab_size=tokenizer.vocab_size, temperature=0.8, top_k=200)
    return [tokenizer.decode(prompt.tolist() + ids) for ids in torch.cat(list(new), dim=1).tolist()]


def spike(losses: Sequence[float], loss: float) -> float | None:
    """How many standard deviations `loss` lies above the mean of the last ones, if that is out of the ordinary."""
    if len(losses) < RECENT // 2:
        return None
    above = float((loss - np.mean(losses)) / (np.std(losses, ddof=1) + 1e-12))
    return above if above > 6 else None


def catch_signals() -> list[str]:
    """A list to which signals that ask to stop add their names, for the loop to see. A second Ctrl-C stops at once."""
    received = []

    def note(number: int, _: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)
        with suppress(OSError):  # Ctrl-C has ended `tee` as well, or the terminal has gone
            print(f"{received[-1]}: saving after this step; Ctrl-C stops at once", file=sys.stderr)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows lacks the last; where nohup has it ignored, it stays so
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)
    return received


def main(cfg: TrainConfig, origin: dict[str, str]) -> int:
    """Train as the settings say; returns the exit code."""
    # -- processes and device: without torchrun there is one process
    rank, local_rank = (int(os.environ.get(key, 0)) for key in ("RANK", "LOCAL_RANK"))
    began = time.monotonic()
    log = Log(main=rank == 0)
    if cfg.wandb_log and not cfg.eval_only:
        import wandb  # noqa: F401  a missing package should not come up after a minute of preparations
    out_dir = Path(cfg.out_dir)
    device = resolve_device(cfg.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, where float32 is left
    backend = ("nccl" if device.type == "cuda" else "gloo") if cfg.backend == "auto" else cfg.backend
    host_group = init_distributed(backend) if DISTRIBUTED else None

    # -- what to continue, if anything: the first process reads it, so the others need not see the file
    saved = None
    if cfg.init_from in ("resume", "auto"):
        received = [None]
        if rank == 0 and (cfg.init_from == "resume" or checkpoint.find(out_dir)):
            received = [checkpoint.load_newest(out_dir, log.say)]
        if DISTRIBUTED:
            dist.broadcast_object_list(received, group=host_group)
        saved = received.pop()
    resumed = saved is not None
    if saved:
        # nanoGPT records a dtype even on CPUs, where it uses none
        not_restored = NOT_RESTORED if "tokenizer" in saved else NOT_RESTORED | {"dtype"}
        cfg, origin = restore(cfg, origin, saved["config"], but=not_restored)
        if not cfg.eval_only and cfg.optimizer != (before := saved["config"].get("optimizer", "adamw")):
            raise UserError(f"optimizer={cfg.optimizer!r}: cannot go on from the state of {before} in the checkpoint")
        of_model = {field.name: field.default for field in fields(GPTConfig)} | saved["model_args"]
        for key, value in of_model.items():
            given = origin.get(key, "default") not in ("default", "checkpoint")
            if given and key not in ("dropout", "attention", "block_size") and getattr(cfg, key) != value:
                log.say(f"{key}={value} as in the checkpoint, not {getattr(cfg, key)}")
        if saved["iter_num"] >= cfg.max_iters and not cfg.eval_only:
            log.say(f"nothing to do: {out_dir} is at iteration {saved['iter_num']} of max_iters={cfg.max_iters}")
            return 0
    dtype = resolve_dtype(cfg.dtype, device)
    check_strategy(cfg.strategy, str(dtype).removeprefix("torch."))
    micro_steps = micro_steps_of_each(WORLD_SIZE, cfg.gradient_accumulation_steps)
    lr_decay_iters = cfg.max_iters if cfg.lr_decay_iters is None else cfg.lr_decay_iters
    for concern in [] if cfg.eval_only else learning_rate_concerns(cfg):
        log.say(f"note: {concern}")

    # -- data
    folder = find_dataset(cfg.data_dir, cfg.dataset)
    meta = read_meta(folder)
    splits = {name: Split(folder, name, cfg.block_size, meta) for name in ("train", "val")}
    fingerprint = {name: meta["splits"].get(name, {}).get("sha256", split.tokens) for name, split in splits.items()}
    if saved and not cfg.allow_other_data:
        for what, now in (("tokenizer", meta["tokenizer"]), ("data", fingerprint)):
            if saved.get(what, now) != now:
                trained = f"its {what} is not what the checkpoint in {out_dir} was trained with"
                raise UserError(f"{folder}: {trained}; --allow_other_data resumes anyway")
    if not saved and cfg.init_from not in ("scratch", "auto") and meta["tokenizer"]["kind"] != "gpt2":
        kind = meta["tokenizer"]["kind"]
        raise UserError(f"init_from={cfg.init_from!r} reads GPT-2's tokens; {folder} has those of a {kind} tokenizer")

    # -- model
    torch.manual_seed(cfg.seed)
    if saved:
        source = f"the checkpoint in {out_dir}"
        model = checkpoint.restore_model(
            saved, out_dir / "ckpt.pt", GPT, GPTConfig, dropout=cfg.dropout, attention=cfg.attention
        )
        if cfg.block_size > model.config.block_size:
            log.say(f"block_size={model.config.block_size} as in the checkpoint, not {cfg.block_size}")
            cfg.block_size = model.config.block_size
    elif cfg.init_from in ("scratch", "auto"):
        source = "the data"
        # ids past the tokenizer's, which are only padding, are never targets nor sampled
        model = GPT(model_config(cfg, padded_vocab_size(meta["vocab_size"])))
    else:
        source = cfg.init_from
        model = GPT.from_pretrained(cfg.init_from, dropout=cfg.dropout)
    if cfg.block_size > model.config.block_size:
        raise UserError(f"block_size={cfg.block_size}: {source} has at most {model.config.block_size}")
    if meta["vocab_size"] > model.config.vocab_size:
        most = model.config.vocab_size
        raise UserError(f"{folder}: its vocabulary has {meta['vocab_size']} ids, the model of {source} at most {most}")
    model.crop_block_size(cfg.block_size)
    for key, value in asdict(model.config).items():  # what is recorded is the model that is trained
        if hasattr(cfg, key):
            setattr(cfg, key, value)
    if cfg.block_size != splits["val"].block_size:  # the checkpoint's is shorter
        splits = {name: Split(folder, name, cfg.block_size, meta) for name in splits}
    # train loss is measured on as many windows as val loss, also where eval_iters=0 asks for the whole of val
    eval_windows = {"val": splits["val"].eval_windows(EVAL_BATCH * cfg.eval_iters)}
    eval_windows["train"] = splits["train"].eval_windows(len(eval_windows["val"]))
    model.to(device)
    if cfg.activation_checkpointing:  # of each block keep only its input, and compute the rest again (arXiv:1604.06174)
        for block in model.transformer.h:
            block.forward = partial(recompute, block.forward, use_reentrant=False)
    loss_model = NextTokenLoss(model)
    if cfg.strategy == "fsdp" and DISTRIBUTED:
        shard(loss_model, device)
    tokens_per_iter = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    log.say(
        f"{model.num_params() / 1e6:.2f}M parameters (position embeddings not counted) on {device} in {dtype}; "
        f"{tokens_per_iter:,} tokens per iteration, {splits['train'].tokens:,} in {folder / 'train.bin'}"
    )

    # -- optimizers; fp16's small gradients are scaled up so as not to vanish, for the others the scaler does nothing
    matrices, rest = optim.split_for_muon(model) if cfg.optimizer == "muon" else ([], model.parameters())
    # by their names in a checkpoint
    optimizers = {"optimizer": optim.adamw(rest, cfg.learning_rate, (cfg.beta1, cfg.beta2), cfg.weight_decay)}
    if matrices:
        product_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
        optimizers["muon"] = optim.Muon(matrices, cfg.muon_lr, cfg.muon_momentum, cfg.weight_decay, product_dtype)
    peak_lrs = [group["lr"] for optimizer in optimizers.values() for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    iter_num, best_val_loss, val_loss, elapsed, wandb_id = 0, math.inf, math.nan, 0.0, None
    evals_since_best, evaluated_iter = 0, -1
    bad = [0, 0, -1]  # of bad steps: how many in a row up to now, how many in all, the last one
    recent_losses = []
    sequences, tokens = 0, 0  # that the weights have seen when this process begins, at resumed_iter
    if saved:
        iter_num, best_val_loss = saved["iter_num"], saved["best_val_loss"]
        val_loss = saved.get("val_loss", best_val_loss)
        elapsed, wandb_id = saved["elapsed_seconds"], saved.get("wandb_id")
        evals_since_best, evaluated_iter = saved.get("evals_since_best", 0), saved.get("evaluated_iter", -1)
        bad, recent_losses = saved.get("bad_steps", bad), saved.get("recent_losses", recent_losses)
        sequences = saved.get("sequences", iter_num * cfg.gradient_accumulation_steps * cfg.batch_size)
        tokens = saved.get("tokens", iter_num * tokens_per_iter)
        for name, optimizer in optimizers.items():
            optim.load_state(optimizer, saved.get(name, {}))
        if scaler.is_enabled() and saved.get("scaler"):
            scaler.load_state_dict(saved["scaler"])
        saved = None  # a second copy of the weights and moments

    def evaluate_all(model: nn.Module) -> dict[str, float]:
        where = (device, autocast, rank, WORLD_SIZE)
        losses = {name: evaluate(model, splits[name], eval_windows[name], *where) for name in splits}
        log.say(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        measured = {"train_eval_loss": losses["train"], "val_loss": losses["val"]}
        if splits["val"].bytes:
            measured["val_bpb"] = losses["val"] / math.log(2) * splits["val"].tokens / splits["val"].bytes
        return measured

    if cfg.eval_only:
        evaluate_all(loss_model)
        return 0

    resumed_iter = iter_num

    def first_sequence(iter_num: int, micro_step: int, rank: int) -> int:
        """Index, in the run's one order of sequences, of the first of a process's micro-batch."""
        micro_batches = (iter_num - resumed_iter) * cfg.gradient_accumulation_steps + micro_step * WORLD_SIZE + rank
        return sequences + micro_batches * cfg.batch_size

    def batch(iter_num: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """x and y, (B, T) each, of this process."""
        x, y = splits["train"].batch(cfg.seed, first_sequence(iter_num, micro_step, rank), cfg.batch_size)
        if device.type == "cuda":  # pinned memory is copied while the GPU computes
            return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
        return x.to(device), y.to(device)

    x, y = batch(iter_num, 0)
    bare = model  # what is saved: no wrapper of torch.compile or DDP around it
    compiled, model = try_compile(loss_model, cfg.compile, device, (x, y), autocast, log)

    if cfg.sample_interval:
        tokenizer = from_description(meta["tokenizer"])
        prompt = splits["val"].batch(cfg.seed, 0, 1)[0][0, : min(16, cfg.block_size)].to(device)

    # -- the record of the run
    held = None
    if rank == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        held = hold(out_dir)
    if cfg.wandb_log:
        wandb_id = log.open_wandb(out_dir, cfg.wandb_project, cfg.wandb_run_name, asdict(cfg), wandb_id)
    if rank == 0 and not resumed and (previous := put_aside(out_dir)):
        log.say(f"{out_dir} has an earlier run: it is now in {previous}")
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts = {
        "environment": describe_environment(device_name),
        "parameters": bare.num_params(),
        "data": {"folder": str(folder), "tokenizer": meta["tokenizer"]["kind"], "splits": meta["splits"]},
    }
    measured = log.open(out_dir, asdict(cfg), origin, iter_num, cfg.max_iters, facts)
    drawing, drawn = rank == 0, time.monotonic()
    peak = peak_flops(device_name, str(dtype).removeprefix("torch."))
    flops_per_iter = bare.flops_per_token() * tokens_per_iter / WORLD_SIZE  # of one device

    def tokens_seen() -> int:
        return tokens + (iter_num - resumed_iter) * tokens_per_iter

    def record(metrics: dict[str, float], clock: float) -> None:
        """iter_num's line in metrics.jsonl: `clock` and tokens are those that its weights have seen."""
        when = {"iter": iter_num, "time": utc_now(), "elapsed_seconds": clock, "tokens": tokens_seen()}
        log.record(when | metrics)

    def save(best: bool) -> None:
        """All that this run needs to go on from iter_num. A disk that is full now may not be later."""
        parts = {"model": bare, **optimizers}
        state = gather_full({name: part.state_dict() for name, part in parts.items()}, main=rank == 0)
        if rank != 0:
            return
        state |= {
            "scaler": scaler.state_dict(),
            "model_args": asdict(bare.config),
            "iter_num": iter_num,
            "sequences": first_sequence(iter_num, 0, 0),
            "tokens": tokens_seen(),
            "best_val_loss": best_val_loss,
            "val_loss": val_loss,
            "evals_since_best": evals_since_best,
            "evaluated_iter": evaluated_iter,
            "bad_steps": bad.tolist(),
            "recent_losses": recent_losses,
            "config": asdict(cfg),
            "tokenizer": meta["tokenizer"],
            "data": fingerprint,
            "elapsed_seconds": elapsed,
            "wandb_id": wandb_id,
        }
        try:
            checkpoint.save(state, out_dir, best, cfg.keep_last)
        except OSError as error:
            if cfg.save_errors == "stop" or iter_num >= cfg.max_iters:
                raise
            log.say(f"NOT SAVED at iteration {iter_num}: {error}; the run goes on, and what was saved before is kept")

    # -- the loop: iter_num counts the updates that the weights have had
    logged_iter, logged_elapsed = iter_num, elapsed
    bad, bad_loss, reported = torch.tensor(bad, device=device), torch.zeros((), device=device), bad[1]
    signals = catch_signals()
    started = time.perf_counter()  # the training clock stands still while evaluating and saving
    while True:
        last = iter_num >= cfg.max_iters
        evaluating = iter_num % cfg.eval_interval == 0 or last
        saving = bool(cfg.save_interval) and iter_num % cfg.save_interval == 0 and iter_num > resumed_iter
        sampling = bool(cfg.sample_interval) and (iter_num % cfg.sample_interval == 0 or last)
        too_long = cfg.max_minutes is not None and time.monotonic() - began > 60 * cfg.max_minutes
        stopping = not last and any_process(bool(signals) or too_long or log.unread, host_group)

        # once in a while: evaluate, save, write samples
        if evaluating or saving or sampling or stopping:
            if device.type != "cpu":
                torch.accelerator.synchronize()
            elapsed += time.perf_counter() - started
        improved = False
        if evaluating and not stopping:
            measured = evaluate_all(compiled)
            val_loss = measured["val_loss"]
            if not math.isfinite(val_loss):
                raise UserError(
                    f"val_loss is {val_loss} at iteration {iter_num}; {out_dir} keeps what was saved before"
                )
            improved = val_loss < best_val_loss
            best_val_loss = min(val_loss, best_val_loss)
            if iter_num != evaluated_iter:  # a resumed run evaluates again what the saved one had counted already
                evals_since_best = 0 if improved else evals_since_best + 1
            evaluated_iter = iter_num
            last = last or (cfg.patience is not None and evals_since_best >= cfg.patience)
            saving = saving or improved or last or cfg.always_save_checkpoint
        if saving or stopping:
            save(best=improved)
        if sampling and not stopping:
            weights = gather_full(bare.state_dict(), main=rank == 0)
            if rank == 0:
                model_now = checkpoint.build_model(GPT, bare.config, weights).to(device).eval()
                measured["samples"] = write_samples(model_now, tokenizer, prompt, cfg.seed)
                log.samples(iter_num, measured["samples"])
        if last or stopping:
            break
        if evaluating or saving or sampling:
            started = time.perf_counter()

        # one step: every random draw in it follows from (seed, iteration, rank), so a resumed run repeats it exactly
        torch.manual_seed(int(np.random.SeedSequence((cfg.seed, iter_num, rank)).generate_state(1)[0]))
        lr = cfg.learning_rate
        if cfg.decay_lr:
            when = (cfg.warmup_iters, lr_decay_iters, cfg.schedule, cfg.decay_fraction)
            lr = optim.learning_rate_at(iter_num, cfg.learning_rate, cfg.min_lr, *when)
        groups = (group for optimizer in optimizers.values() for group in optimizer.param_groups)
        for group, peak_lr in zip(groups, peak_lrs, strict=True):
            group["lr"] = peak_lr * lr / cfg.learning_rate if cfg.learning_rate else 0.0
        loss_sum = torch.zeros((), device=device)
        for micro_step in range(micro_steps):
            final = micro_step == micro_steps - 1
            average_gradients(model, now=final)
            with autocast:
                loss = model(x, y) / micro_steps
            loss_sum += loss.detach()
            scaler.scale(loss).backward()
            x, y = batch(iter_num + final, 0 if final else micro_step + 1)  # while a GPU is still at work
        for optimizer in optimizers.values():
            scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(bare.parameters(), cfg.grad_clip or math.inf)
        grad_norm = grad_norm.full_tensor() if is_sharded(grad_norm) else grad_norm
        own_loss = loss_sum.clone()  # of this process alone
        if DISTRIBUTED:
            dist.all_reduce(loss_sum)
        # A gradient that is not finite must not reach the weights: with found_inf the optimizer skips the step on the
        # device, so nobody waits for it. (In fp16 the scaler handles overflows, and only the loss tells.)
        is_bad = ~(loss_sum if scaler.is_enabled() else grad_norm).isfinite()
        bad = torch.stack(((bad[0] + 1) * is_bad, bad[1] + is_bad, torch.where(is_bad, iter_num, bad[2])))
        bad_loss = torch.where(is_bad, own_loss, bad_loss)
        for optimizer in optimizers.values():
            if not scaler.is_enabled():
                optimizer.grad_scale, optimizer.found_inf = None, is_bad.float()
            scaler.step(optimizer)
        scaler.update()
        bare.zero_grad(set_to_none=True)

        # once in a while: log
        if iter_num % cfg.log_interval == 0:
            train_loss = loss_sum.item() / WORLD_SIZE  # waits for the device, so the clock is read after it
            now = time.perf_counter()
            elapsed, started = elapsed + now - started, now
            seconds = (elapsed - logged_elapsed) / (iter_num + 1 - logged_iter)  # an iteration, since the last log
            logged_iter, logged_elapsed = iter_num + 1, elapsed
            step = {"iter": iter_num, "train_loss": train_loss, "grad_norm": grad_norm.item(), "lr": lr}
            step["tokens_per_second"] = tokens_per_iter / seconds
            if peak:
                step["mfu"] = flops_per_iter / seconds / peak
            in_a_row, in_all, bad_iter = bad.tolist()
            if in_all > reported:
                reported = step["bad_steps"] = in_all
                firsts = [first_sequence(bad_iter, micro_step, rank) for micro_step in range(micro_steps)]
                culprits = {"rank": rank, "loss": str(bad_loss.item()), "sequences": firsts}
                ranks = [culprits]
                if DISTRIBUTED:
                    dist.all_gather_object(ranks := [None] * WORLD_SIZE, culprits, group=host_group)
                log.bad_batch(out_dir, {"iter": bad_iter, "batch_size": cfg.batch_size, "ranks": ranks}, in_all)
                if in_a_row >= cfg.max_bad_steps:
                    raise UserError(
                        f"{in_a_row} steps in a row without a finite loss and gradient, up to iteration {bad_iter}: "
                        f"see {out_dir / 'bad_batch.json'}; {out_dir} keeps what was saved before"
                    )
            if above := spike(recent_losses, train_loss):
                step["loss_spike"] = above
                log.say(f"iter {iter_num}: loss spike, {train_loss:.4f} is {above:.1f} deviations above the last ones")
            if math.isfinite(train_loss):
                recent_losses = [*recent_losses, train_loss][-RECENT:]
            log.iteration(step, seconds, val_loss)
            record(measured | step, elapsed - seconds)
        elif measured:
            record(measured, elapsed)
        if drawing and measured and time.monotonic() - drawn > 5:  # seconds: a picture takes a third of one
            elapsed += time.perf_counter() - started
            drawing, drawn = refresh_picture(out_dir, log.say), time.monotonic()
            started = time.perf_counter()
        measured = {}
        iter_num += 1

    if stopping:
        reason = ", ".join(signals) or (f"max_minutes={cfg.max_minutes}" if too_long else "another process was told to")
        log.say(f"stopped at iteration {iter_num} ({reason}), all is saved; --init_from=resume goes on from there")
    else:
        record(measured, elapsed)
        if iter_num < cfg.max_iters:
            log.say(f"val loss has not improved for {evals_since_best} evaluations (patience={cfg.patience})")
        log.say(f"done: best val loss {best_val_loss:.4f}; python sample.py --out_dir={shlex.quote(str(out_dir))}")
    if drawing and (out_dir / "metrics.jsonl").stat().st_size:
        refresh_picture(out_dir, log.say)
    log.close()
    if held:
        held.close()
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))  # torchrun would take any other code for a failure
    return STOPPED_EARLY if stopping and not restarts else 0


if __name__ == "__main__":
    with one_line_errors():
        code = main(*SETTINGS)
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(code)
