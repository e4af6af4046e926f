"""`megamem plan` as its users run it: from a model to a plan that reads back, with reasons, and refusals that help."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megamem.cli import main
from megamem.config import load_config
from megamem.ir.plan import MEMORY_KINDS, TIME_KINDS
from megamem.planner.models import job_of_flags
from megamem.report.charts import duration

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 257,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA = ("plan", "--model", "llama3-8b", "--gpus", "8", "--seq-length", "256k")


def plan(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main([*flags, "--json"]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)["megamem"]
    return content


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(list(flags)) == 2
    return capsys.readouterr().err


def test_a_plan_is_written_and_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.yaml"
    assert main([*LLAMA, "-o", str(path)]) == 0
    text = capsys.readouterr().out
    for words in ("llama3-8b, 262144 tokens, on 8 x h100", "GiB at the peak", "what else there was", "MFU", "why"):
        assert words in text
    config = load_config(path)
    assert config.plan is not None and config.plan.predicts(config.settings())
    assert config.activations.is_on and "auto" not in str({"policy": config.activations.policy})
    assert main(["plan", "--read", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[:6] == text.splitlines()[:6]
    assert main(["plan", "--read", str(path), "--flags"]) == 0
    flags = capsys.readouterr().out
    assert job_of_flags(flags + " --vocab-size 128256", 8).layout == config.plan.made_for.job.layout


def test_layers_that_do_not_divide_are_planned_and_started_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan says which stage has which layers, and its flags do, as words of `$(...)`."""
    config, path = tmp_path / "config.json", str(tmp_path / "plan.yaml")
    config.write_text(json.dumps({**TINY, "num_hidden_layers": 7}), encoding="utf-8")
    line = ("plan", "--model", str(config), "--gpus", "4", "--seq-length", "4k", "--global-batch-size", "8")
    line = (*line, "--pipeline-model-parallel-size", "4", "--tensor-model-parallel-size", "1")
    content = plan(capsys, *line, "-o", path)
    layout = content["made_for"]["job"]["layout"]
    assert sum(layout["split"]) == 7 and len(layout["split"]) == 4
    (row,) = [one for one in content["predicted"]["decisions"] if one["subject"] == "pipeline_model_parallel_layout"]
    assert row["reason"] == "7 layers in 4 stages: the busiest rank has as few as can be"
    assert main(["plan", "--read", path, "--flags"]) == 0
    words = capsys.readouterr().out.split()
    assert words[words.index("--pipeline-model-parallel-layout") + 1] == row["fate"]
    again = ["--from-megatron-args", " ".join([*words, "--vocab-size", "257"]), "--gpus", "4", "--gpu", "h100"]
    assert plan(capsys, "plan", *again)["made_for"]["job"]["layout"] == layout
    uneven = " ".join(words).replace(row["fate"], "Et|t|t|t*4L")  # as asked, though it is slower
    content = plan(capsys, "plan", "--from-megatron-args", f"{uneven} --vocab-size 257", "--gpus", "4")
    assert content["made_for"]["job"]["layout"]["split"] == [1, 1, 1, 4]
    assert "as asked" in str(content["predicted"]["decisions"])


def test_multi_token_prediction_is_given_what_runs_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    line = ("plan", "--model", "deepseek-v3", "--gpus", "512", "--seq-length", "4k", "--global-batch-size", "512")
    line = (*line, "--pipeline-model-parallel-size", "16", "--tensor-model-parallel-size", "1")
    line = (*line, "--expert-model-parallel-size", "32", "--context-parallel-size", "1", "--micro-batch-size", "1")
    content = plan(capsys, *line)
    assert content["made_for"]["job"]["layout"]["split"]
    assert plan(capsys, *line, "--schedule", "v-half")["schedule"]["name"] == "v-half"
    assert "uses both embeddings within a stage" in refusal(capsys, *line, "--vocabulary", "parallel")


