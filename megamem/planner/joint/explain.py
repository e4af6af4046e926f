"""A settled layout as a plan: the configuration, the predictions, and the tables that say why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from megamem.config import Config
from megamem.errors import InfeasibleError
from megamem.ir.activation import ANCHORS, BASE, SAVED, Fate
from megamem.ir.pipeline_split import layout_text
from megamem.ir.plan import (
    Alternative,
    Decision,
    MadeFor,
    Plan,
    Prediction,
    Span,
    Utilization,
    digest,
    parse_plan,
)
from megamem.ir.schedule import COMMUNICATION
from megamem.planfile import installed
from megamem.planner.activations import plan_activations
from megamem.planner.costs.work import MFU_FORMULA, model_flops
from megamem.planner.evaluation import Model, Priced, with_timelines
from megamem.planner.fractions.table import text_of
from megamem.planner.joint.layout import STOCK, LayoutPlan, Wishes, in_full
from megamem.planner.joint.search import Found
from megamem.planner.joint.settle import Frame, Settled, settle
from megamem.planner.joint.simple import ONE_FRACTION, with_fraction
from megamem.planner.joint.split import is_balanced
from megamem.planner.joint.unasked import unasked
from megamem.planner.layer_options import STOCK_LAYERS
from megamem.planner.memory.activations import ActivationMemory
from megamem.planner.memory.inventory import storage_bytes
from megamem.sections import Allocator, Scheduling, Vocabulary

_MOST_ACTIONS = 6000  # of a plan's picture of the pipeline
_FRONT = (0.6, 0.8)  # shares of the memory limit at which the front is looked at, besides all of it
_NOTES = (
    "No number of this plan was measured on a GPU by megamem; activation bytes are checked against real Megatron-Core "
    "layers on CPUs, working space and the caching allocator's share are counted.",
    "Left out: contention of copies with memory-bound kernels, launch times of kernels, data loading, imbalance of "
    "experts.",
)


def explain(planned: LayoutPlan, wishes: Wishes, extra: Sequence[Alternative] = ()) -> Config:
    """The configuration of a settled layout with its plan; `extra` alternatives are of other layouts."""
    short, planned = planned, in_full(planned)
    best, model = planned.best, planned.model
    config = config_of(best)
    alternatives = [*_settled(planned), *_policies(model, best), *_estimated(planned), *extra]
    others = [*alternatives, *unasked(short, wishes, best.priced.step_seconds)]
    mine = _alternative("this plan", best.priced, best.frame.host, best.priced.step_seconds, {})
    prediction = Prediction(
        step_seconds=best.priced.step_seconds,
        time=best.priced.time,
        memory=with_timelines(best.priced),
        traffic=best.priced.traffic,
        utilization=utilization(model, best.priced.step_seconds),
        tokens_per_second_per_gpu=throughput(model, best.priced.step_seconds),
        decisions=(*_options(planned, wishes), *_fates(model, best)),
        alternatives=tuple(sorted(_unique(others), key=lambda one: (not one.fits, one.step_seconds))),
        front=_front([mine, *alternatives, *_smaller(model, best)]),
        hardware=model.hardware.source_text(),
        notes=_NOTES,
        pipeline=_pipeline(best.priced),
    )
    made_for = MadeFor(
        job=planned.job,
        megamem=installed("megamem") or "",
        megatron_core=installed("megatron-core") or "",
        hardware=model.hardware.name,
        settings=digest(config.settings()),
    )
    plan = Plan(made_for=made_for, predicted=prediction)
    return replace(config, plan=parse_plan(plan.to_dict()))  # numbers as a file holds them


def config_of(settled: Settled) -> Config:
    """The settings that a setup needs, with no `auto` left."""
    frame = settled.frame
    schedule, vocabulary = Scheduling(), Vocabulary(fused_loss=frame.fused_loss)
    chunks = frame.schedule.placement.num_chunks
    name = frame.name
    if frame.barriers is not None:
        vocabulary = Vocabulary(parallel=True, barriers=frame.barriers, keep_logits=frame.keep_logits)
        name = ("interleaved" if chunks > 1 else "1f1b") if name == STOCK else name  # its passes need a schedule
    if name != STOCK:
        group = {} if frame.group is None else {"group": frame.group}
        schedule = Scheduling(name=name, chunks=chunks, **group)  # type: ignore[arg-type]
    return Config(
        activations=settled.activations,
        schedule=schedule,
        vocabulary=vocabulary,
        allocator=Allocator(mode="static") if frame.static else Allocator(),
        fp8=settled.options.low_precision,
        mlp=settled.options.mlp,
    )


def utilization(model: Model, seconds: float) -> Utilization:
    """Of a step of the model's job that takes so long."""
    flops = model_flops(model.job)
    peak = model.hardware.peak_flops
    mfu = flops / (model.job.layout.world_size * seconds * peak)
    return Utilization(mfu=mfu, formula=MFU_FORMULA, model_flops=flops, peak_flops_per_gpu=peak)


