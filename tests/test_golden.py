"""Golden numbers: what is off is found and named, and the stock job shows what was recorded."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "ci" / "golden.py"


@pytest.fixture(scope="module")
def golden() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_golden", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ci_golden"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


STEPS = [{"step": 1, "loss": 5.5, "grad_norm": 2.0}, {"step": 2, "loss": 5.25, "grad_norm": 1.75}]


class TestCompare:
    def test_equal_numbers_agree(self, golden: Any) -> None:
        assert golden.compare("stock", STEPS, copy.deepcopy(STEPS), golden.CPU) == []

    @pytest.mark.parametrize("device_class", ["cpu", "nvidia-h100-80gb-hbm3"])
    @pytest.mark.parametrize("name", ["loss", "grad_norm"])
    def test_each_number_may_differ_by_its_tolerance_and_no_more(
        self, golden: Any, name: str, device_class: str
    ) -> None:
        tolerance = golden.tolerance_of(device_class)
        found = copy.deepcopy(STEPS)
        found[1][name] = STEPS[1][name] * (1 + 0.9 * getattr(tolerance, name))
        assert golden.compare("memo", STEPS, found, tolerance) == []
        found[1][name] = STEPS[1][name] * (1 - 1.1 * getattr(tolerance, name))
        (problem,) = golden.compare("memo", STEPS, found, tolerance)
        assert problem.startswith(f"memo, step 2: {name} {found[1][name]!r}, recorded {STEPS[1][name]!r}, ")

    @pytest.mark.parametrize("number", [float("nan"), float("inf"), None])
    def test_what_is_no_number_is_off(self, golden: Any, number: float | None) -> None:
        found: list[dict[str, Any]] = copy.deepcopy(STEPS)
        found[0]["grad_norm"] = number
        (problem,) = golden.compare("memo", STEPS, found, golden.OTHER)
        assert problem.startswith("memo, step 1: grad_norm ")

    def test_a_step_too_few_is_off(self, golden: Any) -> None:
        assert golden.compare("memo", STEPS, STEPS[:1], golden.CPU) == ["memo: 1 steps, 2 recorded"]

    def test_another_job_is_not_compared_but_named(self, golden: Any) -> None:
        job = {"ranks": 1, "flags": "--num-layers 4", "text": "ab", "steps": STEPS}
        (problem,) = golden.check({"stock": job}, {"jobs": {"stock": {**job, "flags": "--num-layers 5"}}}, "cpu")
        assert "recorded with other flags" in problem


def test_the_text_is_always_the_same(golden: Any, tmp_path: Path) -> None:
    """The record says of which text it is; a Python that draws differently would train on another one."""
    (tmp_path / "text").mkdir()
    record = json.loads((golden.FOLDER / "cpu.json").read_text(encoding="utf-8"))["records"]
    assert {job["text"] for each in record.values() for job in each["jobs"].values()} == {
        golden.write_corpus(tmp_path / "text")
    }


def test_the_records_are_of_the_jobs_as_they_are(golden: Any) -> None:
    record = json.loads((golden.FOLDER / "cpu.json").read_text(encoding="utf-8"))["records"]
    assert record
    for each in record.values():
        recorded = {name: (job["ranks"], job["flags"]) for name, job in each["jobs"].items()}
        assert recorded == {name: (job.ranks, golden.flags_of(job, "cpu")) for name, job in golden.JOBS.items()}


class TestCommand:
    pytestmark = pytest.mark.megatron

    def test_without_a_record_it_says_so_and_runs_nothing(
        self, golden: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(golden, "run_jobs", lambda *_: pytest.fail("ran"))
        (tmp_path / "cpu.json").write_text('{"records": {"torch 1.0, megatron-core 0.1": {}}}', encoding="utf-8")
        assert golden.main(["--check", "--device", "cpu", "--folder", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert f"no record for cpu, {golden.series()}; there are records for torch 1.0, megatron-core 0.1" in said
        assert "python ci/golden.py --record" in said

    def test_a_file_that_is_none_is_refused(
        self, golden: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "cpu.json").write_text("[]", encoding="utf-8")
        assert golden.main(["--check", "--device", "cpu", "--folder", str(tmp_path)]) == 1
        assert "cpu.json: not a file of golden numbers" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "flags", [[], ["--check", "--record"], ["--check", "--only", "stok"], ["--record", "--out", "x"]]
    )
    def test_contradictions_are_usage_errors(self, golden: Any, flags: list[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            golden.main(flags)
        assert stopped.value.code == 2

    @pytest.mark.slow
    def test_the_stock_job_shows_what_was_recorded(self) -> None:
        command = [sys.executable, str(SCRIPT), "--check", "--device", "cpu", "--only", "stock"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        if "no record for" in done.stdout:
            pytest.skip(done.stdout.strip())
        assert "golden: stock: 6 steps as recorded" in done.stdout
