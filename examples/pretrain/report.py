"""What a run says: a progress bar, TensorBoard, JSON lines, and the table that compares two runs."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

# Dense bf16 FLOP/s of one device, by what its name contains; the first match counts.
_PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "H20 ": 148, "H200": 989, "H100 PCIe": 756, "H100": 989, "H800": 989,
    "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "A40": 150, "A10": 125, "4090": 165, "V100": 125,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Record:
    """One iteration."""

    iteration: int
    loss: float
    lr: float
    grad_norm: float | None
    step_ms: float
    tokens_per_second: float
    mfu: float | None
    memory_bytes: int | None  # device: the most allocated so far on any rank; CPU: activation bytes
    activation_bytes: int | None
    skipped: bool = False
    mtp_loss: float | None = None  # multi-token prediction: the mean over the depths


@dataclass
class History:
    """What a finished run leaves behind."""

    name: str
    records: list[Record] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    interrupted: bool = False

    def median(self, what: str) -> float:
        """The median over the iterations after the first two, which warm up."""
        values = [getattr(record, what) for record in self.records[2:] or self.records]
        return statistics.median(values) if values else float("nan")

    def summary(self) -> dict[str, Any]:
        """The last line of the JSON file."""
        last = self.records[-1] if self.records else None
        return {
            "summary": self.name,
            "iterations": last.iteration if last else 0,
            "loss": last.loss if last else None,
            "validation": self.validation,
            "median_step_ms": self.median("step_ms"),
            "median_tokens_per_second": self.median("tokens_per_second"),
            "memory_bytes": _most(self.records, "memory_bytes"),
            "activation_bytes": _most(self.records, "activation_bytes"),
            "interrupted": self.interrupted,
        }


def _most(records: list[Record], what: str) -> int | None:
    return max((value for record in records if (value := getattr(record, what)) is not None), default=None)


def flops_per_sample(args: argparse.Namespace) -> float:
    """Model FLOPs of one sequence, forward and backward: causal attention, nothing counted twice for recomputation."""
    s, h = args.seq_length, args.hidden_size
    q, kv = h, h // args.num_attention_heads * args.kv_heads
    dense = (3 if args.swiglu else 2) * 2 * h * args.ffn_hidden_size
    depths = args.mtp_num_layers or 0  # each another layer, behind a projection of twice the hidden size, and its loss
    layers, experts = args.num_layers + depths, 0
    if args.num_experts is not None:
        last_has = (args.num_layers - 1) % args.moe_layer_freq == 0
        experts = -(-args.num_layers // args.moe_layer_freq) + (depths if last_has else 0)
    mlp = dense * (layers - experts + experts * args.moe_router_topk)
    attention = layers * (2 * h * (q + 2 * kv) + 2 * q * h + 2 * s * q)
    return 3.0 * s * (attention + mlp + depths * 4 * h * h) + 6.0 * s * h * args.padded_vocab_size * (1 + depths)


def peak_flops(args: argparse.Namespace) -> float | None:
    """FLOP/s of one device, if it is known."""
    if args.peak_tflops is not None:
        return float(args.peak_tflops) * 1e12
    if args.on_cpu or not args.bf16:
        return None
    name = f"{torch.cuda.get_device_name()} "
    return next((tflops * 1e12 for part, tflops in _PEAK_TFLOPS.items() if part in name), None)


def human(size: float | None) -> str:
    """Bytes with a binary unit."""
    if size is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


class Reporter:
    """Rank 0's view of a run. On other ranks every method does nothing."""

    def __init__(self, args: argparse.Namespace, name: str, *, is_main: bool) -> None:
        self._args, self._name, self._is_main = args, name, is_main
        self.history = History(name)
        self._tty = is_main and sys.stdout.isatty()
        self._json: TextIO | None = None
        self._board: Any = None
        if is_main and args.log_json is not None:
            args.log_json.parent.mkdir(parents=True, exist_ok=True)
            fresh = args.load is None and name != "megamem"
            self._json = Path(args.log_json).open("w" if fresh else "a", encoding="utf-8")  # noqa: SIM115 - see close()
        if is_main and args.tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(args.tensorboard_dir / name if args.compare else args.tensorboard_dir))

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._is_main:
            print(("\r\x1b[K" if self._tty else "") + text, flush=True)

    def iteration(self, record: Record) -> None:
        """Show, log and keep one iteration."""
        self.history.records.append(record)
        if not self._is_main:
            return
        self._write({"run": self._name, **asdict(record)})
        if self._board is not None:
            for key, value in asdict(record).items():
                if key not in ("iteration", "skipped") and value is not None:
                    self._board.add_scalar(f"train/{key}", value, record.iteration)
        total = self._args.train_iters
        text = self._line(record)
        if self._tty:
            done = record.iteration * 20 // total
            print(f"\r\x1b[K[{'#' * done}{'.' * (20 - done)}] {text}", end="", flush=True)
            if record.iteration == total:
                print()
        elif record.iteration % self._args.log_interval == 0 or record.iteration == total:
            print(text, flush=True)

    def _line(self, record: Record) -> str:
        mfu = "-" if record.mfu is None else f"{100 * record.mfu:.1f}%"
        memory = record.memory_bytes if record.memory_bytes is not None else record.activation_bytes
        kind = "memory" if record.memory_bytes is not None else "activations"
        norm = "-" if record.grad_norm is None else f"{record.grad_norm:.3f}"
        prediction = "" if record.mtp_loss is None else f" | MTP loss {record.mtp_loss:.4f}"
        return (
            f"{self._name} {record.iteration:>{len(str(self._args.train_iters))}}/{self._args.train_iters}"
            f" | loss {record.loss:.4f}{prediction} | lr {record.lr:.2e} | grad norm {norm} | {record.step_ms:.0f} ms"
            f" | {record.tokens_per_second:,.0f} tokens/s | MFU {mfu} | {kind} {human(memory)}"
            + (" | step skipped" if record.skipped else "")
        )

    def validation(self, iteration: int, loss: float) -> None:
        """Show, log and keep an evaluation."""
        self.history.validation.append((iteration, loss))
        self.say(f"{self._name} {iteration}: validation loss {loss:.4f}")
        self._write({"run": self._name, "iteration": iteration, "validation_loss": loss})
        if self._board is not None:
            self._board.add_scalar("validation/loss", loss, iteration)

    def _write(self, record: dict[str, Any]) -> None:
        if self._json is not None:
            print(json.dumps(record), file=self._json, flush=True)

    def close(self) -> None:
        """Write the summary and close the files."""
        self._write(self.history.summary())
        if self._tty:
            print()
        for file in (self._json, self._board):
            if file is not None:
                file.close()


