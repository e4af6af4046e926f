"""The examples: whole jobs on tiny sizes, some of them under torchrun, as a user runs them.

One run is trained to the end (`reference`); the other cases start from its checkpoints or are compared with its losses.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megamem.testing.dist import run_ranks

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SCRIPT = str(EXAMPLES / "pretrain_gpt.py")
LONG = 300  # against hanging; measures nothing

slow = [pytest.mark.slow, pytest.mark.megatron]


def environment(**more: str) -> dict[str, str]:
    """One thread a rank, no GPU, and the package of this checkout."""
    base = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **base, **more}


def launch(ranks: int, *flags: object, through: tuple[str, ...] = ()) -> str:
    """Run the main job with torchrun, `through` another command; its output. Fails with that unless it ends well."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, *through, SCRIPT, *map(str, flags)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LONG, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    return output


def run(ranks: int, *flags: object, status: int = 0) -> str:
    """The same on new ranks that have loaded Megatron already, which saves most of the time that such jobs take.

    It is to end with `status` on every rank.
    """
    results = run_ranks(job, ranks, *map(str, flags), timeout=LONG)
    output = "".join(text for _, text in results)
    assert {code for code, _ in results} == {status}, output[-4000:]
    return output


def job(*flags: str) -> tuple[int, str]:
    """The script as `__main__`, on this rank: its exit status, and what it printed."""
    sys.argv = [SCRIPT, *flags]
    sys.path.insert(0, str(EXAMPLES))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            runpy.run_path(SCRIPT, run_name="__main__")
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code)
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        else:
            status = 0
    return status, printed.getvalue()


def records(log: Path) -> dict[int, dict[str, Any]]:
    """The iterations of a JSON log: what has to be the same in a resumed run."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {
        line["iteration"]: {key: line[key] for key in ("loss", "grad_norm", "lr")}
        for line in lines
        if "loss" in line and "iteration" in line
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text corpus of this repository's own sources, and room for logs and checkpoints."""
    base = tmp_path_factory.mktemp("examples")
    shutil.copytree(ROOT / "megamem", base / "text", ignore=shutil.ignore_patterns("__pycache__"))
    return base


@pytest.fixture(scope="module")
def small(folder: Path) -> list[object]:
    """Data and a model that trains in milliseconds."""
    data = ["--data-text", folder / "text", "--data-cache-path", folder / "cache"]
    return [*data, "--hidden-size", 32, "--num-attention-heads", 4, "--seq-length", 64, "--global-batch-size", 4]


TENSOR = ["--tensor-model-parallel-size", 2, "--sequence-parallel", "--group-query-attention", "--num-query-groups", 2]
LLAMA = ["--num-layers", 2, "--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear", "--train-iters", 6]
# Dropout makes the resumed run depend on the restored random numbers.
REFERENCE = [*TENSOR, *LLAMA, "--hidden-dropout", 0.1, "--use-distributed-optimizer", "--eval-iters", 1]


@pytest.fixture(scope="module")
def reference(folder: Path, small: list[object]) -> tuple[dict[int, dict[str, Any]], str]:
    """Six iterations on two tensor-parallel ranks, with checkpoints of 3 and 6 written asynchronously."""
    flags = ["--save", folder / "checkpoints", "--save-interval", 3, "--async-save", "--eval-interval", 3]
    logs = ["--log-json", folder / "reference.jsonl", "--tensorboard-dir", folder / "tensorboard"]
    output = launch(2, *small, *REFERENCE, *flags, *logs)
    return records(folder / "reference.jsonl"), output


