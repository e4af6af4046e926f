"""Predicted activation memory with `fp8.saved_activations` and `mlp.tiles` against real Megatron-Core layers.

As without them (`test_activation_memory`): exact to the byte, what each layer saves and the peak of every rank, alone
and under the policies, in pipelines, with tensor and sequence parallelism and with weight gradients apart; with experts
within 3 % on average over the ranks, whose loads differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megamem.config import load_config
from megamem.ir.job import Job
from megamem.ir.schedule import Schedule
from megamem.planner.activations import plan_activations
from megamem.planner.layer_options import LayerOptions
from megamem.planner.memory.activations import ActivationMemory, metered_peaks, single_rank_schedule
from megamem.planner.memory.device import shared_bytes
from megamem.planner.schedules.families import build_schedule
from megamem.planner.schedules.family import Request
from megamem.testing.jobs import job_of_case

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]

SIZES: Fields = {"hidden": 32, "heads": 4, "sequence": 32, "vocab": 128}
GPT: Fields = {**SIZES, "ffn": 128, "activation": "gelu", "norm": "LayerNorm", "bias": True}
LLAMA: Fields = {**SIZES, "kv_groups": 2, "ffn": 96, "activation": "swiglu", "norm": "RMSNorm", "bias": False}
MOE: Fields = {**LLAMA, "experts": 4, "config": {"moe_shared_expert_intermediate_size": 64}}


STOCK: Fields = {"flash_attention": False, "stock_norms": True}


def fp8(mode: str) -> Fields:
    return {"fp8": {"saved_activations": mode, **({"group": 40} if mode in ("mlp", "all") else {})}}


OPTIONS: dict[str, Fields] = {
    **{mode: fp8(mode) for mode in ("rebuild", "mlp", "all", "regelu2")},
    "tiles": {"mlp": {"tiles": 3}},
}
LAYERS: dict[str, tuple[int, Fields]] = {
    "gpt": (1, GPT),
    "gpt, learned positions": (1, {**GPT, "position": "learned_absolute"}),
    "llama, bf16": (1, {**LLAMA, "bf16": True}),
    "llama, bias": (1, {**LLAMA, "bias": True}),
    "llama, query norms": (1, {**LLAMA, "qk_layernorm": True}),
    "llama, dropout": (1, {**LLAMA, "dropout": 0.1}),
    "llama, Megatron's own kernels": (1, {**LLAMA, **STOCK, "bf16": True}),
    "gpt, tp": (2, {**GPT, "tp": 2}),
    "llama, sp": (2, {**LLAMA, "tp": 2, "sp": True, "bf16": True}),
}
NOT_WITH_A_GATE = "regelu2"


def _case(fields: Fields, layers: int) -> Any:
    import torch

    from megamem.testing.models import GptCase

    values = dict(fields)
    dtype = torch.bfloat16 if values.pop("bf16", False) else torch.float32
    return GptCase(**values, layers=layers, dtype=dtype)


def _job(fields: Fields, layers: int, microbatches: int) -> Job:
    """On a rank: whoever imports Megatron hears what it deprecates."""
    job = job_of_case(_case({**fields, "bf16": False}, layers), num_microbatches=microbatches)
    return replace(job, bf16=fields.get("bf16", False))


def options_of(sections: Fields) -> LayerOptions:
    config = load_config({name: sections[name] for name in ("fp8", "mlp") if name in sections})
    return LayerOptions(low_precision=config.fp8, mlp=config.mlp)


def modes_of(fields: Fields) -> list[str]:
    return [name for name in OPTIONS if fields["activation"] == "gelu" or name != NOT_WITH_A_GATE]


def saved_by_a_layer(fields: Fields, modes: list[str]) -> dict[str, tuple[int, Any]]:
    """Per option: the bytes that a layer keeps, and the engine's entries: name, bytes, whether a replay makes them."""
    import megamem
    from megamem.testing.models import build_gpt, init_parallel, train_steps

    case = _case(fields, 1)
    init_parallel(case)
    found = {}
    for mode in modes:
        with megamem.enable(OPTIONS[mode]) as handle:
            meter = handle.meter()
            train_steps(build_gpt(case), case, num_microbatches=1)
            peak = meter.peak_bytes
        with megamem.enable({**OPTIONS[mode], "activations": {"policy": "recompute"}}) as handle:
            train_steps(build_gpt(case), case, num_microbatches=1)
            assert handle.engine is not None
            known = list(handle.engine._known.values())
        signatures = [signature for one in known for signature in one.signatures.values()]
        entries = [(entry.name, entry.nbytes, bool(entry.sources)) for one in signatures for entry in one.entries]
        found[mode] = peak, sorted(entries)
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_saves_what_is_in_the_inventory(dist: Dist, name: str) -> None:
    ranks, fields = LAYERS[name]
    (job,) = dist(1)(_job, fields, 1, 1)
    for mode, (measured, entries) in dist(ranks)(saved_by_a_layer, fields, modes_of(fields))[0].items():
        memory = ActivationMemory(job, None, options_of(OPTIONS[mode]))
        tensors = memory.kind(1).tensors
        expected = [
            (t.name, t.nbytes, t.rebuilt) for t in tensors if not (t.routed or t.tiled or t.on_demand or t.shared)
        ]
        assert sorted(expected) == entries, mode
        assert memory.stage(0)[0].kept == measured, mode


