"""What a command line asks of megamem: the `--megamem*` flags among the arguments of somebody else's script.

The flags are read here, before the script starts and before torch is loaded, so that every mistake is told at once and
by every rank alike; what the script's own parser does with them does not matter.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megamem.config import Config, add_arguments, load_config, overrides_from_args
from megamem.errors import ConfigError
from megamem.options import suggestion
from megamem.yamlfile import find_block


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for, and where.

    origins:    who asked for each `section.option`, for the switch-on table
    values:     the flags by their argparse destinations, as they were typed
    overrides:  the single options among them
    file:       the configuration file among them
    """

    config: Config = field(default_factory=Config)
    origins: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)
    overrides: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = None

    def beside(self, block: Mapping[str, object], where: str) -> Request:
        """This request together with the block of a trainer's own configuration, over which single flags win.

        Raises ConfigError with every mistake in the block, and where there is a file too.
        """
        given = load_config(block)
        if not given.enabled:
            return self
        if self.file is not None:
            raise ConfigError(f"--megamem {self.file} and {where} are two answers to one question; remove one of them")
        flags = {key: self.origins[key] for key in self.overrides if key in self.origins}
        config = load_config(block, self.overrides)
        return replace(self, config=config, origins=origins_in(given, where) | flags)


def split_flags(argv: Sequence[str]) -> tuple[Request, list[str]]:
    """The request in the `--megamem*` flags of `argv`, and the other arguments in their order.

    A `megamem:` block in the YAML file of Megatron-LM's `--yaml-cfg` counts as `--megamem FILE`.
    Raises ConfigError with every mistake.
    """
    parser = add_arguments(argparse.ArgumentParser(add_help=False))
    places = {flag: action.dest for action in parser._actions for flag in action.option_strings}
    values: dict[str, str] = {}
    rest: list[str] = []
    problems: list[str] = []
    words = iter(argv)
    for word in words:
        flag, has_value, value = word.partition("=")
        if word == "--":
            rest += [word, *words]
        elif flag != "--megamem" and not flag.startswith("--megamem-"):
            rest.append(word)
        elif flag not in places:
            problems.append(f"{flag}: unknown flag; {suggestion(flag, places)}")
        elif not has_value and (value := next(words, "--")).startswith("--"):
            problems.append(f"{flag}: has no value; write {flag} VALUE")
        else:
            values[places[flag]] = value
    if problems:
        raise ConfigError(problems)
    return request_of(argparse.Namespace(**values), _yaml_config(rest)), rest


def request_of(namespace: argparse.Namespace, trainer_yaml: Path | None = None) -> Request:
    """The request in parsed flags, and in the trainer's own YAML file if that has a `megamem:` block."""
    given = {key: value for key, value in vars(namespace).items() if key.startswith("megamem") and value is not None}
    file = Path(given["megamem"]) if "megamem" in given else None
    overrides = overrides_from_args(namespace)
    origins = {} if file is None else origins_in(load_config(file), str(file))
    origins |= {key: "--megamem-" + key.replace(".", "-").replace("_", "-") for key in overrides}
    config = load_config(file, overrides)
    request = Request(config=config, origins=origins, values=given, overrides=overrides, file=file)
    if trainer_yaml is None or (block := find_block(trainer_yaml)) is None:
        return request
    return request.beside(block, f"the megamem: block in {trainer_yaml}")


def origins_in(config: Config, where: str) -> dict[str, str]:
    """`where` for every option that a configuration sets."""
    return {f"{name}.{key}": where for name in config.enabled for key in getattr(config, name).given()}


def _yaml_config(arguments: Iterable[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--yaml-cfg", type=Path)
    found: Path | None = parser.parse_known_args(list(arguments))[0].yaml_cfg
    return found
