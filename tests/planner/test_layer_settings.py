"""`fp8.saved_activations`, `mlp.tiles` and `vocabulary.keep_logits` in plans: what they cost, when they are chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megamem.cli import main
from megamem.config import LowPrecision, Mlp, load_config
from megamem.errors import ConfigError, InfeasibleError
from megamem.ir.job import Job, Layout
from megamem.planner.costs.layer import LayerTime
from megamem.planner.evaluation import Model, Setup
from megamem.planner.hardware import load_hardware
from megamem.planner.joint.decide import decide
from megamem.planner.joint.layout import Wishes, plan_layout
from megamem.planner.layer_options import LayerOptions
from megamem.planner.memory.device import shared_bytes
from megamem.planner.memory.parameters import padded_vocabulary
from megamem.planner.models import load_model
from megamem.planner.schedules.families import build_schedule
from megamem.planner.schedules.family import Request

H100 = load_hardware("h100")
LONG = Job(
    model=load_model("llama3-8b"),
    layout=Layout(tensor=2, sequence_parallel=True, context=4),
    seq_length=1100 * 1024,
    global_batch_size=4,
)
PIPELINE = replace(
    LONG,
    layout=Layout(tensor=4, sequence_parallel=True, pipeline=4, data=4),
    seq_length=8192,
    global_batch_size=64,
    spec="local",
)
MLP8 = LayerOptions(low_precision=LowPrecision(saved_activations="mlp"))
ALL8 = LayerOptions(low_precision=LowPrecision(saved_activations="all"))
TILES = LayerOptions(mlp=Mlp(tiles=4))


def test_codes_cost_the_bytes_that_kernels_move() -> None:
    """Of Llama 3 8B's layer: 2 x 14336 / 4 numbers a token on a rank, and 4096 of its two norms' inputs."""
    stock, mlp, both = (LayerTime(PIPELINE, 1, H100, options) for options in (LayerOptions(), MLP8, ALL8))
    tokens, act, hidden = 8192, 14336 // 4, 4096 // 4  # hidden: of a token's numbers, what each rank has on average
    codes = tokens * 2 * (act + 4 * act / 128)
    norms = 2 * tokens * hidden * (1 + 4 / 128)
    values = 2 * 2 * tokens * 8 * 128 / 4
    written = {
        name: (one.forward.elementwise - stock.forward.elementwise) * H100.hbm
        for name, one in (("mlp", mlp), ("all", both))
    }
    assert written["mlp"] == pytest.approx(codes + values)
    assert written["all"] == pytest.approx(codes + values + norms)
    rebuilt = codes + 2 * tokens * act + 2 * 2 * 2 * tokens * hidden
    assert mlp.again * H100.hbm == pytest.approx(rebuilt)
    assert stock.again == 0 and mlp.forward.gemm == stock.forward.gemm and mlp.weight == stock.weight


def test_tiles_cost_the_activation_function_and_sums_of_weight_gradients() -> None:
    stock, tiled = (LayerTime(PIPELINE, 1, H100, options) for options in (LayerOptions(), TILES))
    act = 8192 * 14336 // 4
    assert tiled.again * H100.hbm == pytest.approx(2 * 3 * act)
    sums = 3 * 8 * 3 * 4096 * 14336 / 4  # three more tiles, three matrices in fp32, read and written
    copied = 2 * 2 * 8192 * 4096 / 4
    assert (tiled.backward.elementwise - stock.backward.elementwise) * H100.hbm == pytest.approx(sums + copied)
    together = [one.backward.gemm + one.weight.gemm for one in (stock, tiled)]
    assert together[0] == pytest.approx(together[1]) and tiled.weight.gemm < stock.weight.gemm / 2


def test_kept_logits_save_one_product_of_four_and_cost_their_bytes() -> None:
    schedule = build_schedule("1f1b", Request(num_ranks=4, num_microbatches=16, vocabulary=1))
    model = Model(PIPELINE, H100)
    again, kept = (model.price(Setup(schedule=schedule, barriers=1, keep_logits=keep)) for keep in (False, True))
    words = padded_vocabulary(PIPELINE.model, 16) / 16
    logits = 2 * 8192 * 4096 * words / H100.gemm
    saved = again.time["output_layer"] - kept.time["output_layer"]
    assert saved == pytest.approx(16 * logits)
    nbytes = [shared_bytes(PIPELINE, 1, shards=4, keep_logits=keep) for keep in (False, True)]
    assert nbytes[1] - nbytes[0] == pytest.approx(8192 * words * 2)
    more = [two.peak - one.peak for one, two in zip(again.memory, kept.memory, strict=True)]
    assert max(more) >= nbytes[1] - nbytes[0]


def wishes(**more: Any) -> Wishes:
    return Wishes(**{"host": 128.0 * 2**30, "weighs_tiles": True, **more})


def test_tiles_are_chosen_where_they_help_and_codes_never() -> None:
    short = plan_layout(replace(LONG, seq_length=16384), H100, wishes())
    assert short.best.options == LayerOptions()
    long = plan_layout(LONG, H100, wishes())
    assert long.best.options.mlp.is_on and not long.best.options.rebuilds
    with pytest.raises(InfeasibleError):
        plan_layout(LONG, H100, wishes(weighs_tiles=False))
    assert all(rank.peak <= rank.limit for rank in long.best.priced.memory)


def test_logits_are_kept_where_there_is_memory_for_them() -> None:
    found = [
        plan_layout(PIPELINE, H100, wishes(schedule="gis", vocabulary="parallel", keep_logits=keep))
        for keep in (None, False)
    ]
    assert found[0].best.frame.keep_logits and not found[1].best.frame.keep_logits
    assert found[0].best.priced.step_seconds < found[1].best.priced.step_seconds
    asked = plan_layout(PIPELINE, H100, wishes(schedule="gis", vocabulary="parallel", keep_logits=True))
    assert asked.best.priced.step_seconds == pytest.approx(found[0].best.priced.step_seconds, rel=0.01)


def test_what_a_running_job_has_on_counts_when_the_rest_is_decided() -> None:
    shorter = replace(LONG, seq_length=524288)
    sections: dict[str, Any] = {"activations": {"policy": "auto"}, "vocabulary": {"fused_loss": True}}
    stock = decide(load_config(sections), shorter, H100)
    coded = decide(load_config({**sections, "fp8": {"saved_activations": "mlp"}}), shorter, H100)
    assert coded.fp8.saved_activations == "mlp" and stock.fp8.saved_activations == "off"
    times = [one.plan.predicted.time for one in (stock, coded)]  # type: ignore[union-attr]
    assert times[1]["elementwise"] > times[0]["elementwise"]
    assert coded.plan is not None and coded.plan.predicts(coded.settings())
    assert load_config(coded.to_dict()).settings() == coded.settings()
    subjects = {row.subject: row for row in coded.plan.predicted.decisions}  # type: ignore[union-attr]
    assert subjects["fp8.saved_activations"].fate == "mlp"


@pytest.mark.parametrize(
    ("job", "sections", "message"),
    [
        (LONG, {"fp8": {"saved_activations": "all"}}, "Transformer Engine.*take mlp"),
        (LONG, {"fp8": {"saved_activations": "regelu2"}}, "without a gate; take mlp"),
        (LONG, {"fp8": {"saved_activations": "mlp"}, "mlp": {"tiles": 4}}, "switch one of them off"),
        (replace(LONG, model=load_model("qwen3-30b-a3b")), {"mlp": {"tiles": 4}}, "no layer of the model has a dense"),
    ],
)
def test_what_the_job_would_be_refused_for_is_told_by_the_plan(job: Job, sections: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decide(load_config({**sections, "activations": {"policy": "auto"}}), job, H100)


TIGHT = ("plan", "--model", "llama3-8b", "--gpus", "8", "--seq-length", "256k", "--json")

RECOMPUTING = (
    *("plan", "--model", "llama3-8b", "--gpus", "16", "--seq-length", "16k", "--global-batch-size", "256", "--json"),
    *("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "1", "--context-parallel-size", "1"),
    *("--expert-model-parallel-size", "1", "--micro-batch-size", "2", "--device-memory", "60GiB"),
    *("--host-memory", "512MiB"),
)


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(list(flags)) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)["megamem"]
    return content


def test_a_plan_begins_with_what_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock = planned(capsys, *TIGHT)
    assert stock["fp8"] == {"saved_activations": "off"}
    path = tmp_path / "given.yaml"
    path.write_text(
        "megamem: {fp8: {saved_activations: mlp, group: 64}, vocabulary: {fused_loss: true, loss_chunk: 4096}}"
    )
    given = planned(capsys, *TIGHT, "--megamem", str(path))
    assert given["fp8"]["group"] == 64 and given["vocabulary"]["loss_chunk"] == 4096
    flags = planned(capsys, *TIGHT, "--megamem-fp8-saved-activations", "mlp", "--megamem-mlp-tiles", "off")
    assert flags["fp8"]["saved_activations"] == "mlp"
    line = (
        "torchrun --nproc_per_node 8 pretrain_gpt.py --num-layers 32 --hidden-size 4096 --num-attention-heads 32 "
        "--seq-length 65536 --vocab-size 50257 --bf16 --tensor-model-parallel-size 8 --sequence-parallel --swiglu "
        "--global-batch-size 4 --attention-dropout 0 --hidden-dropout 0 --megamem-mlp-tiles 5"
    )
    assert planned(capsys, "plan", "--from-megatron-args", line, "--json")["mlp"] == {"tiles": 5}
    run = tmp_path / "run.yaml"
    model = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 50257, "seq_length": 8192}
    model |= {"gated_linear_unit": True, "bf16": True, "tensor_model_parallel_size": 8, "sequence_parallel": True}
    content = {"model": model, "megamem": {"fp8": {"saved_activations": "rebuild"}}}
    run.write_text(yaml.safe_dump(content), encoding="utf-8")
    found = planned(capsys, "plan", "--from-yaml", str(run), "--gpus", "8", "--json")
    assert found["fp8"]["saved_activations"] == "rebuild"


def test_codes_are_named_where_memory_costs_time_and_where_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    others = planned(capsys, *RECOMPUTING)["predicted"]["alternatives"]
    (coded,) = [one for one in others if one["name"] == "fp8 mlp"]
    assert (
        "not chosen: gradients carry the error of 8 bits; add --megamem-fp8-saved-activations mlp" in coded["verdict"]
    )
    assert "% faster" in coded["verdict"] and "GiB less left alone" in coded["verdict"]
    assert main([*TIGHT, "--activations", "off", "--device-memory", "130GiB"]) == 2
    assert "--megamem-fp8-saved-activations mlp it fits" in capsys.readouterr().err


def test_compression_that_is_asked_for_is_priced_and_else_named(capsys: pytest.CaptureFixture[str]) -> None:
    short = (*TIGHT, "--tensor-model-parallel-size", "1", "--context-parallel-size", "8", "--host-memory", "64GiB")
    plain = planned(capsys, *short)
    asked = ("--megamem-activations-policy", "auto", "--megamem-activations-compress", "fp8")
    coded = planned(capsys, *short, *asked)
    assert plain["activations"]["compress"] == "none" and coded["activations"]["compress"] == "fp8"
    assert coded["predicted"]["step_seconds"] < plain["predicted"]["step_seconds"]
    reasons = [one["reason"] for one in coded["predicted"]["decisions"] if one["subject"].startswith("fc1")]
    assert any("in 8 bits" in reason for reason in reasons)
    (named,) = [one for one in plain["predicted"]["alternatives"] if one["name"] == "compress fp8"]
    assert "faster; not chosen: gradients carry the error of 8 bits; add " + " ".join(asked) in named["verdict"]
    # Beside what is asked for already, other options keep their own names.
    names = [one["name"] for one in planned(capsys, *RECOMPUTING, *asked)["predicted"]["alternatives"]]
    assert "fp8 mlp" in names and "compress fp8" not in names
    # Where computing covers all copies, codes would only take time.
    assert "compress fp8" not in str(planned(capsys, *short[:-2])["predicted"]["alternatives"])


def test_a_chunk_of_the_loss_that_is_asked_for_is_priced(capsys: pytest.CaptureFixture[str]) -> None:
    layout = (
        "--tensor-model-parallel-size",
        "1",
        "--context-parallel-size",
        "8",
        "--megamem-vocabulary-fused-loss",
        "true",
    )
    sizes = []
    for chunk in ("4096", "16384"):
        plan = planned(capsys, *TIGHT, *layout, "--megamem-vocabulary-loss-chunk", chunk)
        assert plan["vocabulary"]["loss_chunk"] == int(chunk)
        sizes.append(plan["predicted"]["memory"][0]["kinds"]["output_layer"])
    tokens = (256 << 10) // 8
    assert sizes[1] - sizes[0] == tokens * (16384 - 4096) * 2  # logits in bf16, which become their gradient