def throughput(model: Model, seconds: float) -> float:
    """Tokens per second and GPU."""
    job = model.job
    return job.seq_length * job.global_batch_size / seconds / job.layout.world_size


# -- reasons -----------------------------------------------------------------------------------------------------------


def _options(planned: LayoutPlan, wishes: Wishes) -> Iterable[Decision]:
    """Why the schedule, the output layer and the allocator are what they are."""
    best, frame = planned.best, planned.best.frame
    if planned.job.layout.pipeline > 1:
        fate = "Megatron's own" if frame.name == STOCK else frame.name
        behind = _behind(planned)
        idle = best.priced.time.get("bubble", 0.0) / best.priced.step_seconds
        why = "as asked" if wishes.schedule != "auto" else f"the fastest that fits{behind}"
        yield Decision(subject="schedule.name", fate=fate, reason=f"{why}; ranks idle {idle:.1%} of the step")
        if split := planned.job.layout.split:
            model = planned.job.model
            text = "the busiest rank has as few as can be" if is_balanced(planned.job) else "as asked"
            yield Decision(
                subject="pipeline_model_parallel_layout",
                fate=layout_text(split, model.mtp_num_layers),
                reason=f"{model.num_layers} layers in {len(split)} stages: {text}",
            )
    logits = max(rank.kinds.get("output_layer", 0) for rank in best.priced.memory)
    text = f"logits and loss take {logits / 2**30:.1f} GiB, and leaving them saves a matrix product"
    if frame.fused_loss:
        text = f"the logits' memory saves more than their second product costs; now {logits / 2**30:.1f} GiB"
    if frame.barriers is not None:
        text = "the last rank would be slower and fuller than the others; now all of them share the output layer"
        if frame.keep_logits:
            text += "; logits are kept from S to T: three matrix products instead of four"
    yield Decision(subject="vocabulary", fate=_loss_text(frame), nbytes=logits, reason=text)
    lost = max(rank.kinds.get("fragmentation", 0) for rank in best.priced.memory)
    text = (
        "memory that the caching allocator cannot use would have to be saved by recomputation or waits"
        if frame.static
        else f"the caching allocator's share of {lost / 2**30:.1f} GiB costs no time"
    )
    yield Decision(subject="allocator.mode", fate="static" if frame.static else "off", nbytes=lost, reason=text)
    yield from _layer_options(planned, wishes)


def _layer_options(planned: LayoutPlan, wishes: Wishes) -> Iterable[Decision]:
    """Why layers save something else than stock's."""
    model, job = planned.model, planned.job
    options, number = model.options, next((n for n in range(1, job.model.num_layers + 1) if not job.model.is_moe(n)), 1)
    if options == STOCK_LAYERS:
        return
    ours, stock = (storage_bytes(memory.kind(number).tensors) for memory in (model.memory(None), _stock(model)))
    again = model.layer(number).again
    text = (
        f"a layer saves {ours / 2**20:,.0f} MiB instead of {stock / 2**20:,.0f}, and computes {again * 1e3:.3g} ms anew"
    )
    if options.rebuilds:
        yield Decision(subject="fp8.saved_activations", fate=options.mode, nbytes=ours, reason=f"as asked; {text}")
    if options.mlp.is_on:
        why = "less is recomputed or waited for than without"
        if wishes.options.mlp.is_on:
            why = "as asked"
        elif all(one.options.mlp.is_on for one in planned.others):
            why = "without them nothing fits"
        tiles = f"{options.mlp.tiles}, {options.tiles(job, number)} tiles"
        yield Decision(subject="mlp.tiles", fate=tiles, nbytes=ours, reason=f"{why}; {text}; launches count nothing")


