"""Whole jobs on several GPUs, with NCCL between them: what CPU ranks with gloo cannot show.

Each trains twice from the same weights, stock and with megamem, and ends with status 1 if the losses differ. The same
jobs run by hand on CPU ranks with `--device cpu` in place of `--device cuda --bf16`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
LONG = 600  # against hanging; measures nothing

SMALL = (
    "--hidden-size 256 --num-attention-heads 4 --seq-length 256 --num-layers 8 --global-batch-size 8 --train-iters 4"
    " --swiglu --normalization RMSNorm --disable-bias-linear --compare"
)
PIPELINE = "--pipeline-model-parallel-size 2"
TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"
MEMO = "--megamem-activations-policy memo --megamem-activations-keep-last-layers 0"

JOBS = [
    pytest.param(2, f"{PIPELINE} {MEMO} --megamem-schedule-name zb-h1", marks=pytest.mark.gpus(2), id="pp2, zb-h1"),
    pytest.param(2, f"{TENSOR} {MEMO}", marks=pytest.mark.gpus(2), id="tp2, memo"),
    pytest.param(
        # In bfloat16, where the loss is summed in shards.
        *(2, f"{PIPELINE} --megamem-vocabulary-parallel true --megamem-allocator-mode static --compare-tolerance 1e-3"),
        marks=pytest.mark.gpus(2),
        id="pp2, vocabulary, static",
    ),
    pytest.param(
        *(4, f"{PIPELINE} {TENSOR} --num-virtual-stages-per-pipeline-rank 2 --megamem-schedule-name v-half {MEMO}"),
        marks=pytest.mark.gpus(4),
        id="tp2 pp2, v-half",
    ),
    pytest.param(
        *(8, f"{PIPELINE} {TENSOR} --use-distributed-optimizer --megamem-schedule-name zb-h1 {MEMO}"),
        marks=pytest.mark.gpus(8),
        id="tp2 pp2 dp2, zb-h1",
    ),
]


@pytest.mark.megatron
@pytest.mark.parametrize(("ranks", "flags"), JOBS)
def test_trains_to_the_losses_of_stock_megatron(ranks: int, flags: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "megamem", tmp_path / "text", ignore=shutil.ignore_patterns("__pycache__"))
    data = ["--data-text", str(tmp_path / "text"), "--data-cache-path", str(tmp_path / "cache")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(EXAMPLES / "pretrain_gpt.py"), "--device", "cuda", "--bf16", *data, *SMALL.split(), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "megamem 4/4 | loss" in done.stdout


@pytest.mark.parametrize(("ranks", "flags"), [pytest.param(*job.values, id=job.id) for job in JOBS])
def test_the_flags_go_together(
    ranks: int, flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here and now, not first on a machine with eight GPUs."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    from pretrain.arguments import parse

    args: Any
    args, config = parse(["--data-text", str(tmp_path), *SMALL.split(), *flags.split()])
    assert config.enabled and args.world_size == ranks
