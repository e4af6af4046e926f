"""NeMo through Megatron-Bridge: `megamem:` as a section of its configuration.

    cfg = some_recipe()
    watcher = bridge.attach(cfg, "megamem.yaml")          # or a mapping, a Config; or nothing, and then
    process_config_with_overrides(cfg, "run.yaml", ["megamem.schedule.name=zb-h1"])     # the section is in here
    pretrain(cfg, forward_step, callbacks=[watcher])      # the callback is optional

Bridge drops a section that it does not know with a warning, and takes any value for one that it does. So `attach` gives
the container a field of plain values, which YAML files and overrides fill as they fill the others, and `validate`,
which `pretrain` calls on every rank before anything is started, reads it as strictly as a file of ours.

megamem is then switched on when Bridge has made its parallel groups, before the model is built, and off when they are
destroyed. Nothing of it is written into checkpoints: classes keep their names (`_target_`), hooks and callbacks are
not saved, and the section in `run_config.yaml` is a mapping that Bridge passes over where megamem is not attached.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamem.config import Config, load_config
from megamem.deciding import undecided
from megamem.errors import NotLiveError, UnsupportedError
from megamem.integrations import compat
from megamem.integrations.door import Door
from megamem.options import options_of
from megamem.planner.models.bridge import job_of_content

_FIELD = "megamem"


def attach(config: Any, megamem: Config | str | Path | Mapping[str, object] | None = None) -> Watcher:
    """Give a Bridge `ConfigContainer` a `megamem:` section, filled from `megamem` if that is given.

    Returns a callback for `pretrain`, which logs the report to TensorBoard. To be called before the files and
    overrides that are to reach the section are merged. Raises ConfigError with everything wrong in `megamem`.
    """
    _register_targets()
    if not hasattr(config, _FIELD):
        kind: Any = type(config)
        config.__class__ = _with_section(kind)
        config.megamem = _empty()
    if megamem is not None:
        for name, section in _plain(load_config(megamem)).items():
            config.megamem[name] = {**config.megamem.get(name, {}), **section}
    return Watcher()


class Watcher:
    """A callback of Bridge: that megamem is on when training begins, and the report in TensorBoard when it ends."""

    def on_train_start(self, context: Any) -> None:
        """Raise NotLiveError where something was to be switched on, and is not."""
        del context
        _require_on()

    def on_train_end(self, context: Any) -> None:
        """Write the report of this rank where Bridge has a TensorBoard."""
        door, board = Door.current(), context.state.tensorboard_logger
        if door is not None and door.handle is not None and board:
            rows = "".join(f"| {what} | {much} |\n" for what, much in door.handle.report().rows())
            board.add_text("megamem", f"| | |\n|---|---|\n{rows}", context.state.train_state.step)


@functools.cache
def _with_section(kind: Any) -> type:
    """`kind` with the section. It keeps its name, by which Bridge writes and pickles it."""

    def validate(self: Any) -> None:
        kind.validate(self)
        _prepare(self)

    def to_dict(self: Any) -> dict[str, Any]:
        content: dict[str, Any] = kind.to_dict(self)
        content[_FIELD] = _given(self)
        return content

    namespace = {"validate": validate, "to_dict": to_dict, "__doc__": kind.__doc__}
    fields = [(_FIELD, dict[str, Any], dataclasses.field(default_factory=_empty))]
    made = dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), namespace=namespace, kw_only=True)
    made.__module__, made.__qualname__ = kind.__module__, kind.__qualname__  # last: make_dataclass says its caller's
    return made


def _empty() -> dict[str, Any]:
    """Every option, as yet unanswered: Hydra lets overrides through that name a key which is there, and no other."""
    return {name: {item.name: None for item in options_of(section)} for name, section in Config.sections().items()}


def _given(config: Any) -> dict[str, Any]:
    """What the section of a container says, without what is left open."""
    content = {}
    for name, section in config.megamem.items():
        if isinstance(section, Mapping):
            section = {key: value for key, value in section.items() if value is not None}
        if section:
            content[name] = section
    return content


def _plain(config: Config) -> dict[str, Any]:
    plan = {} if config.plan is None else config.plan.to_dict()
    return {name: getattr(config, name).given() for name in Config.sections()} | plan


def _prepare(config: Any) -> None:
    """Read the section, and have it switched on when the groups are there. Raises what is wrong, before they are."""
    door = Door.current() or Door(stays=_restarts(config))
    request = door.request.beside(_given(config), "the megamem: section")
    if problems := list(_problems(config, request.config)):
        raise UnsupportedError("megamem: " + "; ".join(problems))
    if not request.config.enabled:
        return
    if undecided(request.config):
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        door.job = job_of_content(config.to_dict(), "the configuration", ranks)
    door.take(request)
    if Door.current() is None:
        door.open(["scripts"])
    _register_hook(config.model)


def _problems(config: Any, wanted: Config) -> list[str]:
    """What of a container's settings would not work, or would be silently wrong."""
    problems = []
    if not wanted.schedule.is_on and (mixup := compat.message_mixup(config.model)):
        problems.append(mixup)
    if wanted.enabled and getattr(config.dist, "use_decentralized_pg", False):
        problems.append(
            "dist.use_decentralized_pg makes parallel groups that Megatron-Core's parallel_state does not know, where "
            "megamem finds them; set it to false"
        )
    return problems


def _register_hook(model: Any) -> None:
    """Before the model is wrapped, by Bridge's own door: that megamem was on while it was built."""
    hooks = model.pre_wrap_hooks if hasattr(model, "pre_wrap_hooks") else getattr(model, "_pre_wrap_hooks", [])
    if _built in hooks:
        return
    if hasattr(model, "register_pre_wrap_hook"):
        model.register_pre_wrap_hook(_built)
    else:
        model.pre_wrap_hooks.append(_built)


def _built(chunks: list[Any]) -> list[Any]:
    """The hook."""
    _require_on()
    return chunks


def _require_on() -> None:
    door = Door.current()
    if door is not None and door.request.config.enabled and door.handle is None:
        raise NotLiveError(
            f"{', '.join(door.request.config.enabled)} was to be switched on, and the model has been built without "
            "megatron.core.parallel_state.initialize_model_parallel, where that happens"
        )


def _restarts(config: Any) -> bool:
    """Whether Bridge makes its groups anew in this process when it has failed."""
    restart = getattr(config, "inprocess_restart", None)
    return restart is not None and bool(restart.enabled)


def _register_targets() -> None:
    """Let a configuration name what is megamem's (a layer spec, say) in `_target_`; asked since 0.4."""
    from megatron.bridge.utils import instantiate_utils

    if hasattr(instantiate_utils, "register_allowed_target_prefix"):
        instantiate_utils.register_allowed_target_prefix("megamem.")
