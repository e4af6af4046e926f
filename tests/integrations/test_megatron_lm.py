"""Megatron-LM's own pretrain_gpt.py, from an unmodified checkout, on CPU ranks.

    git clone --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM && export MEGATRON_LM=$PWD/Megatron-LM

The tag is to be the release of Megatron-Core that is installed. ci/matrix.sh does this for every release.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

import megamem.patches

ROOT = Path(__file__).resolve().parents[2]
PATCHES = Path(megamem.patches.__file__).parent / "megatron_lm"
FLAGS = """
--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
--micro-batch-size 2 --global-batch-size 8 --train-iters 2 --lr 1e-3 --min-lr 1e-4 --lr-decay-style constant
--mock-data --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 8
--distributed-backend gloo --transformer-impl local --use-cpu-initialization --no-gradient-accumulation-fusion
--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-persist-layer-norm --no-rope-fusion
--position-embedding-type rope --normalization RMSNorm --disable-bias-linear --hidden-dropout 0 --attention-dropout 0
--untie-embeddings-and-output-weights --eval-iters 1 --eval-interval 100 --log-interval 1 --num-workers 0
--pipeline-model-parallel-size 2
"""
MODEL = FLAGS.split()
STAGES = ["--num-virtual-stages-per-pipeline-rank", "2"]
MEMO = ["--megamem-activations-policy", "memo", "--megamem-activations-keep-last-layers", "0"]


@pytest.fixture(scope="module")
def checkout() -> Path:
    named = os.environ.get("MEGATRON_LM")
    if not named:
        pytest.skip("MEGATRON_LM names no checkout of Megatron-LM; see this file")
    if missing := [name for name in ("six", "regex", "einops", "pydantic") if find_spec(name) is None]:
        pytest.skip(f"Megatron-LM needs {', '.join(missing)}: pip install 'megamem[megatron-lm]'")
    return Path(named)


def run(
    checkout: Path,
    folder: Path,
    *arguments: str,
    ranks: int = 2,
    script: Path | None = None,
    command: tuple[str, ...] = ("run", "--cpu"),
) -> str:
    """What `megamem run pretrain_gpt.py` (another `command`) prints, or a `script` on the rig alone; it ends well."""
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    run = ["-m", "megamem", *command, str(checkout / "pretrain_gpt.py")]
    words = [*launcher, str(ranks), *(run if script is None else ["-m", "megamem.testing", str(script)])]
    path = [str(ROOT), *([str(checkout)] if script is not None else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(path)}
    done = subprocess.run(
        [*words, *arguments], env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


def losses(output: str) -> list[str]:
    found = re.findall(r"(?:lm loss|lm loss value): ([0-9.E+-]+)", output)
    assert len(found) == 4, output[-4000:]  # two iterations, validation and test
    return found


@pytest.mark.slow
@pytest.mark.megatron
class TestAnUnmodifiedCheckout:
    def test_trains_to_the_same_losses_with_everything_on(self, checkout: Path, tmp_path: Path) -> None:
        stock = run(checkout, tmp_path, *MODEL)
        ours = run(checkout, tmp_path, *MODEL, *MEMO, "--megamem-schedule-name", "zb-h1")
        assert losses(ours) == losses(stock)
        assert "nothing was switched on" in stock and "is on, with" not in stock
        assert "is on, with megatron-core" in ours and "bubble 7.7 %" in ours and "what it did on rank 0" in ours

    def test_a_v_placement_trains_dense_layers_and_experts(self, checkout: Path, tmp_path: Path) -> None:
        experts = ["--num-experts", "2", "--moe-layer-freq", "([0,1,1,0])", "--moe-token-dispatcher-type", "allgather"]
        on = ["--megamem-schedule-name", "zb-v"]
        for kind in ([], experts):
            output = run(checkout, tmp_path, *MODEL, *STAGES, *kind, *on)
            assert "zb-v" in output
            first, second, *_ = map(float, losses(output))
            assert second < first < 5.1

    def test_three_commands_lead_from_a_launch_line_to_its_plan_to_the_same_losses(
        self, checkout: Path, tmp_path: Path
    ) -> None:
        profile, plan = str(tmp_path / "profile.json"), str(tmp_path / "plan.yaml")
        longer = ["9" if before == "--train-iters" else word for before, word in pairwise(["", *MODEL])]
        measured = run(checkout, tmp_path, *longer, command=("profile", "--cpu", "--output", profile, "--script"))
        assert "a step:" in measured and "written to" in measured and "iteration        5/" not in measured
        asked = ["--schedule", "zb-h1", "-o", plan]
        made = [sys.executable, "-m", "megamem", "plan", "--from-profile", profile, *asked]
        done = subprocess.run(made, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0 and "as it ran, without megamem" in done.stdout, done.stderr
        stock, ours = run(checkout, tmp_path, *MODEL), run(checkout, tmp_path, *MODEL, "--megamem", plan)
        assert losses(ours) == losses(stock)
        assert "The plan predicts" in ours and "plan: predicted and measured" in ours

    def test_help_has_a_group_of_ours(self, checkout: Path, tmp_path: Path) -> None:
        try:
            theirs = run(checkout, tmp_path, "--help", ranks=1, script=checkout / "pretrain_gpt.py")
        except AssertionError as error:
            pytest.skip(f"Megatron-LM's own --help is broken in this release: {str(error)[-80:]}")
        ours = run(checkout, tmp_path, "--help", ranks=1)
        assert "megamem" not in theirs and "\nmegamem:\n" in ours and "--megamem-schedule-name" in ours

    def test_the_patch_file_gives_pretrain_gpt_the_flags(self, checkout: Path, tmp_path: Path) -> None:
        for name in ("pretrain_gpt.py", "gpt_builders.py", "model_provider.py"):
            shutil.copy(checkout / name, tmp_path)
        fitting = [file for file in sorted(PATCHES.glob("*.patch")) if applies(file, tmp_path)]
        assert fitting, "no patch file fits this checkout"
        subprocess.run(["git", "apply", str(fitting[0])], cwd=tmp_path, check=True)
        output = run(checkout, tmp_path, *MODEL, *MEMO, script=tmp_path / "pretrain_gpt.py")
        assert "--megamem-activations-policy" in output and "swapped to host memory, per step" in output


def applies(patch: Path, folder: Path) -> bool:
    command = ["git", "apply", "--check", str(patch)]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0


def test_patch_files_add_two_lines() -> None:
    files = sorted(PATCHES.glob("*.patch"))
    assert len(files) == 2
    for file in files:
        body = file.read_text(encoding="utf-8").partition("+++ b/pretrain_gpt.py\n")[2].splitlines()
        assert [line for line in body if line.startswith(("+", "-"))] == [
            "+from megamem.integrations import megatron_lm",
            "+megatron_lm.install()",
        ]