KEEP_NONE: Fields = {"keep_last_layers": 0}
POLICIES: dict[str, Fields] = {
    "alone": {},
    "recompute": {"policy": "recompute"},
    "residual": {"policy": "recompute", "residual_every": 2},
    "memo": {"policy": "memo"},
    "memo, all": {"policy": "memo", **KEEP_NONE},
    "memo, half": {"policy": "memo", "swap_fraction": 0.5, **KEEP_NONE},
    "memo, residual": {"policy": "memo", "swap_fraction": 0.0, "residual_every": 2, **KEEP_NONE},
    "ordered": {"policy": "ordered", "swap_fraction": 0.25, **KEEP_NONE},
    "table": {
        "policy": "ordered",
        **KEEP_NONE,
        "table": [
            {"layers": "3", "saved": "keep"},
            {"layers": "4", "saved": 0.25, "fc1": 0.75, "projection": 0.125, "qkv": "0.5@hbm"},
            {"layers": 1, "fc1": "0.5@hbm", "saved": 0.25, "qkv": "keep", "mlp": 0.375},
        ],
    },
}
FEW = ("alone", "memo, half", "memo, residual", "table")
MOST = ("all", "tiles")  # what changes most; the modes between them save what the first test has looked at
RUNS: dict[str, tuple[int, Fields, tuple[str, ...], tuple[str, ...], str]] = {
    "llama": (1, LLAMA, MOST, tuple(POLICIES), ""),
    "llama, other modes": (1, LLAMA, ("rebuild", "mlp"), ("memo, half", "ordered"), ""),
    "gpt": (1, GPT, ("regelu2", "tiles"), ("alone", "memo, half"), ""),
    "llama, pipeline": (2, {**LLAMA, "pp": 2}, MOST, FEW, ""),
    "llama, sequence": (2, {**LLAMA, "tp": 2, "sp": True}, MOST, FEW, ""),
    "llama, zb-h2": (2, {**LLAMA, "pp": 2}, MOST, ("alone", "memo, all"), "zb-h2"),
    "llama, gis": (2, {**LLAMA, "pp": 2, "vpp": 2}, MOST, ("memo, all",), "gis"),
}


def peaks_of(fields: Fields, configs: dict[str, Fields]) -> dict[str, int]:
    """What a meter shows of this rank after two steps of four microbatches."""
    import megamem
    from megamem.testing.models import build_gpt, init_parallel, train_steps

    case = _case(fields, 4)
    init_parallel(case)
    peaks = {}
    for name, config in configs.items():
        with megamem.enable(config) as handle:
            meter = handle.meter()
            train_steps(build_gpt(case), case, num_microbatches=4, steps=2)
            peaks[name] = meter.peak_bytes
    return peaks


