"""`megamem profile --allocations`: traces of real Megatron-Core models, with fake tensors and for real."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megamem.cli import main
from megamem.ir.allocation import read_problem
from megamem.ir.allocation_trace import AllocationTrace, read_trace

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

MODEL = "--num-layers 3 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 2 --vocab-size 128"
FLAGS = f"{MODEL} --swiglu --normalization RMSNorm --disable-bias-linear --num-microbatches 2".split()


def trace(path: Path, *more: str) -> AllocationTrace:
    """By the command, in a process of its own: it makes process groups."""
    run(path, *more)
    return read_trace(path)


def run(path: Path, *more: str) -> None:
    command = [sys.executable, "-m", "megamem", "profile", *FLAGS, "--allocations", str(path), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "requests, at most" in done.stdout


@pytest.mark.slow
def test_fake_and_real_steps_agree(tmp_path: Path) -> None:
    fake, real = trace(tmp_path / "fake"), trace(tmp_path / "real", "--allocations-from", "step")
    labels = [phase.label for phase in fake.phases if phase.label]
    assert labels == [phase.label for phase in real.phases if phase.label]
    assert labels[:3] == [f"layer {layer} forward, microbatch 0" for layer in range(3)]
    assert len(set(labels)) == len(labels) == 3 * 2 * 2
    assert len(real) >= len(fake)  # an operator's own scratch
    assert fake.peak_live() == pytest.approx(real.peak_live(), rel=0.01)


@pytest.mark.slow
def test_a_large_model_on_ranks_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    size = f"--hidden-size 8192 --num-attention-heads 64 --seq-length {1 << 20} --micro-batch-size 1".split()
    run(path, *size, "--num-layers", "2", "--num-microbatches", "1", "--tensor-model-parallel-size", "8",
        "--sequence-parallel", "--bf16", "--recompute-granularity", "full")  # fmt: skip
    problem = read_problem(path)
    groups = {buffer.group for buffer in problem.buffers}
    assert {"layer 0 backward, microbatch 0", "layer 1 backward, microbatch 0"} <= groups
    # A layer's input of this rank, s h / 8 elements of 2 bytes, is what recomputation keeps.
    kept = (1 << 20) * 8192 * 2 // 8
    assert sum(buffer.size == kept for buffer in problem.buffers) >= 2


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "give either --output, the costs file to write, or --allocations, the trace"),
        (["--allocations", "nowhere/t"], "there is no folder nowhere"),
        (["--allocations", "t", "--num-microbatches", "0"], "--num-microbatches must be at least 1"),
    ],
)
def test_mistakes_are_told_first(flags: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *FLAGS, *flags]) == 2
    assert text in capsys.readouterr().err
