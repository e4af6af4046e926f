"""What a configuration leaves to the planner (`megamem.deciding`), decided for one job whose layout is what it is.

    decide(config, job, hardware)     the same configuration with nothing left open, and the plan beside it

Everything that the configuration settles stays as it is, and counts in what is decided.
"""

from __future__ import annotations

from dataclasses import replace

from megamem.config import Activations, Allocator, Config, Vocabulary
from megamem.deciding import Planning, undecided
from megamem.errors import ConfigError
from megamem.ir.job import Job
from megamem.ir.plan import digest
from megamem.planner.hardware import Hardware
from megamem.planner.joint.explain import explain
from megamem.planner.joint.layout import STOCK, Wishes, plan_layout
from megamem.planner.layer_options import LayerOptions

HOST_SHARE = 0.5
"""Of a machine's memory per rank: what `activations.host_memory: auto` may pin."""


def decide(config: Config, job: Job, hardware: Hardware, host: float | None = None) -> Config:
    """`config` with every `auto` of the planner resolved, and with its plan.

    host: bytes of host memory for a rank, where the configuration does not say; None: half of the hardware's

    Raises ConfigError for what contradicts, InfeasibleError with the sums where nothing fits.
    """
    if not undecided(config):
        return config
    if problems := _problems(config, job):
        raise ConfigError(problems)
    wishes = wishes_of(config, hardware, host)
    made = explain(plan_layout(job, hardware, wishes), wishes)
    assert made.plan is not None
    decided = replace(
        config,
        activations=_activations(config.activations, made.activations),
        vocabulary=_vocabulary(config.vocabulary, made.vocabulary),
        allocator=_allocator(config.allocator, made.allocator),
        planner=Planning(),
    )
    made_for = replace(made.plan.made_for, settings=digest(decided.settings()))
    return replace(decided, plan=replace(made.plan, made_for=made_for))


def _problems(config: Config, job: Job) -> list[str]:
    left = ", ".join(undecided(config))
    problems = [f"{left}: auto: {problem}" for problem in job.problems()]
    problems += options_of(config).problems(job)
    if config.plan is not None:
        problems.append(f"{left}: auto, beside a plan (made_for, predicted) that has decided; remove one of them")
    if config.schedule.name in ("auto", "file"):
        problems.append(
            f"{left}: auto needs a schedule with a name, not schedule.name: {config.schedule.name}; megamem plan finds "
            "the fastest one together with all else"
        )
    if job.recompute != "none":
        problems.append(
            f"{left}: auto, beside --recompute-granularity {job.recompute}: both would decide the same; remove one"
        )
    return problems


def options_of(config: Config) -> LayerOptions:
    """The options that change what layers save, and how it travels."""
    chunk = config.vocabulary.loss_chunk
    return LayerOptions(
        low_precision=config.fp8,
        mlp=config.mlp,
        compress=config.activations.compress,
        loss_chunk=0 if chunk == "auto" else chunk,
    )


def wishes_of(config: Config, hardware: Hardware, host: float | None = None) -> Wishes:
    """What a configuration leaves to the planner, and what it settles; `host` as in `decide`."""
    schedule, vocabulary, activations = config.schedule, config.vocabulary, config.activations
    losses = [
        name
        for name, is_possible in (
            ("off", vocabulary.fused_loss is not True and vocabulary.parallel is not True),
            ("fused", vocabulary.fused_loss is not False and vocabulary.parallel is not True),
            ("parallel", vocabulary.parallel is not False),
        )
        if is_possible
    ]
    given: str | Activations = activations if activations.is_on else "off"
    if activations.host_memory != "auto":
        host = float(activations.host_memory)
    return Wishes(
        schedule=schedule.name if schedule.is_on else STOCK,
        group=None if isinstance(schedule.group, str) else schedule.group,
        vocabulary="|".join(losses),
        barriers=vocabulary.barriers,
        keep_logits=True if vocabulary.keep_logits else None if vocabulary.parallel == "auto" else False,
        options=options_of(config),
        allocator=config.allocator.mode,
        activations="auto" if activations.policy == "auto" else given,
        has_model=True,
        host=hardware.host_memory * HOST_SHARE if host is None else host,
        device=None if isinstance(config.planner.device_memory, str) else config.planner.device_memory,
    )


def _activations(asked: Activations, made: Activations) -> Activations:
    if asked.policy == "auto":
        return replace(made, verify=asked.verify) if made.is_on else made
    return replace(asked, swap_fraction=made.swap_fraction) if asked.swap_fraction == "auto" else asked


def _vocabulary(asked: Vocabulary, made: Vocabulary) -> Vocabulary:
    """With its other options, where they still have an effect."""
    if "auto" not in (asked.fused_loss, asked.parallel):
        return asked
    if not (made.fused_loss or made.parallel):
        return Vocabulary()
    if made.parallel:
        return replace(asked, fused_loss=False, parallel=True, keep_logits=made.keep_logits)
    return Vocabulary(fused_loss=True, loss_chunk=asked.loss_chunk)


def _allocator(asked: Allocator, made: Allocator) -> Allocator:
    if asked.mode != "auto":
        return asked
    return replace(asked, mode="static") if made.is_on else Allocator()
