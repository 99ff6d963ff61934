"""Train a GPT on token files that prepare/ has made. In one process, or in as many as torchrun starts:

python train.py configs/train_shakespeare_char.py --batch_size=32

torchrun --standalone --nproc_per_node=8 train.py configs/train_gpt2.py
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while Python imports ends quietly, without a traceback

import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kqv import machine
from kqv.cli import parse_command_line
from kqv.errors import one_line_errors
from kqv.settings import TrainConfig, check_strategy, learning_rate_concerns, micro_steps_of_each
from kqv.signals import StopRequests, exit_code_if_stopped

# Parsed before torch is imported, so that --help and a misspelt setting are answered at once.
SETTINGS = parse_command_line(TrainConfig, __doc__) if __name__ == "__main__" else None
STOP = StopRequests() if __name__ == "__main__" else None
machine.limit_spinning()

import numpy as np
import torch
from torch import Tensor, nn

from kqv import checkpoint, optim
from kqv.attention import use_attention
from kqv.bad_steps import BadSteps
from kqv.build import build_model, describe_size, make_model
from kqv.checkpoint import LoopState
from kqv.data import Dataset, MicroBatches, open_dataset
from kqv.distributed import (
    Processes,
    compile_and_wrap,
    connect,
    gather_full,
    is_sharded,
    read_environment,
    recompute_activations,
    seconds_saved,
    shard,
    uncompile,
)
from kqv.dropout import use_fast_dropout
from kqv.evaluate import check_finite, evaluate_splits
from kqv.log import Clock, Log, Pace
from kqv.lora import merged_weights, weights_to_save
from kqv.loss import NextTokenLoss
from kqv.passes import Passes
from kqv.plots import refresh_picture
from kqv.resume import check_data, is_comparable, load_saved, restore_settings
from kqv.rundir import METRICS, check_folder, hold, put_aside
from kqv.tokenizer import GPT2_VOCAB_SIZE, from_description
from model import GPT, GPTConfig

PICTURE_SECONDS = 5  # least time between two drawings of loss.png; one takes a third of a second


@dataclass
class Run:
    """What the loop works on. Weights, optimizers and `state` change; the rest stays the same."""

    cfg: TrainConfig
    processes: Processes
    log: Log
    dataset: Dataset
    state: LoopState
    bare: GPT  # the model without wrappers: what is saved
    loss_model: nn.Module  # NextTokenLoss of it, compiled if asked for: for evaluation
    passes: Passes  # forward and backward, with the same wrapped for several processes: for training
    optimizers: dict[str, torch.optim.Optimizer]  # by their names in a checkpoint
    scaler: torch.amp.GradScaler  # keeps small float16 gradients from becoming zero; disabled for other dtypes
    autocast: torch.autocast
    batches: MicroBatches
    bad_steps: BadSteps


def write_samples(run: Run) -> list[str]:
    """Two continuations of the start of val, 100 tokens each; they depend on the weights and the seed only.

    Every process must call it, because FSDP gathers the weights. Returns [] except in the main process.
    """
    weights = gather_full(merged_weights(run.bare), main=run.processes.main)
    if not run.processes.main:
        return []
    model = build_model(GPT, run.bare.config, weights).to(run.processes.device).eval()
    tokenizer = from_description(run.dataset.meta["tokenizer"])
    prompt = run.dataset.splits["val"].batch(run.cfg.seed, 0, 1)[0][:, :16].to(run.processes.device)  # (1, T)
    seeds = [torch.Generator().manual_seed(run.cfg.seed + sample) for sample in range(2)]
    new = model.generate(prompt, 100, seeds, vocab_size=tokenizer.vocab_size, temperature=0.8, top_k=200)
    return [tokenizer.decode(prompt[0].tolist() + ids) for ids in torch.cat(list(new), dim=1).tolist()]


# -- the loop ----------------------------------------------------------------------------------------------------------


def train_step(run: Run, stop: StopRequests) -> tuple[Tensor, Tensor] | None:
    """Update the weights once; returns the mean loss over the processes and the gradient norm, on the device.

    Returns None, with the weights as they were, if the run is asked to stop between two micro-batches.
    """
    processes, scaler, iter_num, micro_steps = run.processes, run.scaler, run.state.iter_num, run.batches.micro_steps
    # every random draw of a step follows from (seed, iteration, rank), so a resumed run repeats it exactly
    torch.manual_seed(int(np.random.SeedSequence((run.cfg.seed, iter_num, processes.rank)).generate_state(1)[0]))
    own_loss = torch.zeros((), device=processes.device)
    for micro_step in range(micro_steps):
        if micro_step and stop.requested(processes):
            return None
        own_loss += run.passes(micro_step, *run.batches.next)
        run.batches.read()  # the next batch, while a GPU is still computing
    for optimizer in run.optimizers.values():
        scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(run.bare.parameters(), run.cfg.grad_clip or math.inf)
    grad_norm = grad_norm.full_tensor() if is_sharded(grad_norm) else grad_norm
    loss = processes.sum(own_loss) / processes.world_size
    # A gradient that is not finite must not reach the weights. found_inf makes the optimizer skip the step on the
    # device, without waiting for it. (In float16 the scaler handles overflows, so only the loss is looked at.)
    is_bad = ~(loss if scaler.is_enabled() else grad_norm).isfinite()
    run.bad_steps.count(is_bad, iter_num, own_loss)
    for optimizer in run.optimizers.values():
        if not scaler.is_enabled():
            optimizer.grad_scale, optimizer.found_inf = None, is_bad.float()
        scaler.step(optimizer)
    scaler.update()
    run.passes.forget_gradients()
    return loss, grad_norm


def save(run: Run, best: bool) -> None:
    """Write a checkpoint. Every process must call it; the main one writes.

    If that fails, the failure is printed and the run continues: a full disk may have room later. Raises OSError with
    --save_errors=stop, or at the end of the run.
    """
    parts = {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()}
    saved = gather_full(parts | weights_to_save(run.bare), main=run.processes.main)
    if not run.processes.main:
        return
    run.state.bad_steps, run.state.recent_losses = run.bad_steps.counts.tolist(), run.bad_steps.recent_losses
    saved |= {"scaler": run.scaler.state_dict(), "model_args": asdict(run.bare.config), "config": asdict(run.cfg)}
    saved |= {"tokenizer": run.dataset.meta["tokenizer"], "data": run.dataset.fingerprint} | asdict(run.state)
    try:
        checkpoint.save(saved, Path(run.cfg.out_dir), best, run.cfg.keep_last)
    except OSError as error:
        if run.cfg.save_errors == "stop" or run.state.iter_num >= run.cfg.max_iters:
            raise
        kept = "the run continues; the previous checkpoint is kept"
        run.log.say(f"NOT SAVED at iteration {run.state.iter_num}: {error}; {kept}")


def report_step(run: Run, clock: Clock, pace: Pace, lr: float, loss: Tensor, grad_norm: Tensor) -> dict[str, Any]:
    """Print a step's loss and speed; returns its line of metrics.jsonl. Raises UserError after too many bad steps."""
    train_loss, norm = loss.item(), grad_norm.item()  # waits for the device, so the clock is read afterwards
    seconds = clock.lap(run.state.iter_num + 1)
    metrics = run.state.progress(clock.lap_seconds - seconds)
    metrics |= {"train_loss": train_loss, "grad_norm": norm, "lr": lr} | pace.speed(seconds)
    metrics |= run.bad_steps.report(run.state, train_loss, run.batches, run.processes, run.log, Path(run.cfg.out_dir))
    run.log.iteration(metrics, seconds)
    return metrics


