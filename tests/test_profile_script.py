"""`megamem profile --script` on a script that knows nothing of it, and `megamem plan --from-profile` on the result."""

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamem.cli import main
from megamem.errors import ConfigError
from megamem.ir.script_profile import parse_script_profile
from megamem.plan_profile import load_script_profile
from megamem.testing.trials import undeprecated

Dist = Callable[[int], Callable[..., list[Any]]]

TRAIN = """
import sys
from megamem.testing.models import GptCase, build_gpt, init_parallel, train_steps
if __name__ == "__main__":
    steps, *on = sys.argv[1:]
    case = GptCase(layers=4, pp=2)
    init_parallel(case)
    import megamem
    handle = megamem.enable({"activations": {"policy": "memo", "keep_last_layers": 0}}) if on else None
    chunks = build_gpt(case)
    train_steps(chunks, case, num_microbatches=4, forward_only=True)  # evaluation does not count
    train_steps(chunks, case, num_microbatches=4, steps=int(steps))
    print("reached the end")
"""
MEMO = ["--megamem-activations-policy", "memo", "--megamem-activations-keep-last-layers", "0"]

SIZES = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 256, "vocab_size": 128}
JOB = {"model": {**SIZES, "num_query_groups": 4, "kv_channels": 16}, "layout": {}, "seq_length": 64}


def profiled(folder: str, *arguments: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of `megamem profile --script train.py` on a rank whose process group is there."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_layer import TransformerLayer

    before = list(sys.path), list(sys.argv), parallel_state.initialize_model_parallel, TransformerLayer.forward
    out, err = io.StringIO(), io.StringIO()
    with undeprecated(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        *options, words = arguments
        command = ["profile", "--output", f"{folder}/profile.json", *options]
        status = main([*command, "--script", f"{folder}/train.py", *words.split()])
    sys.path[:], sys.argv[:] = before[:2]
    assert parallel_state.initialize_model_parallel is before[2] and TransformerLayer.forward is before[3]
    assert not [finder for finder in sys.meta_path if type(finder).__name__ == "AfterImport"]
    return status, out.getvalue(), err.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "train.py").write_text(TRAIN)
    return str(tmp_path)


def content_of(folder: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(folder) / "profile.json").read_text())
    return content


@pytest.mark.megatron
class TestAScriptThatKnowsNothing:
    def test_is_measured_and_stopped(self, dist: Dist, folder: str) -> None:
        (status, first, err), (_, second, _) = dist(2)(profiled, folder, "9")
        assert (status, err) == (0, "") and "reached the end" not in first + second
        content = content_of(folder)
        profile = parse_script_profile(content)
        assert profile is not None and profile.settings == ""
        assert content["hardware"]["gemm"]["source"] == "measured" and content["ranks"] == 2
        job = profile.job
        assert (job.model.num_layers, job.layout.pipeline, job.num_microbatches, job.spec) == (4, 2, 4, "local")
        assert [len(one.step_seconds) for one in profile.measured] == [2, 2]
        assert [(one.pipeline_rank, one.layers) for one in profile.measured] == [(0, 2), (1, 2)]
        # Rank 0 has two microbatches in flight, rank 1 one; all layers are alike.
        keeps = profile.measured[0].layer_bytes
        assert keeps > 0 and profile.measured[1].activations == 2 * keeps
        assert profile.measured[0].activations == pytest.approx(4 * keeps, rel=0.02)
        assert "a step:" in first and "written to" in first and second == ""

    def test_its_plan_says_what_was_predicted_of_the_job_as_it_ran(
        self, dist: Dist, folder: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        dist(2)(profiled, folder, "9")
        assert main(["plan", "--from-profile", f"{folder}/profile.json", "-o", f"{folder}/plan.yaml"]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        activations = [row for row in rows if row[:3] == ["activations", "of", "rank"]]
        assert len(activations) == 2
        for *_, predicted, measured, off in activations:
            assert float(measured) == pytest.approx(float(predicted), rel=0.02) and off.endswith("%")
        assert (Path(folder) / "plan.yaml").is_file()

    def test_with_megamem_switched_on_by_flags(self, dist: Dist, folder: str) -> None:
        (status, first, _), _ = dist(2)(profiled, folder, "--no-hardware", "--steps", "1", "9 " + " ".join(MEMO))
        assert status == 0 and "policy: memo" in first and "swapped to host memory, per step" in first
        profile = parse_script_profile(content_of(folder))
        assert profile is not None and json.loads(profile.settings)["activations"]["policy"] == "memo"
        assert [len(one.step_seconds) for one in profile.measured] == [1, 1]
        assert "hardware" not in content_of(folder)

    def test_with_a_schedule_whose_layers_are_counted_apart(self, dist: Dist, folder: str) -> None:
        (status, first, err), _ = dist(2)(profiled, folder, "--no-hardware", "9 --megamem-schedule-name zb-h1")
        assert (status, err) == (0, "") and "bubble" in first
        profile = parse_script_profile(content_of(folder))
        assert profile is not None and json.loads(profile.settings) == {"schedule": {"name": "zb-h1"}}
        assert profile.measured[0].activations > profile.measured[1].activations > 0

    def test_with_megamem_switched_on_by_itself(self, dist: Dist, folder: str) -> None:
        (status, _, err), _ = dist(2)(profiled, folder, "--no-hardware", "9 itself")
        assert (status, err) == (0, "")
        profile = parse_script_profile(content_of(folder))
        assert profile is not None and json.loads(profile.settings)["activations"]["policy"] == "memo"
        assert profile.measured[0].activations > 0

    def test_too_few_steps(self, dist: Dist, folder: str) -> None:
        code = f"{folder}/train.py has ended after 3 training steps"
        for rank, (status, out, err) in enumerate(dist(2)(refused, folder)):
            assert status == 2 and "reached the end" in out
            assert (code in err) if rank == 0 else err == ""
        assert not (Path(folder) / "profile.json").exists()


def refused(folder: str) -> tuple[int, str, str]:
    """As `profiled`, of three steps."""
    return profiled(folder, "3")


class TestWhatIsWrong:
    def refused(self, *arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
        assert main(list(arguments)) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("megamem: ")
        return err

    def test_with_the_call(
        self, folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = f"{folder}/train.py"
        error = self.refused("profile", "--num-layers", "4", "--steps", "0", "--script", script, capsys=capsys)
        assert "3 problems" in error and "--output FILE.json" in error and "--num-layers" in error
        error = self.refused("profile", "--output", "x.json", "--script", capsys=capsys)
        assert "name the script" in error
        for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
            monkeypatch.delenv(name, raising=False)
        error = self.refused("profile", "--output", "x.json", "--script", script, capsys=capsys)
        assert "torchrun --nproc-per-node N -m megamem profile --output profile.json --script" in error

    def test_with_the_profile(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "profile.json"
        path.write_text('{"device": "x", "hardware": {}}')
        with pytest.raises(ConfigError, match="a machine was measured, and no job"):
            load_script_profile(path)
        path.write_text('{"job": {"seq_length": "many"}, "measured": []}')
        error = self.refused("plan", "--from-profile", str(path), capsys=capsys)
        assert "job.model: missing" in error and "job.seq_length" in error
        path.write_text(json.dumps({"job": JOB, "measured": [{"rank": 0, "step_seconds": [1]}]}))
        error = self.refused("plan", "--from-profile", str(path), capsys=capsys)
        assert "--no-hardware" in error and "--gpu" in error
        error = self.refused("plan", "--from-profile", str(path), "--model", "llama3-8b", capsys=capsys)
        assert "give one of" in error
