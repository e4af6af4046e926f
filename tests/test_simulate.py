"""`megamem simulate`: the figures, the files it writes and reads, and what it refuses."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from megamem.cli import main
from megamem.ir.schedule import parse_schedule
from megamem.planner.schedules.families import FAMILIES

ZB_H1 = ["--schedule", "zb-h1", "--stages", "4", "--microbatches", "8"]


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What a call that succeeds prints."""
    status = main(["simulate", *flags])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return out


def record(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(run(capsys, *flags, "--json"))
    return content


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What a call that is refused says."""
    status = main(["simulate", *flags])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("megamem: ")
    return err


def test_the_figures_of_zb_h1(capsys: pytest.CaptureFixture[str]) -> None:
    """Bubble (p-1)(F+B-W), peak p microbatches (arXiv 2401.10241, table 1)."""
    found = record(capsys, *ZB_H1)
    assert {key: found[key] for key in ("schedule", "stages", "microbatches", "chunks", "group", "placement")} == {
        "schedule": "zb-h1", "stages": 4, "microbatches": 8, "chunks": 1, "group": None, "placement": "round-robin",
    }  # fmt: skip
    assert found["makespan"] == found["stage_span"] == 24 + 3
    assert found["bubble_rate"] == pytest.approx(1 / 9)
    assert found["peak_activation"] == [4, 4, 4, 4]
    assert found["order"][3].startswith("0F0 0B0 0F1 0B1")
    assert not any("SEND" in order or "RECV" in order for order in found["order"])
    assert found["accumulates_in_order"] is True
    assert len(found["costs"]["stages"]) == 4


def test_costs_are_per_rank_and_divided_by_the_chunks(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--schedule", "gis", "--stages", "4", "--microbatches", "8", "--chunks", "4"]
    found = record(capsys, *flags, "--forward", "4", "--backward", "8", "--weight", "2", "--comm", "0.5")
    stage = found["costs"]["stages"][5]
    assert (stage["forward"], stage["backward"], stage["weight"], stage["activation"]) == (1, 2, 0.5, 0.25)
    assert found["costs"]["comm"] == 0.5
    assert found["chunks"] == 4
    assert found["peak_activation"][0] == 4


def test_bytes_and_their_limit(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--schedule", "1f1b", "--stages", "4", "--microbatches", "8", "--activation-bytes", "3GiB"]
    found = record(capsys, *flags, "--memory-limit", "12GiB")
    assert found["peak_activation"] == [12 * 2**30, 9 * 2**30, 6 * 2**30, 3 * 2**30]
    assert (found["memory_unit"], found["memory_limit"]) == ("bytes", 12 * 2**30)
    assert record(capsys, *flags, "--memory-limit", str(13 * 2**30))["memory_limit"] == 13 * 2**30
    said = refusal(capsys, *flags, "--memory-limit", "11GiB")
    assert f"the limit is {11 * 2**30}; nearest: {12 * 2**30}" in said


def test_memory_that_b_gives_back(capsys: pytest.CaptureFixture[str]) -> None:
    """ZB-H1, rank i from 1: (p - i + 1) M_B + (i - 1) M_W."""
    found = record(capsys, *ZB_H1, "--activation-bytes", "100", "--weight-grad-bytes", "40")
    assert found["peak_activation"] == [400, 340, 280, 220]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_schedule_has_its_views(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg, trace = tmp_path / "a.svg", tmp_path / "a.json"
    flags = ["--schedule", name, "--stages", "4", "--microbatches", "16", "--offload", "0.1"]
    found = record(capsys, *flags, "--svg", str(svg), "--perfetto", str(trace))
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    slices = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    assert len(slices) == sum(len(order.split()) for order in found["order"])
    ends = [event["ts"] + event["dur"] for event in slices if event["tid"] == 0]
    assert max(ends) == pytest.approx(found["makespan"] * 1000)
    counters = [event["args"]["held"] for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "C"]
    assert max(counters) == pytest.approx(max(found["peak_activation"]))


def test_the_table_and_the_timeline(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    out = run(capsys, *ZB_H1)
    assert "makespan    27 " in out
    assert "bubble 0.1111" in out
    assert "rank 3 .  .  .  F0 B0 F1 B1" in out
    assert "too long for a timeline" in run(capsys, *ZB_H1[:-1], "80")


def test_the_text_form_goes_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, *ZB_H1, "--text")
    assert parse_schedule(text).name == "zb-h1"
    file = tmp_path / "mine.txt"
    file.write_text(text.replace("name: zb-h1", "name: mine"), encoding="utf-8")
    found, original = record(capsys, "--file", str(file)), record(capsys, *ZB_H1)
    assert found["schedule"] == "mine"
    assert {**found, "schedule": "zb-h1"} == original
    assert record(capsys, "--file", str(file), "--stages", "4")["makespan"] == 27
    assert "--stages 5: " in refusal(capsys, "--file", str(file), "--stages", "5")


def test_a_pasted_schedule_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.txt"
    text = run(capsys, *ZB_H1, "--text")
    file.write_text(text.replace(" 0W3", "", 1), encoding="utf-8")
    said = refusal(capsys, "--file", str(file))
    assert "rank 0: 0W3: is missing" in said
    assert "<-- ERROR HERE" in said
    file.write_text(text.replace("0W3", "0Q3"), encoding="utf-8")
    assert "'0Q3' is no action" in refusal(capsys, "--file", str(file))


def test_costs_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "costs.yaml"
    layer = "{forward: 1, backward: 1, weight: 1, activation: 2, weight_grad: 1}"
    file.write_text(
        f"layers: [{', '.join([layer] * 8)}]\nlast: {{forward: 3, backward: 0, weight: 0}}\n", encoding="utf-8"
    )
    found = record(capsys, *ZB_H1, "--costs", str(file))
    assert [stage["forward"] for stage in found["costs"]["stages"]] == [2, 2, 2, 5]
    assert found["memory_unit"] == "the unit of the costs file"
    assert found["peak_activation"][0] == 16
    assert "leave --forward out" in refusal(capsys, *ZB_H1, "--costs", str(file), "--forward", "2")
    file.write_text("stages: [{forward: 1}]", encoding="utf-8")
    assert str(file) in refusal(capsys, *ZB_H1, "--costs", str(file))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "give --schedule, --stages, --microbatches"),
        (["--schedule", "zb-h3", "--stages", "4", "--microbatches", "8"], "did you mean 'zb-h"),
        (["--schedule", "1f1b", "--stages", "0", "--microbatches", "8"], "--stages 0: at least 1"),
        (["--schedule", "1f1b", "--stages", "4", "--microbatches", "-8"], "--microbatches -8: at least 1"),
        (["--schedule", "1f1b", "--stages", "4", "--microbatches", "8", "--chunks", "2"], "nearest: 1 chunks"),
        ([*ZB_H1, "--group", "2"], "has no groups"),
        ([*ZB_H1, "--memory-limit", "3.5"], "the limit is 3.5; nearest: 4"),
        ([*ZB_H1, "--memory-limit", "40GiB"], "give --activation-bytes or --costs"),
        ([*ZB_H1, "--memory-limit", "40GB"], "did you mean 40GiB"),
        ([*ZB_H1, "--memory-limit", "0"], "is no limit"),
        ([*ZB_H1, "--forward", "-1"], "--forward -1: a cost"),
        ([*ZB_H1, "--comm", "nan"], "--comm nan: a cost"),
        ([*ZB_H1, "--weight-grad-bytes", "5"], "give --activation-bytes too"),
        ([*ZB_H1, "--activation-bytes", "5", "--weight-grad-bytes", "6"], "it is larger"),
        ([*ZB_H1, "--activation-bytes", "much"], "--activation-bytes: 'much' is no amount"),
        ([*ZB_H1, "--activation-bytes", "-5"], "zero or more"),
        ([*ZB_H1, "--costs", "no-such-file"], "no-such-file: no such file"),
        (["--file", "no-such-file"], "no-such-file: cannot be read"),
        ([*ZB_H1, "--svg", "no-such-folder/a.svg"], "cannot be written"),
    ],
)
def test_what_is_refused(flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert reason in refusal(capsys, *flags)


def test_auto_keeps_the_limit_and_shows_what_more_memory_would_give(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--schedule", "auto", "--stages", "2", "--microbatches", "4", "--chunks", "1"]
    tight, wide = record(capsys, *flags, "--memory-limit", "1.5"), record(capsys, *flags, "--memory-limit", "2")
    assert max(tight["peak_activation"]) <= 1.5
    assert wide["makespan"] < tight["makespan"]
    assert wide["makespan"] <= record(capsys, "--schedule", "zb-h1", *flags[2:])["makespan"]
    peaks = [row["peak_activation"] for row in tight["front"]]
    spans = [row["makespan"] for row in tight["front"]]
    assert peaks == sorted(peaks)
    assert spans == sorted(spans, reverse=True)
    assert [row["fits"] for row in tight["front"]] == [peak <= 1.5 for peak in peaks]
    assert "(above the limit)" in run(capsys, *flags, "--memory-limit", "1.5")
    assert "nearest: memory limit 1" in refusal(capsys, *flags, "--memory-limit", "0.5")
    assert "auto chooses the groups" in refusal(capsys, *flags, "--group", "2")


def test_the_list_of_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "--list").splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*FAMILIES, "auto"]
    assert [family["name"] for family in record(capsys, "--list")] == [*FAMILIES]  # type: ignore[index]


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["simulate", "--help"])
    assert caught.value.code == 0
    assert "megamem simulate --schedule gis-h --stages 8" in capsys.readouterr().out
