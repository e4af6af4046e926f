"""The training loop: steps, evaluation, checkpoints, and an orderly end when interrupted."""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import time
from collections.abc import Iterator
from functools import partial
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from pretrain.checkpoint import Checkpoints
from pretrain.data import Batch, microbatches
from pretrain.model import Training
from pretrain.report import History, Record, Reporter, flops_per_sample, peak_flops


class Meter(Protocol):
    """Counts the bytes of activations held between forward and backward."""

    @property
    def peak_bytes(self) -> int:
        """The most so far."""


class Interrupt:
    """Turns the first SIGINT or SIGTERM into a wish that the loop grants after the step; the second one kills."""

    def __init__(self) -> None:
        self.wished = False
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.wished = True
        signal.signal(number, self._before[number])

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _loss(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """What Megatron's schedules want of a loss function: sum, number of tokens, and something to report."""
    mask = mask.reshape(-1).float()
    total = (losses.reshape(-1).float() * mask).sum()
    tokens = mask.sum()
    return total, tokens.to(torch.int), {"loss": torch.stack([total.detach(), tokens]).double()}


def _forward(iterator: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
    """One microbatch through this rank's part of the model. No attention mask: the attention is causal by itself."""
    batch = next(iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(_loss, batch["loss_mask"])


def _run_schedule(
    args: argparse.Namespace, training: Training, dataset: Any, consumed: int, *, train: bool
) -> torch.Tensor:
    """All microbatches of a global batch, forward and, to train, backward: (sum of losses, tokens) of this rank."""
    iterators = [microbatches(dataset, args, consumed) for _ in training.chunks]
    reports = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=training.chunks,
        num_microbatches=args.num_microbatches,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.seq_length,
        forward_only=not train,
    )
    device = "cpu" if args.on_cpu else "cuda"
    return sum((report["loss"] for report in reports), torch.zeros(2, dtype=torch.float64, device=device))


def _gather(args: argparse.Namespace, values: torch.Tensor) -> torch.Tensor:
    """The float64 vectors of all ranks, one row each, on the CPU. The one collective that reporting needs."""
    rows = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, values)
    return torch.stack(rows).cpu()


def _mean_loss(rows: torch.Tensor) -> float:
    """Only ranks of the last pipeline stage count tokens; tensor-parallel copies weigh sum and count alike."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def _prediction_loss(args: argparse.Namespace) -> list[float]:
    """The mean loss of multi-token prediction over depths and microbatches, and 1; zeros on ranks without it."""
    if args.mtp_num_layers is None:
        return []
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    found: dict[str, torch.Tensor] = {}
    MTPLossLoggingHelper.track_mtp_metrics(1 / args.num_microbatches, 0, None, total_loss_dict=found)
    MTPLossLoggingHelper.tracker.clear()  # the next run of this process may have its last stage on another rank
    losses = [float(value) for name, value in found.items() if name.endswith("loss")]
    return [statistics.fmean(losses), 1.0] if losses else [0.0, 0.0]


def _sync(args: argparse.Namespace) -> None:
    if not args.on_cpu:
        torch.cuda.synchronize()


def _step(
    args: argparse.Namespace, training: Training, dataset: Any, meter: Meter | None, interrupt: Interrupt
) -> tuple[Record, bool]:
    """One optimizer step; the record of it, and whether any rank was asked to stop."""
    _sync(args)
    start = time.perf_counter()
    for chunk in training.chunks:
        chunk.zero_grad_buffer()
    training.optimizer.zero_grad()
    loss = _run_schedule(args, training, dataset, training.consumed, train=True)
    lr = max(group["lr"] for group in training.optimizer.param_groups)
    updated, grad_norm, _ = training.optimizer.step()
    if updated:
        training.scheduler.step(increment=args.global_batch_size)
    training.iteration += 1
    training.consumed += args.global_batch_size
    _sync(args)
    seconds = time.perf_counter() - start
    memory = 0 if args.on_cpu else torch.cuda.max_memory_allocated()
    extra = [float(interrupt.wished), seconds, memory, 0 if meter is None else meter.peak_bytes]
    extra += _prediction_loss(args)
    rows = _gather(args, torch.cat([loss, torch.tensor(extra, dtype=torch.float64, device=loss.device)]))
    seconds = float(rows[:, 3].max())
    peak = peak_flops(args)
    samples = args.global_batch_size / seconds
    record = Record(
        iteration=training.iteration,
        loss=_mean_loss(rows),
        lr=lr,
        grad_norm=None if grad_norm is None else float(grad_norm),
        step_ms=1e3 * seconds,
        tokens_per_second=samples * args.seq_length,
        mfu=None if peak is None else samples * flops_per_sample(args) / (peak * args.world_size),
        memory_bytes=None if args.on_cpu else int(rows[:, 4].max()),
        activation_bytes=None if meter is None else int(rows[:, 5].max()),
        skipped=not updated,
        mtp_loss=float(rows[:, 6].sum() / rows[:, 7].sum()) if args.mtp_num_layers else None,
    )
    return record, bool(rows[:, 2].any())


def evaluate(args: argparse.Namespace, training: Training, dataset: Any) -> float:
    """The mean loss over the first `--eval-iters` global batches of the validation data, the same ones every time."""
    for chunk in training.chunks:
        chunk.eval()
    with torch.no_grad():
        batches = range(0, args.eval_iters * args.global_batch_size, args.global_batch_size)
        losses = [_run_schedule(args, training, dataset, consumed, train=False) for consumed in batches]
    for chunk in training.chunks:
        chunk.train()
    return _mean_loss(_gather(args, torch.stack(losses).sum(0)))


def _due(interval: int | None, iteration: int) -> bool:
    return interval is not None and iteration % interval == 0


# What gloo, NCCL and PyTorch's store say when another rank is gone or hangs.
_LOST_PEER = ("peer", "timed out", "timeout", "connection", "socket", "broken pipe", "nccl")


@contextlib.contextmanager
def _explaining(args: argparse.Namespace, training: Training) -> Iterator[None]:
    """A failed collective says nothing about where the run was, nor that the fault is another rank's; this does."""
    try:
        yield
    except RuntimeError as error:
        where = f"rank {dist.get_rank()}, iteration {training.iteration + 1}"
        first = str(error).partition("\n")[0]
        if any(word in first.lower() for word in _LOST_PEER):
            again = f"start again with --load {args.save}" if args.save else "start again"
            text = (
                f"pretrain_gpt.py: error: {where}: another rank ended or hangs, see its own message; {again} ({first})"
            )
            raise SystemExit(text) from error
        error.add_note(where)
        raise


def train(
    args: argparse.Namespace,
    training: Training,
    datasets: tuple[Any, Any],
    reporter: Reporter,
    meter: Meter | None = None,
) -> History:
    """Train to `--train-iters`, or until interrupted."""
    train_data, valid_data = datasets
    checkpoints = Checkpoints(args)
    if args.load is not None:
        reporter.say(checkpoints.load(training))
    for chunk in training.chunks:
        chunk.train()
    stop = False
    evaluated = None
    with Interrupt() as interrupt, _explaining(args, training):
        while training.iteration < args.train_iters and not stop:
            record, stop = _step(args, training, train_data, meter, interrupt)
            reporter.iteration(record)
            checkpoints.finish(blocking=False)
            if _due(args.eval_interval, training.iteration):
                evaluated = training.iteration
                reporter.validation(training.iteration, evaluate(args, training, valid_data))
            if _due(args.save_interval, training.iteration):
                checkpoints.save(training)
        if args.eval_iters and not stop and evaluated != training.iteration:
            reporter.validation(training.iteration, evaluate(args, training, valid_data))
        if args.save is not None:
            checkpoints.save(training)
            reporter.say(f"saved iteration {training.iteration} in {args.save}")
        checkpoints.close()
    reporter.history.interrupted = stop
    return reporter.history
