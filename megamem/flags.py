"""What a command line asks of megamem: the `--megamem*` flags among the arguments of somebody else's script.

The flags are read here, before the script starts and before torch is loaded, so that every mistake is told at once and
by every rank alike; what the script's own parser does with them does not matter.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megamem.config import Config, add_arguments, load_config, overrides_from_args
from megamem.errors import ConfigError
from megamem.options import suggestion
from megamem.yamlfile import find_block


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for, and where each option was said: `origins` of `section.option`, for the switch-on table."""

    config: Config = field(default_factory=Config)
    origins: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)  # of argparse destinations, as they were typed


def split_flags(argv: Sequence[str]) -> tuple[Request, list[str]]:
    """The request in the `--megamem*` flags of `argv`, and the other arguments in their order.

    A `megamem:` block in the YAML file of Megatron-LM's `--yaml-cfg` counts as `--megamem FILE`.
    Raises ConfigError with every mistake.
    """
    parser = add_arguments(argparse.ArgumentParser(prog="megamem", add_help=False, allow_abbrev=False))
    known = [flag for action in parser._actions for flag in action.option_strings]
    ours: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        flag, _, value = word.partition("=")
        if flag == "--":
            rest += [word, *words]
        elif flag != "--megamem" and not flag.startswith("--megamem-"):
            rest.append(word)
        elif flag not in known:
            raise ConfigError(f"{flag}: unknown flag; {suggestion(flag, known)}")
        else:
            ours += [word] if value or word != flag else [word, *itertools.islice(words, 1)]
    return request_of(parser.parse_args(ours), _yaml_config(rest)), rest


def request_of(namespace: argparse.Namespace, trainer_yaml: Path | None = None) -> Request:
    """The request in parsed flags, and in the trainer's own YAML file if that has a `megamem:` block."""
    given = {key: value for key, value in vars(namespace).items() if key.startswith("megamem") and value is not None}
    file = None if namespace.megamem is None else Path(namespace.megamem)
    if trainer_yaml is not None and (block := find_block(trainer_yaml)) is not None:
        if file is not None:
            raise ConfigError(
                f"--megamem {file} and the megamem: block in --yaml-cfg {trainer_yaml} are two answers to one "
                "question; remove one of them"
            )
        file = trainer_yaml
    overrides = overrides_from_args(namespace)
    config = load_config(file, overrides)
    origins = {} if file is None else origins_in(load_config(file), str(file))
    origins |= {key: "--megamem-" + key.replace(".", "-").replace("_", "-") for key in overrides}
    return Request(config=config, origins=origins, values=given)


def origins_in(config: Config, where: str) -> dict[str, str]:
    """`where` for every option that a configuration sets."""
    return {f"{name}.{key}": where for name in config.enabled for key in getattr(config, name).given()}


def _yaml_config(arguments: Iterable[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--yaml-cfg", type=Path)
    found: Path | None = parser.parse_known_args(list(arguments))[0].yaml_cfg
    return found
