"""`megamem run`: what is wrong is said before anything is loaded, and a script that does not know of megamem trains."""

import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamem.cli import main
from megamem.testing.trials import undeprecated

Dist = Callable[[int], Callable[..., list[Any]]]
Runner = Callable[..., list[tuple[int, str, str]]]


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text("print('never reached')\n")
    return str(path)


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["run", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("megamem: ") and "Traceback" not in err
    return err


class TestWhatIsWrongWithTheCall:
    @pytest.fixture(autouse=True)
    def launched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setattr(sys, "path", [*sys.path])

    def test_a_missing_script(self, script: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert "nowhere.py is not a file" in refused("nowhere.py", capsys=capsys)
        assert f"did you mean {script}?" in refused(script.removesuffix(".py"), capsys=capsys)

    def test_no_launcher(
        self, script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
            monkeypatch.delenv(name, raising=False)
        assert f"torchrun --nproc-per-node N -m megamem run {script}" in refused(script, capsys=capsys)

    def test_wrong_options_before_and_behind_the_script(self, script: str, capsys: pytest.CaptureFixture[str]) -> None:
        error = refused("--megamem-activations-policy", "mmemo", script, "--megamem-schedule-name=zbh", capsys=capsys)
        assert "2 problems" in error and "did you mean 'memo'?" in error and "schedule.name" in error

    def test_one_rank_speaks(
        self, script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RANK", "1")
        assert main(["run", script, "--megamem-typo", "x"]) == 2
        assert capsys.readouterr() == ("", "")

    def test_no_megatron(
        self, script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("megamem.run.find_spec", lambda name: None if name == "megatron.core" else object())
        assert "megatron-core is not installed" in refused(script, capsys=capsys)


def test_help_shows_every_option_and_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from megamem.cli import main; main(['run', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "-m megamem run pretrain_gpt.py --megamem" in done.stdout and "--megamem-schedule-name" in done.stdout


# A trainer laid out as Megatron-LM is: a parser in megatron.training, and a script that knows nothing of megamem.
ARGUMENTS = """
import argparse
def add_megatron_arguments(parser):
    parser.add_argument_group("network size").add_argument("--num-layers", type=int, help="100%% theirs")
    return parser
def parse_args():
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return parser.parse_args()
"""
TRAIN = """
from megatron.training.arguments import parse_args
from megamem.testing.models import GptCase, build_gpt, init_parallel, train_steps
if __name__ == "__main__":
    args = parse_args()
    case = GptCase(layers=args.num_layers, pp=2)
    init_parallel(case)
    losses, gradients = train_steps(build_gpt(case), case, num_microbatches=4)
    print("bits", *(loss.hex() for loss in losses), *(hash(g.numpy().tobytes()) for _, g in sorted(gradients.items())))
    print("args", {key: value for key, value in sorted(vars(args).items()) if value is not None})
"""


def standin(folder: str, *arguments: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of `megamem run train.py` on a rank whose process group is there already."""
    from megatron.core import parallel_state

    before = list(sys.path), list(sys.argv), parallel_state.initialize_model_parallel
    out, err = io.StringIO(), io.StringIO()
    try:
        with undeprecated(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["run", *arguments[:-1], str(Path(folder) / "train.py"), *arguments[-1].split()])
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.path[:], sys.argv[:] = before[:2]
        for module in [name for name in sys.modules if name.startswith("megatron.training")]:
            del sys.modules[module]
    assert parallel_state.initialize_model_parallel is before[2]
    assert not [finder for finder in sys.meta_path if type(finder).__name__ == "AfterImport"]
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    base = tmp_path_factory.mktemp("trainer")
    package = base / "megatron" / "training"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "arguments.py").write_text(ARGUMENTS)
    (base / "train.py").write_text(TRAIN)
    (base / "no_groups.py").write_text("print('trains nothing')\n")
    return str(base)


@pytest.fixture
def run(dist: Dist, folder: str) -> Runner:
    return lambda *arguments: dist(2)(standin, folder, *arguments)


@pytest.mark.megatron
class TestAScriptThatKnowsNothing:
    def bits(self, results: list[tuple[int, str, str]]) -> list[str]:
        assert [(status, err) for status, _, err in results] == [(0, "")] * 2, results
        return [next(line for line in out.splitlines() if line.startswith("bits")) for _, out, _ in results]

    def test_trains_to_the_same_bits_with_a_table_and_a_report(self, run: Runner) -> None:
        on = "--num-layers 4 --megamem-activations-policy memo --megamem-activations-keep-last-layers 0"
        stock, ours = run("--num-layers 4"), run("--megamem-schedule-name", "zb-h1", on)
        assert self.bits(ours) == self.bits(stock)
        first, second = ours[0][1], ours[1][1]
        assert "is on, with megatron-core" in first and "2 ranks (pipeline 2)" in first
        assert "keep_last_layers: 0  --megamem-activations-keep-last-layers" in first
        assert re.search(r"policy: memo +--megamem-activations-policy +up to [0-9,.]+ MiB of host memory", first)
        assert "what it did on rank 0" in first and "swapped to host memory, per step" in first
        assert "megamem: " not in second and "is on" not in second
        assert "'megamem_activations_policy': 'memo'" in first and "megamem_" not in stock[0][1]
        assert "megamem: nothing was switched on" in stock[0][1]

    def test_help_has_a_group_of_ours(self, run: Runner) -> None:
        (status, out, err), _ = run("--help")
        assert (status, err) == (0, "")
        assert "100% theirs" in out and "\nmegamem:\n" in out and "--megamem-vocabulary-loss-chunk" in out

    def test_an_error_of_ours_comes_without_a_traceback(self, run: Runner) -> None:
        for status, _, err in run("--num-layers 4 --megamem-schedule-name zb-v"):
            assert status == 2 and "Traceback" not in err
            assert "V placement" in err or "virtual_pipeline_model_parallel_size" in err

    def test_a_script_that_never_makes_groups_is_not_live(self, dist: Dist, folder: str) -> None:
        (status, out, err), _ = dist(2)(no_groups, folder)
        assert (status, out) == (2, "trains nothing\n")
        assert "activations was to be switched on" in err and "initialize_model_parallel" in err


def no_groups(folder: str) -> tuple[int, str, str]:
    before = list(sys.path), list(sys.argv)
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["run", "--megamem-activations-policy", "memo", str(Path(folder) / "no_groups.py")])
    finally:
        sys.path[:], sys.argv[:] = before
    return status, out.getvalue(), err.getvalue()