def test_what_is_predicted_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    content = plan(capsys, *LLAMA)
    predicted = content["predicted"]
    assert sum(predicted["time"].values()) == pytest.approx(predicted["step_seconds"], rel=1e-4)
    assert set(predicted["time"]) <= set(TIME_KINDS)
    for rank in predicted["memory"]:
        assert set(rank["kinds"]) <= set(MEMORY_KINDS)
        assert sum(rank["kinds"].values()) <= rank["limit"]
    utilization = predicted["utilization"]
    flops = utilization["model_flops"] / (8 * predicted["step_seconds"])
    assert flops / utilization["peak_flops_per_gpu"] == pytest.approx(utilization["mfu"], rel=1e-4)
    tokens = 262144 * content["made_for"]["job"].get("global_batch_size", 1)
    assert tokens / predicted["step_seconds"] / 8 == pytest.approx(predicted["tokens_per_second_per_gpu"], rel=1e-4)
    assert all(one["reason"] for one in predicted["decisions"])


PIPELINE = (
    *("plan", "--model", "llama3-70b", "--gpus", "64", "--seq-length", "32k", "--global-batch-size", "16"),
    *("--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "8", "--context-parallel-size", "1"),
    *("--expert-model-parallel-size", "1", "--micro-batch-size", "1"),
)


@pytest.mark.parametrize("flags", [LLAMA, PIPELINE], ids=["no pipeline", "pipeline"])
def test_nothing_that_fits_is_faster_and_the_front_is_one(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    predicted = plan(capsys, *flags)["predicted"]
    fitting = [one["step_seconds"] for one in predicted["alternatives"] if one["fits"]]
    assert min(fitting) >= predicted["step_seconds"] * (1 - 5e-4)
    names = {one["name"] for one in predicted["alternatives"]}
    assert {"activations untouched", "full recomputation (Megatron's)", "recompute"} <= names
    front = [(one["peak_memory"], one["step_seconds"]) for one in predicted["front"]]
    assert front == sorted(front) and [seconds for _, seconds in front] == sorted((s for _, s in front), reverse=True)


def test_a_given_layout_is_kept_and_its_pipeline_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    content = plan(capsys, *PIPELINE, "--vocabulary", "off")  # a shared vocabulary has passes of its own
    layout = content["made_for"]["job"]["layout"]
    assert (layout["tensor"], layout["pipeline"]) == (8, 8)
    predicted = content["predicted"]
    assert len(predicted["memory"]) == len(predicted["pipeline"]) == 8
    first = predicted["pipeline"][0].split()
    assert first[0].startswith("F0@0-") and len(first) == 16 * layout.get("chunks", 1) * (
        2 if content["schedule"]["name"] in ("off", "1f1b", "interleaved") else 3
    )
    assert any(one["subject"] == "schedule.name" for one in predicted["decisions"])


def test_settings_that_are_asked_for_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    content = plan(capsys, *PIPELINE, "--schedule", "gis-h", "--vocabulary", "fused", "--allocator", "static")
    assert content["schedule"]["name"] == "gis-h" and content["vocabulary"]["fused_loss"] is True
    assert content["allocator"]["mode"] == "static"
    content = plan(capsys, *PIPELINE, "--schedule", "off", "--vocabulary", "parallel")
    assert content["vocabulary"]["parallel"] is True and content["schedule"]["name"] in ("1f1b", "interleaved")


def test_less_memory_costs_time_and_host_memory_saves_some(capsys: pytest.CaptureFixture[str]) -> None:
    flags = (*PIPELINE, "--schedule", "off", "--vocabulary", "off", "--num-virtual-stages-per-pipeline-rank", "1")
    seconds = [
        plan(capsys, *flags, "--device-memory", device, "--host-memory", host)["predicted"]["step_seconds"]
        for device, host in (("75GiB", "100GiB"), ("50GiB", "100GiB"), ("50GiB", "1GiB"))
    ]
    near = 1.005  # what whole layers and tensors cannot express of an optimum
    assert seconds[0] <= near * seconds[1] and seconds[1] <= near * seconds[2] and seconds[0] < seconds[2]


def test_a_launch_line_and_a_bridge_file_are_planned_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (
        "torchrun --nproc_per_node 8 pretrain_gpt.py --num-layers 32 --hidden-size 4096 --num-attention-heads 32 "
        "--seq-length 65536 --vocab-size 50257 --bf16 --tensor-model-parallel-size 8 --sequence-parallel "
        "--global-batch-size 4 --attention-dropout 0 --hidden-dropout 0 --position-embedding-type rope"
    )
    content = plan(capsys, "plan", "--from-megatron-args", line)
    assert content["made_for"]["job"]["layout"]["tensor"] == 8
    path = tmp_path / "run.yaml"
    model = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 50257, "seq_length": 8192}
    parallel = {"tensor_model_parallel_size": 8, "sequence_parallel": True, "bf16": True}
    path.write_text(yaml.safe_dump({"model": model | parallel, "train": {"global_batch_size": 8}}), encoding="utf-8")
    content = plan(capsys, "plan", "--from-yaml", str(path), "--gpus", "8")
    assert content["made_for"]["job"]["seq_length"] == 8192


def test_the_inverse_questions(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("plan", "--model", "gpt-7b", "--gpu", "a800", "--tensor-model-parallel-size", "8")
    assert main([*flags, "--gpus", "8", "--max-seq", "--global-batch-size", "1", "--json"]) == 0
    out = capsys.readouterr()
    longest = int(out.err.split(": ")[1].split()[0])
    job = json.loads(out.out)["megamem"]["made_for"]["job"]
    assert job["seq_length"] == longest
    # MEMO trains a million tokens on these GPUs (arXiv 2407.12117); Megatron 640K.
    assert 900_000 < longest < 8_000_000
    assert main([*flags, "--seq-length", "64k", "--min-gpus", "--json"]) == 0
    out = capsys.readouterr()
    assert out.err == "fewest GPUs on which it fits: 8\n"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--model", "llama3-8b"), "--gpus: needed with --model"),
        (("--model", "llama3-8b", "--gpus", "8"), "--seq-length: needed with --model"),
        (("--model", "lama3-8b", "--gpus", "8", "--seq-length", "8k"), "did you mean 'llama3-8b'"),
        (("--gpus", "8", "--seq-length", "8k"), "give one of --model"),
        (("--model", "llama3-8b", "--gpus", "8", "--seq-length", "8q"), "give a number of tokens"),
        (("--model", "llama3-8b", "--gpus", "8", "--seq-length", "8k", "--gpu", "h1000"), "did you mean 'h100'"),
        (("--model", "llama3-8b", "--gpus", "8", "--seq-length", "8k", "--schedule", "gsi"), "did you mean 'gis'"),
        (("--model", "llama3-8b", "--gpus", "8", "--seq-length", "8k", "--host-memory", "8GB"), "did you mean 8GiB"),
        (
            ("--model", "llama3-8b", "--gpus", "6", "--seq-length", "8k", "--tensor-model-parallel-size", "4"),
            "6 GPUs cannot hold tensor 4; use a multiple of 4",
        ),
        (
            ("--model", "llama3-8b", "--gpus", "33", "--seq-length", "8k", "--pipeline-model-parallel-size", "33"),
            "32 layers cannot be divided by 33 pipeline ranks x 1 chunks; use --pipeline-model-parallel-size 32",
        ),
        (("--model", "llama3-70b", "--gpus", "2", "--seq-length", "8k"), "no layout of 2 GPUs fits"),
        (("--read", "nowhere.yaml"), "no such file"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_a_way_out(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], reason: str
) -> None:
    assert reason in refusal(capsys, "plan", *flags)


ONE_RANK_EACH = (
    "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1", "--context-parallel-size", "1",
    "--expert-model-parallel-size", "1", "--micro-batch-size", "1",
)  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (
            ("--activations", "off", "--device-memory", "110GiB"),
            r"\(75 tried\): the nearest, TP 8 with microbatches of 1 is short of 3\d\.\d GiB of device memory "
            r"\(14\d\.\d needed: 11\d\.\d activations, 11\.2 optimizer states, .*; 110\.0 there\); "
            r"without --activations off there is a plan: \d+\.\d s a step on ",
        ),
        (
            ("--device-memory", "20GiB"),
            r"the nearest, TP 8 .* \d+\.\d GiB of device memory .* without --device-memory 20GiB there is a plan",
        ),
        (
            ("--seq-length", "4m"),
            r"of device memory .* GiB of host memory per GPU \(.* 128\.0 there\); --min-gpus .* finds how many GPUs it "
            "takes, --max-seq how long",
        ),
        (
            ("--seq-length", "1m", "--host-memory", "2GiB", "--activations", "ordered"),
            r"is short of .*GiB of host memory per GPU \(.*, 2\.0 there",
        ),
        (
            ONE_RANK_EACH,
            r"262144.*nothing fits: DP 8 .* gradients.*; without the layout as it is given \(tensor 1, ",
        ),
    ],
)
def test_what_is_short_is_said_of_the_nearest_layout_with_a_way_out(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], pattern: str
) -> None:
    asked = (*LLAMA, *flags)
    assert re.search(pattern, refusal(capsys, *asked))