class TestMainJob:
    pytestmark = slow

    def test_trains_evaluates_and_logs(self, folder: Path, reference: tuple[dict[int, dict[str, Any]], str]) -> None:
        iterations, output = reference
        assert sorted(iterations) == [1, 2, 3, 4, 5, 6]
        assert iterations[6]["loss"] < iterations[1]["loss"] < 6.5
        assert output.count("validation loss") == 2
        assert "tokens/s" in output and "MFU -" in output
        assert list((folder / "tensorboard").glob("events.*"))
        summary = json.loads((folder / "reference.jsonl").read_text().splitlines()[-1])
        assert summary["summary"] == "stock" and summary["iterations"] == 6
        assert summary["activation_bytes"] > 0 and not summary["interrupted"]

    def test_resumes_with_megamem_on_to_the_same_bits(
        self, folder: Path, small: list[object], reference: tuple[dict[int, dict[str, Any]], str]
    ) -> None:
        (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3\n")
        on = ["--megamem", EXAMPLES / "recipes/memo.yaml", "--megamem-activations-keep-last-layers", 0]
        log = ["--load", folder / "checkpoints", "--log-json", folder / "resumed.jsonl"]
        output = run(2, *small, *REFERENCE, *log, *on)
        assert "resumed from iteration 3" in output
        assert "swapped to host memory" in output
        assert records(folder / "resumed.jsonl") == {number: reference[0][number] for number in (4, 5, 6)}

    def test_under_megamem_run_it_sees_no_flag_and_a_v_placement_needs_nothing_of_it(self, small: list[object]) -> None:
        stages = ["--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2, "--num-layers", 4]
        on = ["--megamem-schedule-name", "v-half", "--megamem-vocabulary-fused-loss", "true"]
        output = launch(2, *small, *stages, "--train-iters", 2, *on, through=("-m", "megamem", "run"))
        assert "name: v-half" in output and "fused_loss: true" in output and "stock 2/2 | loss" in output
        assert "what it did on rank 0" in output and "2 ranks x 2 chunks (v), 4 microbatches" in output

    def test_checkpoint_of_another_model_is_refused_by_name(
        self, folder: Path, small: list[object], reference: tuple[dict[int, dict[str, Any]], str]
    ) -> None:
        output = run(1, *small, *LLAMA, "--num-layers", 3, "--load", folder / "checkpoints", status=1)
        assert "holds another model: --num-layers 2 there, 3 here" in output

    def test_compare_on_tensor_and_interleaved_pipeline_ranks_in_bf16(self, small: list[object]) -> None:
        stages = ["--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2, "--num-layers", 4]
        memo = ["--compare", "--megamem-activations-policy", "memo", "--megamem-activations-keep-last-layers", 0]
        output = run(4, *small, *LLAMA, *TENSOR, *stages, "--train-iters", 2, "--bf16", "--overlap-grad-reduce", *memo)
        assert "bitwise equal" in output
        assert "activations, peak" in output

    def test_a_memory_plan_changes_no_bit_and_says_what_it_served(self, small: list[object]) -> None:
        stages = ["--pipeline-model-parallel-size", 2, "--eval-interval", 2, "--eval-iters", 1]
        plan = ["--megamem-allocator-mode", "static", "--compare", "--compare-tolerance", 0]
        output = run(2, *small, *LLAMA, *stages, *plan)
        assert "bitwise equal" in output
        assert "planned peak, training, 4 microbatches of 1 x 64 tokens" in output
        served = output.partition("requests served from it")[2].splitlines()[0]
        assert float(served.partition("%), ")[2].partition("%")[0]) > 80, served

    def test_experts_over_two_ranks_resume(self, folder: Path, small: list[object]) -> None:
        experts = [*LLAMA, "--num-experts", 4, "--expert-model-parallel-size", 2, "--train-iters", 4]
        first = [*small, *experts, "--save", folder / "moe", "--save-interval", 2, "--log-json", folder / "moe.jsonl"]
        run(2, *first)
        (folder / "moe" / "latest_checkpointed_iteration.txt").write_text("2\n")
        run(2, *small, *experts, "--load", folder / "moe", "--log-json", folder / "moe2.jsonl")
        whole = records(folder / "moe.jsonl")
        assert records(folder / "moe2.jsonl") == {number: whole[number] for number in (3, 4)}


class TestEnding:
    pytestmark = slow

    @pytest.fixture
    def endless(self, folder: Path, small: list[object]) -> list[str]:
        flags = [*small, "--num-layers", 2, "--train-iters", 100000, "--distributed-timeout-minutes", 1]
        return [sys.executable, "-u", SCRIPT, *map(str, flags)]

    def test_interrupt_saves_and_exits(self, folder: Path, endless: list[str]) -> None:
        with started([*endless, "--save", str(folder / "stopped")]) as job:
            wait_for(job, "100000 | loss")
            job.send_signal(signal.SIGINT)
            output = job.communicate(timeout=60)[0]
        assert job.returncode == 130, output
        assert "saved iteration" in output
        assert (folder / "stopped" / "latest_checkpointed_iteration.txt").is_file()

    def test_when_one_rank_is_killed_the_other_says_so_and_ends(self, endless: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
        with started(endless, **ranks[0]) as survivor, started(endless, **ranks[1]) as victim:
            wait_for(survivor, "100000 | loss")
            victim.kill()
            start = time.monotonic()
            output = survivor.communicate(timeout=90)[0]
        assert time.monotonic() - start < 60
        assert survivor.returncode == 1
        assert "another rank ended or hangs" in output, output[-3000:]


class started:  # noqa: N801 - reads as a verb in `with started(...)`
    """A job that is certainly gone when the block ends."""

    def __init__(self, command: list[str], **more: str) -> None:
        self._command, self._environment = command, environment(**more)

    def __enter__(self) -> subprocess.Popen[str]:
        self._job = subprocess.Popen(
            self._command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return self._job

    def __exit__(self, *_: object) -> None:
        if self._job.poll() is None:
            self._job.kill()
        self._job.communicate()


def wait_for(job: subprocess.Popen[str], text: str) -> None:
    """Read the job's output until a line with `text`."""
    assert job.stdout is not None
    seen = []
    for line in job.stdout:
        seen.append(line)
        if text in line:
            return
    pytest.fail("the job ended early:\n" + "".join(seen[-40:]))


@pytest.mark.slow
@pytest.mark.megatron
def test_a_corpus_too_small_for_its_split_is_refused(tmp_path: Path) -> None:
    """Megatron would look for samples in the empty part for ever."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text("a single document")
    data = ["--data-text", tmp_path / "text", "--data-cache-path", tmp_path / "cache"]
    size = ["--num-layers", 1, "--hidden-size", 32, "--num-attention-heads", 2, "--seq-length", 16, "--train-iters", 1]
    output = run(1, *data, *size, status=1)
    assert "the corpus has 1 documents, and --split 95,5 leaves none for validation" in output


class TestPipelineSchedules:
    """The same training on four pipeline ranks, whatever the schedule and wherever it places the layers."""

    pytestmark = slow
    # Gradient clipping adds up squares rank by rank, so its last bits depend on which rank holds which layer.
    FLAGS = ("--pipeline-model-parallel-size", 4, "--num-layers", 8, "--clip-grad", 0, "--eval-iters", 1)

    def test_a_run_goes_on_under_another_schedule_to_the_same_bits(self, folder: Path, small: list[object]) -> None:
        save = folder / "pipeline"
        flags = [*small, "--global-batch-size", 8, *self.FLAGS, "--save", save, "--load", save]
        logs = {name: folder / f"{name}.jsonl" for name in ("stock", "gis-h", "v-half")}
        run(4, *flags, "--train-iters", 6, "--save-interval", 2, "--lr-decay-iters", 6, "--log-json", logs["stock"])
        expected = records(logs["stock"])
        for name, start in (("gis-h", 2), ("v-half", 4)):  # the second one resumes from what the first one saved
            (save / "latest_checkpointed_iteration.txt").write_text(f"{start}\n")
            until = ["--train-iters", start + 2, "--lr-decay-iters", 6]
            output = run(4, *flags, *until, "--megamem-schedule-name", name, "--log-json", logs[name])
            assert f"resumed from iteration {start}" in output and "schedule" in output and name in output
            found = records(logs[name])
            assert sorted(found) == [start + 1, start + 2]
            assert all(found[number]["loss"] == expected[number]["loss"] for number in found)
        # The last one also evaluates, at the same iteration as the stock run.
        losses = [line for log in ("stock", "v-half") for line in validations(logs[log])]
        assert len(losses) == 2 and losses[0] == losses[1]

    def test_auto_is_compared_with_stock(self, folder: Path, small: list[object]) -> None:
        auto = ["--megamem-schedule-name", "auto", "--megamem-schedule-memory-limit", 3, "--compare"]
        output = run(4, *small, "--global-batch-size", 8, *self.FLAGS, "--train-iters", 3, *auto)
        assert "(chosen for auto)" in output
        assert "bitwise equal" in output
        peaks = output.partition("predicted peak")[2].splitlines()[0].split(",")
        assert len(peaks) == 4 and max(map(float, peaks)) <= 3

    def test_stages_of_uneven_layers_are_trained_as_by_stock(self, small: list[object]) -> None:
        """Five layers and multi-token prediction in the four stages of a V on two ranks, with activations swapped."""
        uneven = ["--pipeline-model-parallel-size", 2, "--num-layers", 5, "--clip-grad", 0]
        uneven += ["--pipeline-model-parallel-layout", "Et|t*2|t|tmL", "--train-iters", 2]
        uneven += ["--mtp-num-layers", 1, "--untie-embeddings-and-output-weights"]
        on = ["--megamem-schedule-name", "v-half", "--megamem-activations-policy", "memo"]
        output = run(2, *small, *uneven, *on, "--compare")
        assert "2 ranks x 2 chunks (v)" in output and "bitwise equal" in output
        losses = re.findall(r"^(\w+) 2/2 .* MTP loss ([\d.]+)", output, re.MULTILINE)
        assert [name for name, _ in losses] == ["stock", "megamem"] and losses[0][1] == losses[1][1]

    def test_a_last_stage_without_layers_is_trained_as_by_stock(self, small: list[object]) -> None:
        """Multi-token prediction and the loss alone, as in DeepSeek-V3's recipe, with activations swapped."""
        bare = ["--pipeline-model-parallel-size", 2, "--num-layers", 2, "--clip-grad", 0, "--train-iters", 2]
        on = ["--megamem-schedule-name", "zb-h1", "--megamem-activations-policy", "memo", "--compare"]
        mtp = ["--mtp-num-layers", 1, "--untie-embeddings-and-output-weights"]
        for layout, more in (("Ett|L", []), ("Ett|mL", mtp)):
            output = run(2, *small, *bare, "--pipeline-model-parallel-layout", layout, *more, *on)
            assert "bitwise equal" in output


class TestVocabularyParallel:
    """Embeddings shared by all ranks, on and off, in any schedule and layout, through the same checkpoints."""

    pytestmark = slow
    WIDE = (*TENSOR, "--pipeline-model-parallel-size", 2)
    DEEP = ("--group-query-attention", "--num-query-groups", 2, "--pipeline-model-parallel-size", 4)

    def test_a_stock_run_goes_on_with_shared_embeddings(self, folder: Path, small: list[object]) -> None:
        save = folder / "vocabulary"
        model = ["--num-layers", 8, "--vocab-size", 512, "--global-batch-size", 8, "--lr-decay-iters", 6]
        flags = [*small, *model, "--eval-iters", 1, "--save", save, "--load", save, "--use-distributed-optimizer"]
        stock = folder / "vocabulary.jsonl"
        run(4, *flags, *self.WIDE, "--train-iters", 6, "--save-interval", 2, "--log-json", stock)
        (save / "latest_checkpointed_iteration.txt").write_text("2\n")
        expected = records(stock)
        on = ["--megamem-vocabulary-parallel", "true"]
        for start, until, name, layout in (
            (2, 3, "1f1b", self.WIDE),
            (3, 4, "gis-h", self.DEEP),
            (4, 6, "v-half", self.DEEP),
        ):
            log = folder / f"vocabulary-{name}.jsonl"
            schedule = [] if name == "1f1b" else ["--megamem-schedule-name", name]  # which it has where none is named
            output = run(4, *flags, *layout, *on, *schedule, "--train-iters", until, "--log-json", log)
            assert f"resumed from iteration {start}" in output and f"name: {name}" in output
            assert "words on this rank                         128 of 512" in output
            found = records(log)
            assert sorted(found) == [*range(start + 1, until + 1)]
            for number, record in found.items():
                assert record["loss"] == pytest.approx(expected[number]["loss"], rel=1e-5)
                assert record["grad_norm"] == pytest.approx(expected[number]["grad_norm"], rel=1e-3)
        assert validations(log) == pytest.approx(validations(stock), rel=1e-5)


MEMO = ("--megamem-activations-policy", "memo", "--megamem-activations-keep-last-layers", 0)
CODED = "--megamem-fp8-saved-activations"
TWO_CHUNKS = ("--num-virtual-stages-per-pipeline-rank", 2)


class TestMemoryLight:
    """What layers save in fewer bytes, each option by its flag, together with swap, schedules and the memory plan."""

    pytestmark = slow

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (
                (*TWO_CHUNKS, CODED, "all", *MEMO, "--megamem-activations-compress", "fp8",
                 "--megamem-schedule-name", "gis-h"),
                ("saved activations                          all, e4m3", "swapped to host memory"),
            ),
            (
                (*TWO_CHUNKS, CODED, "mlp", "--megamem-schedule-name", "v-half", "--megamem-vocabulary-parallel",
                 "true"),
                ("saved activations                          mlp, e4m3", "microbatches that passed through its rows"),
            ),
            (
                (CODED, "rebuild", "--megamem-allocator-mode", "static", "--train-iters", 6),
                ("rebuild", "fallbacks to PyTorch's allocator                         0 (0.0 MiB)"),
            ),
            (
                (*TWO_CHUNKS, *MEMO, "--megamem-activations-compress", "fp8", "--megamem-mlp-tiles", 4,
                 "--megamem-schedule-name", "v-half", "--megamem-vocabulary-parallel", "true"),
                ("MLP calls in tiles", "the last one in 4"),
            ),
        ],
        ids=["all, compress, gis-h", "mlp, v-half, vocabulary", "rebuild, static", "tiles, compress, v-half"],
    )  # fmt: skip
    def test_goes_together(self, small: list[object], flags: tuple[object, ...], words: tuple[str, ...]) -> None:
        output = run(2, *small, *LLAMA, "--num-layers", 4, "--pipeline-model-parallel-size", 2, "--train-iters", 2,
                     *flags)  # fmt: skip
        assert "megamem 2/" in output
        for word in words:
            assert word in output, output[-3000:]

    def test_two_bits_of_gelu(self, small: list[object]) -> None:
        stages = ["--num-layers", 4, "--pipeline-model-parallel-size", 2, "--train-iters", 2]
        output = run(2, *small, *stages, CODED, "regelu2", *MEMO, "--megamem-schedule-name", "zb-h1")
        assert "megamem 2/2" in output and "regelu2" in output and "swapped to host memory" in output


def validations(log: Path) -> list[float]:
    """The validation losses of a JSON log."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line["validation_loss"] for line in lines if "validation_loss" in line]


@pytest.mark.parametrize("name", ["memo", "ordered", "recompute"])
def test_recipes_are_valid_and_on(name: str) -> None:
    from megamem import load_config

    assert load_config(EXAMPLES / "recipes" / f"{name}.yaml").activations.policy == name


SMALL = {  # ranks, flags, and what is in the output: that megamem did something
    "01_enable_in_your_script.py": (1, [], "swapped"),
    "02_nemo_bridge.py": (2, ["--config-file", str(EXAMPLES / "recipes" / "nemo_bridge.yaml")], "swapped"),
}


@pytest.mark.slow
@pytest.mark.megatron
@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("0*.py")))
def test_small_example_runs_and_is_small(script: str) -> None:
    assert len((EXAMPLES / script).read_text().splitlines()) < 100
    ranks, flags, expected = SMALL[script]
    if "bridge" in script and (find_spec("megatron") is None or find_spec("megatron.bridge") is None):
        pytest.skip("megatron-bridge is not installed; ci/test.sh installs it beside the Megatron-Core that it fits")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "megamem.testing"]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(EXAMPLES / script), *flags]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LONG, check=False)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_quickstart_explains_itself_from_anywhere(tmp_path: Path) -> None:
    command = [str(EXAMPLES / "quickstart.sh"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=20, check=True)
    assert "usage: examples/quickstart.sh" in done.stdout
    assert not list(tmp_path.iterdir())
