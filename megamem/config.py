"""What the user asks for: the `megamem:` block of a YAML file, valid once it exists.

Each option is declared once, in the section that owns it (`megamem.sections`). From these declarations derive the YAML
loader, the `--megamem-<section>-<field>` flags, `--help`, the docs table and the JSON Schema, so none of them can
forget an option.

Everything wrong with a configuration is reported at once, in one `ConfigError`. Nothing is ignored: a setting which
has no effect under the chosen policy is a contradiction, because someone wrote it and believes in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from megamem.deciding import Planning, unused
from megamem.errors import ConfigError
from megamem.ir.plan import PARTS, Plan
from megamem.options import Option, options_of, parse_values, suggestion
from megamem.planfile import read_plan
from megamem.sections import (
    OFF,
    SCHEDULES,
    Activations,
    Allocator,
    LowPrecision,
    Mlp,
    Scheduling,
    Section,
    Vocabulary,
    word,
)
from megamem.table import TableRow
from megamem.yamlfile import read_block

if TYPE_CHECKING:
    import argparse

__all__ = [
    "SCHEDULES",
    "Activations",
    "Allocator",
    "Config",
    "LowPrecision",
    "Mlp",
    "Planning",
    "Scheduling",
    "TableRow",
    "Vocabulary",
    "add_arguments",
    "config_from_args",
    "json_schema",
    "load_config",
    "options_table",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration: one section per capability, each off unless asked for.

    plan:  what the settings were made for and are expected to do, where `megamem plan` made them
    """

    activations: Activations = field(default_factory=Activations)
    schedule: Scheduling = field(default_factory=Scheduling)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    mlp: Mlp = field(default_factory=Mlp)
    allocator: Allocator = field(default_factory=Allocator)
    fp8: LowPrecision = field(default_factory=LowPrecision)
    planner: Planning = field(default_factory=Planning)
    plan: Plan | None = None

    @staticmethod
    def sections() -> dict[str, type[Section]]:
        """The section classes by name, in order."""
        return _sections()

    @property
    def enabled(self) -> tuple[str, ...]:
        """The capabilities that are switched on."""
        return tuple(name for name in _sections() if getattr(self, name).is_on)

    def settings(self) -> dict[str, object]:
        """The sections, as plain values."""
        return {name: getattr(self, name).to_dict() for name in _sections()}

    def to_dict(self) -> dict[str, object]:
        """The content of the `megamem:` block, as plain values; `load_config` reads it back."""
        return {**self.settings(), **({} if self.plan is None else self.plan.to_dict())}

    def to_yaml(self) -> str:
        """A YAML file with this configuration; `load_config` reads it back."""
        import yaml

        return str(yaml.safe_dump({"megamem": self.to_dict()}, sort_keys=False, width=120))


def load_config(
    source: str | Path | Mapping[str, object] | Config | None = None, overrides: Mapping[str, str] = {}
) -> Config:
    """Read a configuration: a YAML file, a mapping (the `megamem:` block or what holds it), or nothing (all off).

    `overrides` replace single options, as `{"activations.policy": "memo"}`; they win over the source. An override
    which switches a section off also drops what the source says about that section, so that `off` always works.
    A source that `megamem plan` made is refused where versions or the number of ranks are not those it was made for.
    Raises ConfigError with every problem there is.
    """
    block = _block_of(source)
    problems: list[str] = []
    plan = read_plan(block, problems)
    raw = _sections_given(block, problems)
    _override(raw, overrides, problems)
    values: dict[str, dict[str, Any]] = {}
    for name, section in _sections().items():
        given = raw.get(name, {})
        values[name], found = parse_values(options_of(section), given, name)
        switches = {item.name: item.default for item in options_of(section) if item.name in section.switches()}
        unset = {key: value for key, value in switches.items() if key not in given}
        problems += found + section.contradictions(unset | values[name], values[name])
    if problems:
        raise ConfigError(problems)
    made: dict[str, Any] = {name: section(**values[name]) for name, section in _sections().items()}
    config = Config(plan=plan, **made)
    if problems := unused(config):
        raise ConfigError(problems)
    return config


def add_arguments(parser: argparse.ArgumentParser, default: object = None) -> argparse.ArgumentParser:
    """Add `--megamem FILE.yaml` and one flag per option, and return the parser, as Megatron's argument providers do.

    Flags are kept as text and read by `config_from_args`, so that all mistakes are reported together. `default` is
    that of every flag: `argparse.SUPPRESS` keeps those that are not given out of the namespace.
    """
    group = parser.add_argument_group("megamem", "Longer sequences on the same GPUs; single flags win over the file.")
    group.add_argument(
        "--megamem", metavar="FILE.yaml", default=default, help="configuration file with a megamem: block"
    )
    for name, section in _sections().items():
        for item in options_of(section):
            text = f"{item.help} (default: {item.default_text()})".replace("%", "%%")
            dest, metavar = _dest(name, item), item.kind.metavar
            group.add_argument(item.flag(name), metavar=metavar, dest=dest, default=default, help=text)
    return parser