def predicted(job: Job, config: Fields, schedule: Schedule) -> list[int]:
    loaded, options = load_config(config), options_of(config)
    plan = plan_activations(loaded.activations, 4, loaded.fp8) if loaded.activations.is_on else None
    return list(metered_peaks(job, plan, schedule, options))


def schedule_of(fields: Fields, name: str) -> Schedule:
    if "pp" not in fields:
        return single_rank_schedule(4)
    return build_schedule(name or "1f1b", Request(num_ranks=2, num_microbatches=4, num_chunks=fields.get("vpp", 1)))


@pytest.mark.parametrize("name", RUNS)
def test_a_step_holds_at_most_what_is_predicted(dist: Dist, name: str) -> None:
    ranks, fields, modes, policies, family = RUNS[name]
    configs: dict[str, Fields] = {
        f"{mode}, {policy}": {
            **OPTIONS[mode],
            **({"activations": POLICIES[policy]} if policy != "alone" else {}),
            **({"schedule": {"name": family}} if family else {}),
        }
        for mode in modes
        for policy in policies
    }
    found = dist(ranks)(peaks_of, fields, configs, timeout=240)
    stages = range(0, ranks, fields.get("tp", 1))
    measured = {key: [found[rank][key] for rank in stages] for key in configs}
    (job,) = dist(1)(_job, fields, 4, 4)
    schedule = schedule_of(fields, family)
    assert {key: predicted(job, config, schedule) for key, config in configs.items()} == measured


@pytest.mark.parametrize("layout", [{}, {"ep": 2}], ids=["one rank", "ep"])
def test_experts_are_predicted_within_three_percent_on_average(dist: Dist, layout: Fields) -> None:
    fields = {**MOE, **layout}
    configs = {mode: OPTIONS[mode] for mode in ("rebuild", "mlp", "all")}
    found = dist(layout.get("ep", 1))(peaks_of, fields, configs)
    (job,) = dist(1)(_job, fields, 4, 4)
    shared = replace(job.model.experts, shared_ffn_hidden_size=64)
    job = replace(job, model=replace(job.model, experts=shared))
    for mode, config in configs.items():
        measured = sum(rank[mode] for rank in found) / len(found)
        assert predicted(job, config, single_rank_schedule(4))[0] == pytest.approx(measured, rel=0.03), mode


def kept_from_s_to_t(fields: Fields, barriers: int) -> dict[bool, int]:
    """Bytes of what one microbatch leaves between S and T on this rank, without and with its logits."""
    import megamem
    from megamem.runtime.vocabulary.passes import SharedVocabulary
    from megamem.testing.models import build_gpt, init_parallel, train_steps
    from megamem.testing.trials import mutated

    case = _case(fields, 2)
    init_parallel(case)
    found: dict[bool, int] = {}
    statistics = SharedVocabulary._statistics
    for keeps in (False, True):
        seen = []

        def watched(passes: Any, microbatch: int, seen: list[int] = seen) -> None:
            statistics(passes, microbatch)
            kept = passes._kept[microbatch]
            seen.append(0 if kept.logits is None else kept.logits.untyped_storage().nbytes())

        sections = {"parallel": True, "barriers": barriers, "keep_logits": keeps}
        with mutated(SharedVocabulary, "_statistics", watched), megamem.enable({"vocabulary": sections}):
            train_steps(build_gpt(case), case, num_microbatches=4)
        assert len(set(seen)) == 1
        found[keeps] = seen[0]
    return found


@pytest.mark.parametrize("layout", [{"pp": 2}, {"pp": 2, "tp": 2, "sp": True}], ids=["pp2", "tp2 sp pp2"])
def test_kept_logits_take_what_is_predicted(dist: Dist, layout: Fields) -> None:
    """Of a vocabulary that needs no padding; the planner counts Megatron's, the shards have none."""
    fields = {**LLAMA, **layout, "vocab": 1024}
    found = dist(2 * layout.get("tp", 1))(kept_from_s_to_t, fields, 1)
    (job,) = dist(1)(_job, fields, 2, 4)
    more = shared_bytes(job, 1, shards=2, keep_logits=True) - shared_bytes(job, 1, shards=2)
    assert found == [{False: 0, True: more}] * len(found)