def _stock(model: Model) -> ActivationMemory:
    return Model(model.job, model.hardware, model.limit).memory(None)


def _behind(planned: LayoutPlan) -> str:
    """How far the next best schedule is behind: settled if one is, else by its estimate."""
    best = planned.best
    settled = [one.priced.step_seconds for one in planned.others if one.frame.name != best.frame.name]
    estimated = [one.seconds for one in planned.estimated if one.frame.name != best.frame.name and not one.fault]
    seconds = min(settled or [one for one in estimated if one > best.priced.step_seconds], default=None)
    return "" if seconds is None else f"; the next best needs {_percent(seconds / best.priced.step_seconds)} more"


def _fates(model: Model, best: Settled) -> Iterable[Decision]:
    """One row for each tensor and fate, with the layers that have it."""
    if not best.fates and best.activations.is_on:  # the user's own policy
        yield _policy(model, best)
        return
    if not best.fates:
        untouched = "everything that layers save fits: nothing is swapped, nothing computed twice"
        yield Decision(subject="activations.policy", fate="off", reason=untouched)
        return
    yield _policy(model, best)
    yield from _experts(model, best)
    memory = model.memory(None, recompute="none")
    stalls = best.priced.time.get("exposed_copies", 0.0)
    hidden = stalls < 0.01 * best.priced.step_seconds
    rows: dict[tuple[str, str], list[int]] = {}
    for name in (*BASE, *ANCHORS, SAVED):
        for number, fates in best.fates.items():
            if name in fates:
                rows.setdefault((name, str(fates[name])), []).append(number)
    for (name, _), numbers in rows.items():
        fate = best.fates[numbers[0]][name]
        kind, times = memory.kind(numbers[0]), model.layer(numbers[0])
        whole = (
            sum(one.nbytes for one in kind.tensors if one.name == name)
            if name in BASE
            else next((one.nbytes for one in kind.anchors if one.name == name), 0)
            if name in ANCHORS
            else sum(one.nbytes for one in kind.tensors if one.rebuilt and not one.routed)
        )
        seconds = times.anchors.get(name, times.rebuild if name == SAVED else 0.0)
        if name == "attention_output":
            seconds = times.forward.attention
        yield Decision(
            subject=name,
            layers=text_of(numbers),
            fate=_word(fate),
            fraction=fate.fraction if fate.fraction else 1.0,
            nbytes=round(whole * (fate.fraction or 1.0)),
            seconds=seconds,
            hidden=hidden or _word(fate) != "swap",
            reason=_reason(model, name, best.fates[numbers[0]], (whole, seconds), hidden=hidden),
        )


def _experts(model: Model, best: Settled) -> Iterable[Decision]:
    """What becomes of what experts save: of all of it, in all layers."""
    numbers = [number for number in range(1, model.job.model.num_layers + 1) if model.job.model.is_moe(number)]
    if not numbers:
        return
    nbytes = sum(one.nbytes for one in model.memory(None).kind(numbers[0]).tensors if one.routed)
    seconds, fate = model.layer(numbers[0]).experts, best.activations.experts
    rate, link = f"making it again yields {_rate(nbytes / seconds)}", f"the link copies {_rate(model.rates[0])}"
    reasons = {
        "keep": f"there is device memory for it; {rate}",
        "swap": f"{rate}, {link}",
        "recompute": f"{rate}, {link}; a layer's exchanges are run again as well",
    }
    yield Decision(
        subject="activations.experts",
        layers=text_of(numbers),
        fate=fate,
        nbytes=nbytes,
        seconds=seconds,
        reason=reasons[fate],
    )


def _policy(model: Model, best: Settled) -> Decision:
    """Why anything is done about activations at all."""
    untouched = max(rank.peak - rank.limit for rank in model.price(best.frame.setup(None)).memory)
    time, seconds = best.priced.time, best.priced.step_seconds
    lost = (time.get("recompute", 0.0) + time.get("exposed_copies", 0.0)) / seconds
    why = f"left alone they need {untouched / 2**30:.1f} GiB more than there is" if untouched > 0 else "as asked"
    return Decision(
        subject="activations.policy",
        fate=best.activations.policy,
        reason=f"{why}; this costs {lost:.1%} of the step in recomputation and waits",
    )


