"""The hardware table: every number there, with its source; profiles in its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamem.errors import ConfigError
from megamem.planner.hardware import TABLE, Rates, _table, load_hardware, names, plain_row, row_of_device

CARDS = ("a100", "a800", "h100", "h200", "b200", "gb200")


@pytest.mark.parametrize("name", names())
def test_a_row_is_complete_and_every_number_has_a_source(name: str) -> None:
    hardware = load_hardware(name)
    assert set(hardware.sources.values()) <= set(_table()["sources"])
    assert hardware.gemm < hardware.peak_flops and hardware.to_host_both <= hardware.to_host
    assert 16 < hardware.memory / 2**30 < 300 and hardware.hbm > 1e12


def test_the_presets_are_there_and_their_devices_are_recognised() -> None:
    assert set(CARDS) <= set(names())
    devices = {"NVIDIA A100-SXM4-80GB": "a100", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA GB200": "gb200"}
    assert {device: row_of_device(device) for device in devices} == devices
    assert row_of_device("NVIDIA GeForce RTX 4090") is None


def test_gpus_behind_one_uplink_share_it() -> None:
    assert load_hardware("a800").to_host == 12.8e9
    assert load_hardware("h100").bandwidth(8) == load_hardware("h100").nvlink
    assert load_hardware("h100").bandwidth(8, stride=8) == load_hardware("h100").network


def test_rates_follow_the_logarithm_between_points_and_stay_beyond_them() -> None:
    rates = Rates(((1024, 100.0), (4096, 200.0)))
    found = [rates.at(size) for size in (16, 1024, 2048, 4096, 1 << 20)]
    assert found == pytest.approx([100, 100, 150, 200, 200])


def test_a_measured_profile_takes_the_place_of_a_row(tmp_path: Path) -> None:
    row = plain_row("h100")
    row["gemm"] = {"value": 5e14, "source": "measured"}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"hardware": row}), encoding="utf-8")
    hardware = load_hardware(str(path))
    assert hardware.gemm == 5e14 and hardware.sources["gemm"] == "measured"
    assert hardware.attention_forward == load_hardware("h100").attention_forward


def test_what_is_missing_or_wrong_in_a_profile_is_named(tmp_path: Path) -> None:
    row = plain_row("h100") | {"gemm": {"value": -1}, "hbm": {"value": "fast"}}
    del row["nvlink"]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_hardware(str(path))
    assert [problem.split(": ")[1] for problem in caught.value.problems] == ["hbm", "gemm", "nvlink"]


def test_an_unknown_gpu_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        load_hardware("h10")


def test_the_table_names_its_sources_in_words() -> None:
    assert "arXiv 2307.08691" in load_hardware("a100").source_text()
    assert TABLE.read_text(encoding="utf-8").startswith("# What GPUs can do")
