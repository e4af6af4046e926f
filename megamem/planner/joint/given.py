"""A configuration that a plan begins with: what it switches on is settled, what it leaves out is weighed."""

from __future__ import annotations

from dataclasses import replace

from megamem.config import Config
from megamem.errors import ConfigError
from megamem.ir.plan import digest
from megamem.planner.joint.decide import options_of
from megamem.planner.joint.layout import Wishes
from megamem.sections import Vocabulary


def wishes_given(config: Config, wishes: Wishes) -> Wishes:
    """`wishes`, and what `config` says where they leave something open. Raises ConfigError for what cannot be kept."""
    schedule, activations = config.schedule, config.activations
    if schedule.name == "file":
        raise ConfigError("schedule.name: file is an order of your own, which no plan can change; leave schedule out")
    if activations.is_on and activations.policy != "auto" and wishes.activations == "auto":
        wishes = replace(wishes, activations=activations)
    if schedule.is_on and schedule.name != "auto" and wishes.schedule == "auto":
        group = None if isinstance(schedule.group, str) else schedule.group
        wishes = replace(wishes, schedule=schedule.name, group=group)
    if config.allocator.is_on and wishes.allocator == "auto":
        wishes = replace(wishes, allocator=config.allocator.mode)
    options = options_of(config)
    return replace(
        wishes,
        vocabulary=_losses(config.vocabulary) if wishes.vocabulary == "auto" else wishes.vocabulary,
        barriers=config.vocabulary.barriers,
        keep_logits=True if config.vocabulary.keep_logits else None,
        options=options,
        weighs_tiles=not options.mlp.is_on,
    )


def _losses(vocabulary: Vocabulary) -> str:
    if vocabulary.parallel is True:
        return "parallel"
    return "fused" if vocabulary.fused_loss is True else "auto"


def carried(made: Config, given: Config) -> Config:
    """What was planned, with the options of the same capabilities that no plan decides on."""
    vocabulary, schedule, allocator = made.vocabulary, made.schedule, made.allocator
    if vocabulary.is_on:
        vocabulary = replace(vocabulary, loss_chunk=given.vocabulary.loss_chunk)
    if schedule.is_on and given.schedule.name == schedule.name:
        schedule = replace(schedule, costs=given.schedule.costs, trace=given.schedule.trace)
    if allocator.is_on and given.allocator.is_on:
        allocator = replace(given.allocator, mode="static")
    found = replace(made, vocabulary=vocabulary, schedule=schedule, allocator=allocator)
    if made.plan is None or found.settings() == made.settings():
        return made
    made_for = replace(made.plan.made_for, settings=digest(found.settings()))
    return replace(found, plan=replace(made.plan, made_for=made_for))