def train(run: Run, pace: Pace, stop: StopRequests, measured: dict[str, Any]) -> bool:
    """The training loop; returns whether it was asked to stop. `measured`: losses known before the first step."""
    cfg, processes, log, state, out_dir = run.cfg, run.processes, run.log, run.state, Path(run.cfg.out_dir)
    decay_iters = cfg.max_iters if cfg.lr_decay_iters is None else cfg.lr_decay_iters
    schedule = (cfg.learning_rate, cfg.min_lr, cfg.warmup_iters, decay_iters, cfg.schedule, cfg.decay_fraction)
    peak_lrs = optim.learning_rates(run.optimizers)
    clock, first_iter = Clock(state.elapsed_seconds, state.iter_num, processes.device), state.iter_num
    drawn = time.monotonic()
    while True:
        iter_num = state.iter_num
        last = iter_num >= cfg.max_iters
        if not last and stop.requested(processes):
            break

        # every eval_interval, save_interval, sample_interval: evaluate, save, sample
        evaluating = iter_num % cfg.eval_interval == 0 or last or math.isinf(state.best_val_loss)
        saving = bool(cfg.save_interval) and iter_num % cfg.save_interval == 0 and iter_num > first_iter
        sampling = bool(cfg.sample_interval) and (iter_num % cfg.sample_interval == 0 or last)
        if evaluating or saving or sampling:
            with clock:
                improved = False
                if evaluating:
                    measured = evaluate_splits(run.loss_model, run.dataset, run.autocast, processes)
                    log.evaluated(iter_num, measured)
                    check_finite(measured["val_loss"], iter_num, out_dir)
                    improved = state.evaluated(measured["val_loss"])
                    last = last or (cfg.patience is not None and state.evals_since_best >= cfg.patience)
                    saving = saving or improved or last or cfg.always_save_checkpoint
                state.elapsed_seconds = clock.seconds
                if saving:
                    save(run, improved)
                if sampling:
                    measured["samples"] = write_samples(run)
                    log.samples(iter_num, measured["samples"])
        if last:
            log.record(state.progress(clock.seconds) | measured)
            return False

        # one step
        lr = optim.learning_rate_at(iter_num, *schedule) if cfg.decay_lr else cfg.learning_rate
        optim.set_learning_rates(run.optimizers, peak_lrs, lr, cfg.learning_rate)
        result = train_step(run, stop)
        if result is None:
            break

        # every log_interval: log, draw
        if iter_num % cfg.log_interval == 0:
            log.record(report_step(run, clock, pace, lr, *result) | measured)
        elif measured:
            log.record(state.progress(clock.seconds) | measured)
        if measured and processes.main and time.monotonic() - drawn > PICTURE_SECONDS:
            with clock:
                refresh_picture(out_dir, log.say)
            drawn = time.monotonic()
        measured = {}
        state.iter_num += 1
        state.sequences += cfg.gradient_accumulation_steps * cfg.batch_size
        state.tokens += pace.tokens_per_iter

    with clock:
        state.elapsed_seconds = clock.seconds
        save(run, best=False)
    return True


