"""megamem: train longer sequences on the GPUs you have.

    import megamem

    with megamem.enable("megamem.yaml"):    # after initialize_model_parallel, before the model is built
        ...

Importing this package loads no torch, and patches nothing; `enable` does both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megamem.config import Config as Config
from megamem.config import add_arguments as add_arguments
from megamem.config import config_from_args as config_from_args
from megamem.config import load_config as load_config
from megamem.errors import ConfigError as ConfigError
from megamem.errors import MegamemError as MegamemError

if TYPE_CHECKING:
    from megamem.integrations.megatron_core import Handle
    from megamem.integrations.this_job import KnownJob
    from megamem.runtime.activations.streams import AbstractDevice

__version__ = "0.1.0.dev0"

__all__ = [
    "Config",
    "ConfigError",
    "MegamemError",
    "__version__",
    "add_arguments",
    "config_from_args",
    "enable",
    "load_config",
]


def enable(
    config: Config | str | Path | Mapping[str, object],
    *,
    device: AbstractDevice | None = None,
    job: KnownJob | None = None,
) -> Handle:
    """Switch on what `config` (a file, a mapping or a Config) asks for; `.disable()` the handle, or use it in `with`.

    Call it on every rank, once, after Megatron's `initialize_model_parallel` and before the model is built. `device`
    replaces the copy queues, for tests. `job` is what is trained, where `config` leaves something to the planner
    (`auto`): Megatron-LM's flags, or its arguments as parsed; under Megatron-LM itself it is known. Raises a
    `MegamemError` that says what to do.
    """
    try:
        from megamem.integrations.megatron_core import enable as enable_megatron_core
    except ModuleNotFoundError as fault:
        from megamem.errors import MissingPackage

        if (fault.name or "").partition(".")[0] not in ("torch", "megatron"):
            raise
        raise MissingPackage(f'megamem.enable needs {fault.name}; pip install "megamem[train]"') from fault
    return enable_megatron_core(config, device=device, job=job)
