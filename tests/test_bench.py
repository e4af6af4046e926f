"""The benchmarks run, and their files hold what their readers look for. Nothing here looks at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megamem.planner.schedules.families import FAMILIES

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "ci" / "bench"
NAMES = (
    "retained_bytes",
    "bookkeeping",
    "compressed_swap",
    "tiled_mlp",
    "saved_activations",
    "training_parity",
    "kernel_bandwidth",
    "planner",
    "gpu_layer",
    "quickstart",
    "schedules",
    "schedule_search",
    "vocabulary_schedules",
    "vocabulary_memory",
    "linear_cross_entropy",
    "pipeline_loop",
    "allocation_solvers",
    "arena",
    "gpu_allocator",
)

pytestmark = pytest.mark.megatron


def run(name: str, out: Path, *arguments: str) -> dict[str, Any]:
    """Run a benchmark at toy sizes; its file."""
    command = [sys.executable, "-W", "ignore", str(BENCH / f"{name}.py"), "--out", str(out), "--quick", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    document: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    check_frame(document, name)
    return document["results"]  # type: ignore[no-any-return]


def check_frame(document: dict[str, Any], name: str) -> None:
    """What every file says besides its results."""
    assert document["benchmark"] == name
    assert {"cpu", "cores", "memory_bytes", "gpu", "load_1min"} <= set(document["machine"])
    assert {"python", "torch", "megatron-core", "megamem", "commit", "dirty"} <= set(document["versions"])
    assert document["date"].endswith("Z")
    assert "out" not in document["arguments"]  # a path of this machine


def check_summary(summary: dict[str, Any]) -> None:
    """Median and spread of repetitions that are all there."""
    assert summary["min"] <= summary["q1"] <= summary["median"] <= summary["q3"] <= summary["max"]
    assert len(summary["repetitions"]) >= 1


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_is_measured(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(BENCH / f"{name}.py"), "--help"],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--out FILE.json" in done.stdout
    assert "--quick" in done.stdout


def test_retained_bytes(tmp_path: Path) -> None:
    results = run("retained_bytes", tmp_path / "out.json")
    for target in results.pop("targets"):
        assert target["met"], target["what"]
    assert results
    for shape, case in results.items():
        contenders = case["contenders"]
        stock = contenders["stock"]["live_bytes"]
        assert stock >= 16 * case["unit_bytes"]
        for name, counts in contenders.items():
            assert counts["host_bytes_left_after_backward"] == 0, name
            assert counts["engine_bytes_left_after_backward"] == 0, name
            if name != "stock":
                assert counts["live_bytes"] < stock / 4, name
        # Swapped in full, everything that stock holds is in host memory; slots are rounded up. Llama's stock holds
        # more: all of fc1's output for its gate, all of qkv for the values, since views keep all of their storage.
        least = stock if shape.startswith("memo") else 0.7 * stock
        assert least <= contenders["memo 1"]["host_bytes"] < stock * 1.2
        # Every other layer's input is not stored.
        every = contenders["memo 0"]["host_bytes"] - contenders["memo 0, residual 2"]["host_bytes"]
        assert every == pytest.approx(case["unit_bytes"] / 2)


def test_compressed_swap(tmp_path: Path) -> None:
    results = run("compressed_swap", tmp_path / "out.json")
    for case in results["shapes"].values():
        assert case["swap"]["bitwise"]
        found = case["contenders"]
        for name, result in found.items():
            assert 0 < result["bytes_ratio"] < 1, name
            assert result["tensors_bytes"] == case["swap"]["tensors_bytes"], name
            assert result["error"]["worst_parameter"] > 0, name
        assert found["compress: fp8"]["bytes_ratio"] == min(result["bytes_ratio"] for result in found.values())
        for kind in ("input of linear_qkv", "input of linear_fc1", "input of linear_fc2"):
            assert found[kind]["error"]["input"] == 0, kind  # a weight's gradient is all that depends on it


def test_saved_activations(tmp_path: Path) -> None:
    results = run("saved_activations", tmp_path / "out.json")
    for kind, case in results["shapes"].items():
        found = case["contenders"]
        held = {name: one["live_bytes"] for name, one in found.items() if "live_bytes" in one}
        assert all(found[name]["engine_bytes"] == count for name, count in held.items()), kind
        assert held["stock"] > held["rebuild"] > held["mlp"] > held["all"] and held["all"] < 0.5 * held["stock"], kind
        wrong = {name: one["error"]["parameters"] for name, one in found.items()}
        assert 0.0 < wrong["stock"] == wrong["swap"], kind  # of bf16; swap is bitwise equal
        assert wrong["rebuild"] < 0.01 < wrong["all"] < 0.05 and 0.01 < wrong["swap in fp8"] < 0.05, kind
        assert found["swap in fp8"]["link_ratio"] < 0.75 and found["swap in fp8"]["time_over"] == "swap", kind
        for one in found.values():
            check_summary(one["time_ratio"])
        if kind != "llama-3-8b":
            assert held["rebuild"] < held["16 tiles"] < held["stock"] and wrong["16 tiles"] < 0.01, kind
    large, gpt = (
        {name: one.get("live_bytes") for name, one in results["shapes"][kind]["contenders"].items()}
        for kind in ("llama-3-8b", "gpt")
    )
    assert large["all"] == large["all, int8"] == large["all, e5m2"]
    assert large["rebuild"] < large["Megatron's FP8 option"]
    # Where fc2 is trained, two bits keep more than the input of GELU does, and their gradient is not GELU's.
    assert gpt["stock"] > gpt["regelu2"] > gpt["rebuild"]
    assert results["shapes"]["gpt"]["contenders"]["regelu2"]["error"]["parameters"] > 0.1
    for row in results["swiglu"]:
        assert row["error"]["bf16"] < row["error"]["e4m3"] < 0.03
        assert row["error"]["e4m3"] < 1.1 * row["error"]["Megatron's FP8 option"]
    assert 10 * results["swiglu"][-1]["error"]["e4m3"] < results["swiglu"][-1]["error"]["Megatron's FP8 option"]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "option", "most"), [("llama", "all", 0.5), ("gpt", "regelu2", 0.8)])
def test_training_parity(model: str, option: str, most: float, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number, path in enumerate(sorted((ROOT / "megamem").rglob("*.py"))):
        (text / f"{number}.txt").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    which = ("--model", model, "--contenders", f"bf16/fp32/{option}")
    results = run("training_parity", tmp_path / "out.json", "--text", str(text), *which)
    found = results["contenders"]
    assert found[option]["activation_bytes"] < most * found["bf16"]["activation_bytes"]
    assert 0.0 < abs(found[option]["difference"]) < 0.01
    assert "<polyline" in (tmp_path / "out.svg").read_text(encoding="utf-8")


def test_kernel_bandwidth(tmp_path: Path) -> None:
    results = run("kernel_bandwidth", tmp_path / "out.json", "--device", "cpu")
    assert {case["kind"] for case in results["cases"]} == {"codec", "swiglu", "norm"}
    for case in results["cases"]:
        for summary in case["milliseconds"].values():
            check_summary(summary)


def test_tiled_mlp(tmp_path: Path) -> None:
    results = run("tiled_mlp", tmp_path / "out.json")
    for policies in results["shapes"].values():
        for policy, contenders in policies.items():
            stock, tiles = contenders["stock"], contenders["4 tiles"]
            assert tiles["held_bytes"] <= stock["held_bytes"], policy
            assert tiles["forward_bytes"] < stock["forward_bytes"], policy
            assert tiles["flops_ratio"] == stock["flops_ratio"], policy
        off = policies["off"]
        assert off["4 chunks"]["held_bytes"] == off["stock"]["held_bytes"] > off["4 tiles"]["held_bytes"]
        assert off["4 chunks, recomputed"]["flops_ratio"] > 1.2


def test_schedules(tmp_path: Path) -> None:
    results = run("schedules", tmp_path / "out.json")
    assert sum(len(row["published"]) for row in results["table5"]) == 72
    assert all(row["published"] == row["ours"] for row in results["table5"])
    assert (
        {row["family"] for row in results["peaks"]} == set(FAMILIES) == {row["family"] for row in results["generators"]}
    )
    missed = [target["what"] for target in results["targets"] if not target["met"]]
    assert all("within" in what and " s each" in what for what in missed), missed


def test_schedule_search(tmp_path: Path) -> None:
    results = run("schedule_search", tmp_path / "out.json")
    rows = [*results["between"]["rows"], *results["v_half"]["rows"], results["large"]]
    assert all(row["bound"] <= row["auto"] * (1 + 1e-9) and row["peak"] <= row["limit"] * (1 + 1e-9) for row in rows)
    assert not [target["what"] for target in results["targets"] if not target["met"]]


@pytest.mark.skipif(not (ROOT.parent / "shared" / "data" / "traces").is_dir(), reason="the shared data is not here")
def test_allocation_solvers(tmp_path: Path) -> None:
    results = run("allocation_solvers", tmp_path / "out.json")
    assert all(found["megamem"]["solved"] for found in results["published"]["instances"].values())
    for trace in results["traces"].values():
        assert {"first order", "portfolio", "auto", "two levels"} == set(trace["solvers"])
        assert all(found["peak"] >= trace["lower_bound"] for found in trace["solvers"].values())
        assert trace["levels"]["lower_bound_ratio"] >= 1.0
    assert not [target["what"] for target in results["targets"] if not target["met"]]


def test_arena(tmp_path: Path) -> None:
    results = run("arena", tmp_path / "out.json")
    for found in results["core"]["ns_per_pair"].values():
        check_summary(found)
    assert results["fuzz"]["traces"] == 300 and results["fuzz"]["served"] > 3000
    for name, job in results["jobs"]["jobs"].items():
        assert job["losses_equal"] and job["planned_peak_bytes"] >= job["lower_bound_bytes"] > 0
        assert job["served_bytes_share"] > (0.3 if name == "experts" else 0.9)


def test_gpu_allocator_runs_on_a_cpu(tmp_path: Path) -> None:
    cells = ("--cells", "dense", "--contenders", "native,arena")
    results = run("gpu_allocator", tmp_path / "out.json", "--device", "cpu", *cells)
    native, arena = (results["cells"]["dense"]["contenders"][name] for name in ("native", "arena"))
    assert native["status"] == arena["status"] == "ok" and native["digest"] == arena["digest"]
    assert arena["arena"]["served_bytes_share"] > 0.9 and arena["arena"]["fallbacks"] == 0


def test_vocabulary_schedules(tmp_path: Path) -> None:
    results = run("vocabulary_schedules", tmp_path / "out.json")
    missed = [target["what"] for target in results["targets"] if not target["met"]]
    assert all("a fourth GEMM" in what for what in missed) and len(results["targets"]) == 4
    for row in results["rows"]:
        for name in ("vocab-1", "vocab-2"):
            assert 0 < row["baseline"]["speed"] < row[name]["speed"] < 1
            assert 1 <= row[name]["overhead"] < 1.3
    largest = [row for row in results["rows"] if row["vocabulary"] == 262144]
    assert all(row["baseline"]["speed"] < 0.6 * row["vocab-2"]["speed"] for row in largest)


def test_vocabulary_memory(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="pip install 'megamem[dev]'")
    results = run("vocabulary_memory", tmp_path / "out.json")
    assert [target["what"] for target in results["targets"] if target["met"]] == [
        "no tensor of a quarter of tokens x vocabulary"
    ]
    rows = results["rows"]
    assert rows["Megatron"]["largest"] == rows["torch"]["largest"] == 1.0
    for name, row in rows.items():
        assert 0 < row["kept_bytes"] < row["peak_bytes"]
        assert ("kept" in name) == (row["kept_bytes"] > 256 * 4000 * 2 / 16) or name in ("torch", "Megatron")


def test_bookkeeping(tmp_path: Path) -> None:
    results = run("bookkeeping", tmp_path / "out.json")
    steps, layers = results["steps"], results["layers"]
    for name in ("ratio", "ratio_cpu_time", "ratio_without_copies", "copy_seconds"):
        check_summary(steps[name])
    assert set(layers["added_microseconds"]) == {"empty hooks", "memo 1", "keep"}
    for added in layers["added_microseconds"].values():
        check_summary(added["total"])
    assert [set(target) for target in results["targets"]] == [{"what", "met"}] * 2


def test_linear_cross_entropy(tmp_path: Path) -> None:
    results = run("linear_cross_entropy", tmp_path / "out.json", "--device", "cpu")
    for target in results["targets"]:
        assert target["met"], target["what"]
    for cell in results["cells"]:
        ran = {name: result for name, result in cell["contenders"].items() if result["status"] == "ok"}
        assert {"megamem", "megamem, main_grad", "torch eager", "Megatron"} <= set(ran)
        for name, result in ran.items():
            for part in ("forward_ms", "backward_ms", "step_ms"):
                check_summary(result[part])
            assert max(result["relative_errors_to_torch_eager"].values()) < 1e-5, name
        # Stock holds the logits several times over; nothing of that size is in ours.
        assert ran["Megatron"]["peak_bytes"] > cell["logits_fp32_bytes"]
        ours = ran["megamem, main_grad"]["peak_bytes"]
        assert ours < cell["logits_fp32_bytes"] / 2 and ours < ran["megamem"]["peak_bytes"]


def test_every_contender_of_gpu_layer_runs_on_a_cpu(tmp_path: Path) -> None:
    results = run("gpu_layer", tmp_path / "out.json", "--device", "cpu", "--minutes", "14")
    for target in results["targets"]:
        assert target["met"], target["what"]
    assert {cell["shape"] for cell in results["cells"]} == {"llama-3-8b", "memo-7b-tp8"}
    assert set(results["machine"]["link"]) == {"nbytes", "to_host", "to_device", "duplex"}
    for cell in results["cells"]:
        base, saved, layers = cell["base_bytes_per_layer"], cell["saved_bytes_per_layer"], cell["layers"]
        assert base < saved
        assert set(cell["contenders"]) == set(results["contenders"])
        for name, result in cell["contenders"].items():
            if name == "Megatron fine-grained offload":
                assert result["status"].startswith("not run: ")
                continue
            assert result["status"] == "ok", (name, result["status"])
            check_summary(result["step_ms"])
            assert cell["parity"][name]["max_relative_error"] < 1e-4, name
        stored = {name: result.get("per_step", {}).get("bytes_stored") for name, result in cell["contenders"].items()}
        assert stored["memo 0"] == layers * base
        assert stored["memo 1"] == layers * saved
        assert stored["keep"] == stored["recompute"] == 0
        assert stored["memo 0"] <= stored["memo uniform"] <= stored["memo 1"]
        # The recipe leaves the log-sum-exp of toys, a few numbers, where it is.
        assert 0.9 * layers * base < stored["public recipe"] <= layers * base


def test_pipeline_loop(tmp_path: Path) -> None:
    results = run("pipeline_loop", tmp_path / "out.json")
    assert set(results) == {"steps", "overhead"}
    for part in results.values():
        assert set(part) == {"1f1b", "interleaved"}
        for found in part.values():
            for what in ("stock_ms", "ours_ms", "ratio", "ratio_cpu_time", "added_microseconds"):
                check_summary(found[what])


@pytest.mark.slow
def test_planner(tmp_path: Path) -> None:
    results = run("planner", tmp_path / "found.json")
    assert all(abs(row["error"]) <= 0.03 and row["predicted"] for row in results["measured"])
    assert all(row["met"] for row in results["published"])
    assert all(row["parameters"]["ours"] == row["parameters"]["published"] for row in results["estimators"])
    assert all(found["cpu_seconds"]["median"] > 0 for found in results["speed"].values())