def _word(fate: Fate) -> str:
    return "recompute" if fate.fraction == 0 else "keep" if fate.tier == "hbm" else "swap"


def _reason(model: Model, name: str, fates: Mapping[str, Fate], size: tuple[int, float], *, hidden: bool) -> str:
    """Why a tensor has its fate in a layer with these `fates`; `size`: its bytes and seconds to rebuild it."""
    fate, (nbytes, seconds) = fates[name], size
    rate = f"rebuilding it yields {_rate(nbytes / seconds)}" if seconds else "it cannot be rebuilt alone"
    link = f"the link copies {_rate(model.rates[0])}"
    if fate.fraction == 0 and name in ANCHORS and fates[SAVED].fraction == 1:
        return "not needed: all that is made of it is stored"
    if fate.fraction == 0:
        return f"{rate}, {link}; memory is better spent on what is denser"
    if fate.tier == "hbm":
        return f"{rate}; there is device memory for it"
    coded = model.options.compress != "none" and name in (SAVED, "fc1")
    how = "in 8 bits; " if coded and not model.options.codes_activations else ""
    return f"{rate}, {link}; {how}" + ("copies hide behind computing" if hidden else "waiting for it costs less still")


def _rate(bytes_per_second: float) -> str:
    gigabytes = bytes_per_second / 1e9
    return f"{gigabytes / 1e3:.3g} TB/s" if gigabytes >= 1e3 else f"{gigabytes:.3g} GB/s"


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):.1f} %"


def layouts(found: Found) -> list[Alternative]:
    """The other layouts of a search, against the best."""
    best = found.plans[0].best.priced.step_seconds
    return [
        _alternative(
            f"{plan.job.layout.text()}, microbatches of {plan.job.micro_batch_size}",
            plan.best.priced,
            plan.best.frame.host,
            best,
            {
                f"layout.{name}": str(getattr(plan.job.layout, name))
                for name in ("tensor", "context", "pipeline", "expert")
            },
        )
        for plan in found.plans[1:]
    ]


# -- alternatives ------------------------------------------------------------------------------------------------------


def _alternative(name: str, priced: Priced, host: float, best: float, settings: Mapping[str, str]) -> Alternative:
    fits = priced.fits(host)
    slower = priced.step_seconds / best
    if not fits:
        fullest = max(priced.memory, key=lambda rank: rank.peak - rank.limit)
        over = (fullest.peak - fullest.limit) / 2**30
        verdict = f"does not fit: {over:.1f} GiB over on pipeline rank {fullest.rank}"
        if over <= 0:
            verdict = f"does not fit: {(priced.host - host) / 2**30:.1f} GiB of host memory over"
    elif slower > 1 + 5e-4:
        verdict = f"{_percent(slower)} slower"
    else:
        verdict = "as fast" if slower > 1 - 5e-4 else f"{-100 * (slower - 1):.1f} % faster"
    return Alternative(
        name=name,
        step_seconds=priced.step_seconds,
        peak_memory=priced.peak,
        host_memory=priced.host,
        fits=fits,
        verdict=verdict,
        settings=dict(settings),
    )


def _settled(planned: LayoutPlan) -> Iterable[Alternative]:
    """Other schedules and losses, with activations of their own."""
    best = planned.best.priced.step_seconds
    for one in planned.others:
        settings = {"schedule.name": one.frame.name, "vocabulary": _loss_text(one.frame)}
        chunks = one.frame.schedule.placement.num_chunks
        name = f"{schedule_text(one.frame.name, chunks)}, {_loss_text(one.frame)}"
        if one.options.mlp != planned.best.options.mlp:
            settings["mlp.tiles"] = str(one.options.mlp.tiles)
            name += ", MLP in tiles" if one.options.mlp.is_on else ", MLP whole"
        yield _alternative(name, one.priced, one.frame.host, best, settings)


def _loss_text(frame: Frame) -> str:
    if frame.barriers:
        return "shared vocabulary, logits kept" if frame.keep_logits else "shared vocabulary"
    return "fused loss" if frame.fused_loss else "whole logits"


def schedule_text(name: str, chunks: int) -> str:
    """A schedule in words: its name, or Megatron's own, and the chunks."""
    if name == STOCK:
        name = "interleaved (Megatron's)" if chunks > 1 else "1f1b (Megatron's)"
    return f"{name}, {chunks} chunks" if chunks > 1 else name