def test_sparse_residuals_are_found_where_every_input_is_too_much(capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(capsys, *LLAMA, "--host-memory", "1GiB", "--device-memory", "42GiB")
    assert made["activations"]["residual_every"] > 1


def test_a_page_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    assert main([*LLAMA, "--html", str(page)]) == 0
    assert "<svg" in page.read_text(encoding="utf-8")


def test_the_sliders_of_a_page_say_what_a_plan_made_anew_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.html"
    host = 96 << 30
    layout = ("--tensor-model-parallel-size", "1", "--context-parallel-size", "8", "--micro-batch-size", "1")
    asked = (*LLAMA, *layout, "--global-batch-size", "16")
    made = plan(capsys, *asked, "--host-memory", "96GiB", "--html", str(path))
    page = path.read_text(encoding="utf-8")
    grid = json.loads(page.partition("id='what-if-data'>")[2].partition("</script>")[0])
    assert [text.split()[0] for text in grid["seq_lengths"]] == ["65,536", "131,072", "262,144", "524,288", "1,048,576"]
    assert grid["cells"][2][2]["step"] == duration(made["predicted"]["step_seconds"])
    for row, length in ((0, "64k"), (1, "128k"), (2, "256k")):
        for column, nbytes in ((1, host // 2), (3, host * 2)):
            other = plan(capsys, *asked, "--seq-length", length, "--host-memory", f"{nbytes}B")
            cell, predicted = grid["cells"][row][column], other["predicted"]
            assert cell["fits"] and cell["step"] == duration(predicted["step_seconds"])
            assert cell["rate"] == f"{predicted['tokens_per_second_per_gpu']:,.0f}"
    cell = grid["cells"][4][3]
    assert not cell["fits"] and "nothing fits" in cell["choice"]
    assert "no layout of 8 GPUs fits" in refusal(capsys, *asked, "--seq-length", "1m", "--host-memory", f"{host * 2}B")


def test_a_plan_that_is_read_has_its_sliders_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = tmp_path / "plan.yaml", tmp_path / "plan.html"
    assert main([*LLAMA, "-o", str(path)]) == 0
    assert main(["plan", "--read", str(path), "--html", str(page)]) == 0
    assert "what-if-data" in page.read_text(encoding="utf-8")
    path.write_text(path.read_text(encoding="utf-8").replace("hardware: h100", "hardware: gone.json", 1))
    assert main(["plan", "--read", str(path), "--html", str(page)]) == 0
    assert "the page has no what-if" in capsys.readouterr().err


def test_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--list"]) == 0
    out = capsys.readouterr().out
    assert "deepseek-v3" in out and "gb200" in out