def comparison(stock: History, ours: History, tolerance: float) -> tuple[str, bool]:
    """The two runs side by side, and whether their losses agree within `tolerance`, relative."""
    lines = ["", f"{'iteration':>9} | {'stock loss':>12} | {'megamem loss':>12} | {'difference':>10}"]
    worst, bitwise = 0.0, len(stock.records) == len(ours.records)
    for left, right in zip(stock.records, ours.records, strict=False):
        difference = abs(left.loss - right.loss)
        # `not <=` so that a NaN counts as worst
        worst = difference if not difference <= worst else worst
        bitwise = bitwise and left.loss == right.loss
        lines.append(f"{left.iteration:>9} | {left.loss:12.6f} | {right.loss:12.6f} | {difference:10.1e}")
    scale = max((abs(record.loss) for record in stock.records), default=1.0)
    agree = worst <= tolerance * scale and len(stock.records) == len(ours.records)
    verdict = "bitwise equal" if bitwise else f"max difference {worst:.1e} (allowed {tolerance * scale:.1e})"
    lines += ["", f"{'':24} {'stock':>14} {'megamem':>14}   megamem / stock"]
    for label, what in (("activations, peak", "activation_bytes"), ("device memory, peak", "memory_bytes")):
        left, right = _most(stock.records, what), _most(ours.records, what)
        if left and right is not None:
            lines.append(f"{label:24} {human(left):>14} {human(right):>14}   {right / left:.2f}")
    for label, what in (("step, median ms", "step_ms"), ("tokens/s, median", "tokens_per_second")):
        a, b = stock.median(what), ours.median(what)
        lines.append(f"{label:24} {a:14,.1f} {b:14,.1f}   {b / a:.2f}")
    lines.append(f"{'losses':24} {verdict}" + ("" if agree else "   <-- THEY DIFFER"))
    return "\n".join(lines), agree
