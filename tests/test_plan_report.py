"""`megamem report`: files in, page and snapshot out, and every mistake said."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent / "report"))

from sample_plan import RANKS, price, sample

from megamem.cli import main


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A plan file."""
    made = tmp_path / "plan.yaml"
    made.write_text(sample().to_yaml(), encoding="utf-8")
    return made


def test_the_page_stands_beside_the_plan(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(path)]) == 0
    page = path.with_suffix(".html")
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    said = capsys.readouterr().out
    assert said.startswith(str(page)) and "GiB on the fullest rank" in said and "a step" in said


def test_edited_settings_are_told_from_planned_ones(path: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["megamem"]["activations"]["verify"] = False
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["report", str(path), "--html", str(tmp_path / "page.html")]) == 0
    assert "id='edited'" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_snapshot_holds_predicted_and_measured(path: Path, tmp_path: Path) -> None:
    measured = tmp_path / "steps.pickle"
    event = {"action": "alloc", "addr": 1, "size": 1 << 30, "stream": 0, "time_us": 5, "frames": []}
    measured.write_bytes(pickle.dumps({"segments": [], "device_traces": [[event]]}))
    out = tmp_path / "both.pickle"
    assert main(["report", str(path), "--snapshot", str(out), "--measured", str(measured)]) == 0
    assert len(pickle.loads(out.read_bytes())["device_traces"]) == RANKS + 1
    assert "peak, measured" in path.with_suffix(".html").read_text(encoding="utf-8")


def test_measured_times_stand_beside_the_predicted_ones(path: Path, tmp_path: Path) -> None:
    _, priced = price("gis-h", 2, "memo")
    costs = priced.simulation.costs.to_dict()
    profile = tmp_path / "trace.costs.json"
    profile.write_text(json.dumps(costs), encoding="utf-8")
    assert main(["report", str(path), "--profile", str(profile)]) == 0
    text = path.with_suffix(".html").read_text(encoding="utf-8")
    assert text.count("<td>forward</td>") == 2 * RANKS
    assert text.count("<td class=number>1.00</td>") == 3 * 2 * RANKS  # predicted by the same costs


MISTAKES: dict[str, tuple[Any, list[str], str]] = {
    "no plan": ({"activations": {"policy": "memo"}}, [], "no plan: made_for and predicted are missing"),
    "no file": (None, [], "no such file"),
    "no prediction": ("made_for only", [], "the plan predicts nothing"),
    "no profile": ("plan", ["--profile", "nothing.json"], "nothing.json: no such file"),
    "no snapshot": ("plan", ["--measured", "nothing.pickle"], "nothing.pickle: no memory snapshot"),
    "no folder": ("plan", ["--html", "nowhere/page.html"], "nowhere/page.html: cannot be written"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content, more, says = MISTAKES[what]
    monkeypatch.chdir(tmp_path)
    block = sample().to_dict()
    if content == "made_for only":
        block.pop("predicted")
    elif isinstance(content, dict):
        block = content
    if content is not None:
        Path("plan.yaml").write_text(yaml.safe_dump({"megamem": block}), encoding="utf-8")
    assert main(["report", "plan.yaml", *more]) == 2
    assert says in capsys.readouterr().err
    assert not Path("plan.html").exists()


def test_a_profile_of_another_layout_is_refused(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "costs.json"
    stage = {"forward": 1, "backward": 1, "weight": 1}
    profile.write_text(json.dumps({"stages": [stage] * 3}), encoding="utf-8")
    assert main(["report", str(path), "--profile", str(profile)]) == 2
    assert "costs of 3 stages, and the plan has 8" in capsys.readouterr().err
