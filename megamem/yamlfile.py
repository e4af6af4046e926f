"""Reading the `megamem:` block of a YAML file, strictly, and nothing else of that file.

A trainer's YAML may hold anything beside our block (its own tags, repeated keys), so the file is only parsed into
nodes and ours alone is constructed. Every scalar stays the text that the user typed: `off` stays `off` (YAML 1.1 makes
it false), `1e-3` reaches the option's own parser, and a file and a flag are read by the same code.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from megamem.errors import ConfigError

Plain = str | list["Plain"] | dict[str, "Plain"]


def read_block(path: Path) -> dict[str, Plain]:
    """The content of the `megamem:` block of the file at `path`. Raises ConfigError, also where there is none."""
    block = find_block(path)
    if block is None:
        raise ConfigError(f"{path}: no megamem: block; put the settings below a top-level key megamem")
    return block


def find_block(path: Path) -> dict[str, Plain] | None:
    """The content of the `megamem:` block of a file; None where it has none. Raises ConfigError."""
    root = _compose(path)
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: no megamem: block; the file must be a mapping with the key megamem")
    blocks = [value for key, value in root.value if key.value == "megamem"]
    if not blocks:
        return None
    if len(blocks) > 1:
        raise ConfigError(f"{path}, line {blocks[1].start_mark.line + 1}: a second megamem: block; merge them")
    problems: list[str] = []
    block = _construct(blocks[0], "megamem", problems)
    if problems:
        raise ConfigError([f"{path}, {problem}" for problem in problems])
    if isinstance(block, dict):
        return block
    if block == "":
        return {}
    raise ConfigError(f"{path}, line {blocks[0].start_mark.line + 1}: megamem: holds {block!r}, no mapping of sections")


def read_mapping(path: Path) -> dict[str, Plain]:
    """The content of a YAML or JSON file that is a mapping, every scalar as text. Raises ConfigError."""
    root = _compose(path)
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    problems: list[str] = []
    content = _construct(root, "", problems)
    if problems:
        raise ConfigError([f"{path}, {problem}" for problem in problems])
    assert isinstance(content, dict)
    return content


def read_inline(text: str) -> Plain:
    """YAML on the command line. Raises ValueError with the reason in one line."""
    problems: list[str] = []
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as fault:
        raise ValueError(_in_one_line(fault)) from None
    value = _construct(node, "", problems) if node is not None else ""
    if problems:
        raise ValueError("; ".join(problems))
    return value


def _compose(path: Path) -> yaml.Node | None:
    try:
        return yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as fault:
        raise ConfigError(f"{path}: cannot be read: {fault.strerror or fault}") from None
    except UnicodeDecodeError as fault:
        raise ConfigError(f"{path}: not YAML: not UTF-8 at byte {fault.start}") from None
    except yaml.YAMLError as fault:
        raise ConfigError(f"{path}: not YAML: {_in_one_line(fault)}") from None


def _construct(node: yaml.Node, place: str, problems: list[str]) -> Plain:
    """The node as text, lists and dicts; repeated keys and tags go to `problems`."""
    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
            problems.append(f"line {line}: {place}: the tag {node.tag} is not allowed here")
        return "" if node.tag.endswith(":null") and node.value in ("", "~") else str(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, f"{place}[{index}]", problems) for index, item in enumerate(node.value)]
    content: dict[str, Plain] = {}
    for key, value in node.value:
        name = str(key.value)
        inner = f"{place}.{name}" if place else name
        if name in content:
            problems.append(f"line {key.start_mark.line + 1}: {inner}: given twice; remove one")
        content[name] = _construct(value, inner, problems)
    return content


def _in_one_line(fault: yaml.YAMLError) -> str:
    mark = getattr(fault, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return where + str(getattr(fault, "problem", None) or fault).splitlines()[0]