def config_from_args(namespace: argparse.Namespace) -> Config:
    """The configuration that the flags of `add_arguments` ask for."""
    return load_config(getattr(namespace, "megamem", None), overrides_from_args(namespace))


def overrides_from_args(namespace: argparse.Namespace) -> dict[str, str]:
    """The single options among the flags of `add_arguments`, as `load_config` takes them."""
    return {
        f"{name}.{item.name}": value
        for name, section in _sections().items()
        for item in options_of(section)
        if (value := getattr(namespace, _dest(name, item), None)) is not None
    }


def json_schema() -> dict[str, object]:
    """JSON Schema (2020-12) of a file with a `megamem:` block; contradictions between options are not expressed."""
    block = {
        name: {
            "type": "object",
            "description": (section.__doc__ or "").strip(),
            "additionalProperties": False,
            "properties": {
                item.name: {
                    **item.kind.schema(),
                    "description": item.help,
                    "default": item.kind.plain(item.default),
                }
                for item in options_of(section)
            },
        }
        for name, section in _sections().items()
    }
    plan = {name: {"type": "object", "description": "Written by megamem plan; see megamem.ir.plan."} for name in PARTS}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "megamem configuration",
        "type": "object",
        "required": ["megamem"],
        "properties": {"megamem": {"type": "object", "additionalProperties": False, "properties": block | plan}},
    }


def options_table() -> str:
    """The options as a Markdown table, for the documentation."""
    rows = ["| option | values | default | meaning |", "|---|---|---|---|"]
    for name, section in _sections().items():
        for item in options_of(section):
            values = item.kind.metavar.replace("|", "\\|")
            meaning = item.help.replace("|", "\\|")
            rows.append(f"| `{name}.{item.name}` | `{values}` | `{item.default_text()}` | {meaning} |")
    return "\n".join(rows) + "\n"


def _sections() -> dict[str, type[Section]]:
    """The section classes by name, in the order of the fields of `Config`."""
    hints = get_type_hints(Config)
    return {item.name: hints[item.name] for item in dataclasses.fields(Config) if item.name != "plan"}


def _dest(section: str, item: Option) -> str:
    return f"megamem_{section}_{item.name}"


def _block_of(source: str | Path | Mapping[str, object] | Config | None) -> Mapping[str, object]:
    if source is None:
        return {}
    if isinstance(source, Config):
        plan = {} if source.plan is None else source.plan.to_dict()
        return {**{name: getattr(source, name).given() for name in _sections()}, **plan}
    if isinstance(source, (str, Path)):
        return read_block(Path(source))
    if not isinstance(source, Mapping):
        raise ConfigError(f"a configuration is a path, a mapping or a Config, not {type(source).__name__}")
    block = source.get("megamem", source)
    if not isinstance(block, Mapping):
        raise ConfigError(f"megamem: {block!r} is no mapping of sections; valid: {', '.join(_sections())}")
    return block


def _sections_given(block: Mapping[str, object], problems: list[str]) -> dict[str, dict[str, object]]:
    """The block as sections of options; what is neither goes to `problems`."""
    sections = _sections()
    raw: dict[str, dict[str, object]] = {}
    for name, content in block.items():
        if name in PARTS:
            continue
        if name not in sections:
            owner = next((s for s, cls in sections.items() if name in {item.name for item in options_of(cls)}), None)
            hint = f"did you mean '{owner}.{name}'?" if owner else suggestion(str(name), sections)
            problems.append(f"{name}: unknown section; {hint}")
        elif content is None or content == "":
            raw[name] = {}
        elif not isinstance(content, Mapping):
            problems.append(
                f"{name}: {content!r} is no mapping of options; write {name}: {{{sections[name].KEY}: ...}}"
            )
        else:
            raw[name] = {str(key): value for key, value in content.items()}
    return raw


def _override(raw: dict[str, dict[str, object]], overrides: Mapping[str, str], problems: list[str]) -> None:
    """Put `overrides` over the sections in `raw`, in place."""
    sections = _sections()
    for key in overrides:
        name, _, option_name = key.partition(".")
        if name not in sections or not option_name:
            valid = [f"{s}.{item.name}" for s, cls in sections.items() for item in options_of(cls)]
            problems.append(f"{key}: unknown option; {suggestion(key, valid)}")
    for name in sections:
        mine = {key.partition(".")[2]: value for key, value in overrides.items() if key.startswith(f"{name}.")}
        if mine:
            section, source = sections[name], raw.get(name, {})
            is_off = any(word(mine.get(key)) in OFF for key in section.switches()) and section.is_off(source | mine)
            raw[name] = ({} if is_off else source) | mine