def _estimated(planned: LayoutPlan) -> Iterable[Alternative]:
    """Schedules that were not settled, by their estimate."""
    best = planned.best
    seen = {(one.frame.name, one.frame.schedule.placement.num_chunks) for one in (best, *planned.others)}
    for one in planned.estimated:
        key = one.frame.name, one.job.layout.chunks
        if key in seen or planned.job.layout.pipeline == 1:
            continue
        seen.add(key)
        slower = one.seconds / best.priced.step_seconds
        yield Alternative(
            name=schedule_text(*key),
            step_seconds=0.0 if math.isinf(one.seconds) else one.seconds,
            peak_memory=0,
            fits=not one.fault,
            verdict=one.fault or f"about {_percent(slower)} slower, by estimate",
            settings={"schedule.name": one.frame.name, "schedule.chunks": str(one.job.layout.chunks)},
        )


def _policies(model: Model, best: Settled) -> Iterable[Alternative]:
    """The same schedule with simpler activations: untouched, full recomputation, attention kept, MEMO, ordered."""
    frame, layers = best.frame, model.job.model.num_layers
    fastest = best.priced.step_seconds
    if best.activations.is_on:
        priced = model.price(frame.setup(None))
        yield _alternative("activations untouched", priced, frame.host, fastest, {"activations.policy": "off"})
    yield _alternative(
        "full recomputation (Megatron's)", full_recomputation(model, frame), frame.host, fastest,
        {"--recompute-granularity": "full"},
    )  # fmt: skip
    for policy in ONE_FRACTION:
        if policy == best.activations.policy and not best.fates:
            continue  # the plan itself
        try:
            options = with_fraction(model, frame, replace(ONE_FRACTION[policy], experts=best.activations.experts))
        except InfeasibleError:
            continue
        priced = model.price(frame.setup(plan_activations(options, layers, model.options.low_precision)))
        share = "" if policy == "recompute" else f", {options.swap_fraction:.2f}"
        settings = {"activations.policy": policy}
        if share:
            settings["activations.swap_fraction"] = f"{options.swap_fraction:.4g}"
        yield _alternative(f"{policy}{share}", priced, frame.host, fastest, settings)


def full_recomputation(model: Model, frame: Frame) -> Priced:
    """Megatron's `--recompute-granularity full`: layer inputs stay, everything else is computed twice."""
    return model.price(replace(frame.setup(None), recompute_all=True))


def _smaller(model: Model, best: Settled) -> Iterable[Alternative]:
    """The same frame with less device memory: points of the front."""
    for share in _FRONT:
        limit = round(share * model.limit)
        if limit >= best.priced.peak:
            continue
        try:
            smaller = Model(model.job, model.hardware, limit, model.options)
            found = settle(smaller, best.frame, is_short=not best.activations.is_on)
        except InfeasibleError:
            continue
        name = f"within {limit / 2**30:.0f} GiB"
        yield _alternative(name, found.priced, best.frame.host, best.priced.step_seconds, {"device memory": str(limit)})


def _front(found: Iterable[Alternative]) -> tuple[Alternative, ...]:
    """Those that no other beats in both peak memory and step time."""
    front: list[Alternative] = []
    for one in sorted((one for one in found if one.peak_memory), key=lambda one: (one.peak_memory, one.step_seconds)):
        if not front or one.step_seconds < front[-1].step_seconds * (1 - 1e-6):
            front.append(one)
    return tuple(front)


def _unique(found: Iterable[Alternative]) -> list[Alternative]:
    return list({one.name: one for one in reversed(list(found))}.values())


def _pipeline(priced: Priced) -> tuple[str, ...]:
    """The actions of every rank in time, unless there are too many to draw."""
    schedule, times = priced.setup.schedule, priced.simulation.times
    count = sum(action.kind not in COMMUNICATION for actions in schedule.ranks for action in actions)
    if schedule.placement.num_ranks == 1 or count > _MOST_ACTIONS:
        return ()
    return tuple(
        " ".join(
            str(Span(kind=action.kind, microbatch=action.microbatch, chunk=action.chunk, start=start, end=end))
            for action, (start, end) in zip(actions, spans, strict=True)
            if action.kind not in COMMUNICATION
        )
        for actions, spans in zip(schedule.ranks, times, strict=True)
    )