def main(cfg: TrainConfig, origin: dict[str, str], stop: StopRequests | None = None) -> int:
    """Train with these settings; returns the exit code. `origin` tells where each setting came from."""
    # -- processes, and what to continue
    stop, out_dir = stop or StopRequests(), Path(cfg.out_dir)
    processes = connect(cfg.device, cfg.backend)
    device, log = processes.device, Log(main=processes.main)
    check_folder(out_dir)
    machine.keep_freed_memory(device)
    if cfg.wandb_log and not cfg.eval_only:
        import wandb  # noqa: F401  a missing package should be reported before a minute of preparations
    saved = load_saved(cfg.init_from, out_dir, processes, log.say)
    if saved:
        cfg, origin = restore_settings(cfg, origin, saved, GPTConfig, log.say)
        if saved["iter_num"] >= cfg.max_iters and not cfg.eval_only:
            log.say(f"nothing to do: {out_dir} is at iteration {saved['iter_num']} of max_iters={cfg.max_iters}")
            return 0
    for concern in [] if cfg.eval_only else learning_rate_concerns(cfg):
        log.say(f"note: {concern}")
    micro_steps = micro_steps_of_each(processes.world_size, cfg.gradient_accumulation_steps)

    # -- data
    dataset = open_dataset(cfg.data_dir, cfg.dataset, cfg.block_size, cfg.eval_iters)
    check_data(dataset, cfg, saved)

    # -- model
    torch.manual_seed(cfg.seed)
    bare = make_model(GPT, GPTConfig, cfg, dataset.meta["vocab_size"], saved).to(device)
    # the recorded settings are those of the model that is trained; attention=auto may choose otherwise elsewhere
    switches = asdict(bare.config).items()
    cfg = replace(cfg, **{key: value for key, value in switches if key not in ("vocab_size", "attention")})
    dtype = machine.resolve_dtype(cfg.dtype, device, cfg.batch_size * cfg.block_size * cfg.n_embd**2)
    dtype_name = str(dtype).removeprefix("torch.")
    check_strategy(cfg.strategy, dtype_name)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    attention = use_attention(bare, cfg.attention, device, dtype)
    use_fast_dropout(bare, device)
    if cfg.activation_checkpointing:
        recompute_activations(bare)
    separator = dataset.end_of_text() if cfg.document_mask else None
    loss_model = NextTokenLoss(bare, machine.room_for_logits(device), separator)
    if cfg.strategy == "fsdp" and processes.connected:
        shard(loss_model, device)
    sequences_per_iter = cfg.gradient_accumulation_steps * cfg.batch_size
    tokens_per_iter = sequences_per_iter * cfg.block_size
    log.say(
        f"{describe_size(bare)} on {device} in {dtype}, {attention} attention; {tokens_per_iter:,} tokens per "
        f"iteration, {dataset.splits['train'].tokens:,} in {dataset.folder / 'train.bin'}"
    )
    state = LoopState() if saved is None else LoopState.from_checkpoint(saved, sequences_per_iter, tokens_per_iter)

    # -- optimizers
    optimizers = optim.make_optimizers(bare, cfg, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if saved:
        optim.load_states(optimizers, scaler, saved)
        if not is_comparable(dataset, cfg.block_size, saved):
            log.say("data or block_size differ from the checkpoint's: best val loss and patience start again")
            state.forget_best()
    resumed, saved = saved is not None, None  # frees the second copy of weights and moments
    if cfg.eval_only:
        log.evaluated(state.iter_num, evaluate_splits(loss_model, dataset, autocast, processes))
        return 0

    # -- compilation, recording
    batches = MicroBatches(dataset.splits["train"], cfg.seed, state.sequences, cfg.batch_size, micro_steps, processes)
    flops = bare.flops_per_token() * tokens_per_iter / processes.world_size  # on one device in one iteration
    peak = machine.peak_flops(machine.device_name(device), dtype_name)
    gain = seconds_saved(flops, peak, cfg.max_iters - state.iter_num)
    model = compile_and_wrap(loss_model, cfg.compile, gain, batches.next, autocast, processes, log.say)
    passes = Passes(model, autocast, scaler, micro_steps)
    if cfg.cuda_graph and device.type == "cuda" and not (processes.connected or cfg.activation_checkpointing):
        passes.record(*batches.next)
        uncompile(loss_model)  # evaluation, the only use left, is not worth compiling for

    # -- the run's folder and record
    lock = hold(out_dir) if processes.main else None
    if cfg.wandb_log:
        state.wandb_id = log.open_wandb(out_dir, cfg.wandb_project, cfg.wandb_run_name, asdict(cfg), state.wandb_id)
    if processes.main and not resumed and (previous := put_aside(out_dir)):
        log.say(f"the earlier run in {out_dir} was moved to {previous}")
    environment = machine.describe_environment(machine.device_name(device))
    facts = {"environment": environment, "parameters": bare.num_params(), "data": dataset.describe()}
    measured = log.open(out_dir, asdict(cfg), origin, state.iter_num, facts)
    log.open_bar(state.iter_num, cfg.max_iters)

    # -- the loop
    bad_steps = BadSteps(state.bad_steps, state.recent_losses, cfg.max_bad_steps, device)
    run = Run(
        cfg, processes, log, dataset, state, bare, loss_model, passes, optimizers, scaler, autocast, batches, bad_steps
    )
    stop.begin(cfg.max_minutes)
    stopped = train(run, Pace(tokens_per_iter, flops, peak), stop, measured)
    if stopped:
        log.say(f"stopped at iteration {state.iter_num} ({stop.reason()}), all is saved; --init_from=resume continues")
    else:
        if state.iter_num < cfg.max_iters:
            log.say(f"val loss has not improved for {state.evals_since_best} evaluations (patience={cfg.patience})")
        best, folder = f"{state.best_val_loss:.4f}", shlex.quote(str(out_dir))
        log.say(f"done: best val loss {best}; python sample.py --out_dir={folder}")
    if lock:
        if (out_dir / METRICS).stat().st_size:
            refresh_picture(out_dir, log.say)
        lock.close()
    log.close()
    processes.close()
    return exit_code_if_stopped() if stopped else 0


def plan_run(cfg: TrainConfig) -> str:
    """The text that --plan prints. Nothing is run or written."""
    from kqv.plan import data_sizes, plan, planned_config

    data = data_sizes(cfg)
    config = planned_config(GPTConfig, cfg, data[0] if data else GPT2_VOCAB_SIZE)
    return plan(cfg, config, GPT, data, read_environment()[2])


if __name__ == "__main__":
    with one_line_errors():
        if SETTINGS[0].plan:
            print(plan_run(SETTINGS[0]))
            sys.exit()
        sys.exit(main(*SETTINGS, STOP))
