"""`megamem profile --allocations`: traces of real Megatron-Core models, with fake tensors and for real."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megamem.cli import main
from megamem.ir.allocation import read_problem
from megamem.ir.allocation_trace import AllocationTrace, read_trace
from megamem.planner.allocation.solvers import make_solver

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
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "requests, at most" in done.stdout


@pytest.mark.slow
def test_fake_and_real_steps_agree(tmp_path: Path) -> None:
    fake, real = trace(tmp_path / "fake"), trace(tmp_path / "real", "--allocations-from", "step")
    everything = [phase.label for phase in fake.phases if phase.label]
    assert everything == [phase.label for phase in real.phases if phase.label]
    assert {"embedding forward, microbatch 0", "output layer backward, microbatch 1"} <= set(everything)
    labels = [label for label in everything if label.startswith("layer")]
    assert labels[:3] == [f"layer {layer} forward, microbatch 0" for layer in range(3)]
    assert len(set(labels)) == len(labels) == 3 * 2 * 2
    assert len(real) >= len(fake)  # an operator's own scratch
    assert fake.peak_live() == pytest.approx(real.peak_live(), rel=0.01)


@pytest.mark.slow
def test_the_activation_engine_takes_fake_tensors_for_real_ones(tmp_path: Path) -> None:
    """It looks at values and addresses, which they do not have: what it keeps must be what it keeps of real ones."""
    size = ("--num-layers", "6", "--seq-length", "256")
    engine = ("--megamem", configured(tmp_path, "activations: {policy: memo, swap_fraction: 0.5, host_memory: 1GiB}"))
    stock, fake = trace(tmp_path / "stock", *size), trace(tmp_path / "fake", *size, *engine)
    real = trace(tmp_path / "real", *size, *engine, "--allocations-from", "step")
    assert fake.peak_live() == pytest.approx(real.peak_live(), rel=0.01)
    assert fake.peak_live() < 0.8 * stock.peak_live()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_pipeline_rank_with_schedule_and_engine(tmp_path: Path, rank: int) -> None:
    both = "schedule: {name: gis}\n  activations: {policy: memo, swap_fraction: 0.5}"
    found = trace(
        tmp_path / "trace", "--num-layers", "8", "--num-microbatches", "4", "--pipeline-model-parallel-size", "2",
        "--pipeline-rank", str(rank), "--megamem", configured(tmp_path, both),
    )  # fmt: skip
    labels = {phase.label for phase in found.phases}
    mine = (0, 1, 4, 5) if rank == 0 else (2, 3, 6, 7)  # two chunks of two layers
    passes = {(place.layer, place.part, place.microbatch) for place in found.places() if place.layer is not None}
    assert passes == {(layer, part, batch) for layer in mine for part in ("forward", "backward") for batch in range(4)}
    assert ("embedding forward, microbatch 3" in labels) == (rank == 0)
    assert ("output layer backward, microbatch 3" in labels) == (rank == 1)
    outcome = make_solver("greedy").solve(found.problem())  # which validates it
    assert found.peak_live() <= outcome.lower_bound < 1.005 * found.peak_live()  # sizes of a problem are rounded up
    assert outcome.gap < 0.02


def configured(folder: Path, sections: str) -> str:
    path = folder / "megamem.yaml"
    path.write_text(f"megamem:\n  {sections}\n")
    return str(path)


@pytest.mark.slow
def test_a_large_model_on_ranks_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    size = f"--hidden-size 8192 --num-attention-heads 64 --seq-length {1 << 20} --micro-batch-size 1".split()
    run(path, *size, "--num-layers", "2", "--num-microbatches", "1", "--tensor-model-parallel-size", "8",
        "--sequence-parallel", "--bf16", "--recompute-granularity", "full")  # fmt: skip
    problem = read_problem(path)
    groups = {buffer.group for buffer in problem.buffers}
    assert {"layer 0 backward, microbatch 0", "layer 1 backward, microbatch 0", "optimizer"} <= groups
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
