"""Models by name or by file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megamem.errors import ConfigError
from megamem.ir.model import Model
from megamem.ir.record import RecordError, from_plain
from megamem.options import suggestion
from megamem.planner.models.huggingface import model_of_config
from megamem.yamlfile import read_mapping

TABLE = Path(__file__).parents[1] / "data" / "models.yaml"


def names() -> list[str]:
    """The models that have a name."""
    return list(_table()["models"])


def load_model(source: str) -> Model:
    """A model by its name, or from a Hugging Face `config.json`. Raises ConfigError with what is wrong or missing."""
    table = _table()
    if source in table["models"]:
        row = dict(table["models"][source])
        return make_model({**table["families"][row.pop("family")], **row, "name": source}, source)
    path = Path(source)
    if path.is_dir():
        path /= "config.json"
    if path.suffix == ".json" or path.is_file():
        return model_of_config(read_mapping(path), path.parent.name or path.stem, str(path))
    raise ConfigError(
        f"--model {source}: neither a known model nor a config.json; {suggestion(source, table['models'])}"
    )


def make_model(sizes: Mapping[str, Any], where: str) -> Model:
    """A model of these fields, with what follows from others filled in. Raises ConfigError that names them."""
    filled = dict(sizes)
    heads = filled.get("num_attention_heads")
    filled.setdefault("num_query_groups", heads)
    if "kv_channels" not in filled and "hidden_size" in filled and heads:
        filled["kv_channels"] = int(filled["hidden_size"]) // int(heads)
    try:
        return from_plain(Model, filled)
    except RecordError as fault:
        raise ConfigError([f"{where}: {place or 'model'}: {reason}" for place, reason in fault.problems]) from None


def _table() -> dict[str, Any]:
    content: dict[str, Any] = yaml.load(
        TABLE.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    return content
