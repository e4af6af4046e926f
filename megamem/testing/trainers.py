"""What stops the trainers Megatron-LM and Megatron-Bridge on a machine without CUDA, taken out of their way.

Their demand for CUDA, and what they compile at start: CUDA kernels never, the data set's helpers only where they are
not there (wheels bring them compiled, without the Makefile that would be called); on Python 3.11 Megatron-LM's import
of `typing.override`; Bridge's import of Transformer Engine where it wants nothing but names (0.3's adapters). Each is
mended when the script imports the trainer.
"""

import builtins
import contextlib
import functools
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from multiprocessing import spawn
from types import ModuleType
from typing import Any

import torch.distributed as dist

from megamem.integrations.after_import import AfterImport
from megamem.testing._undo import Ledger

_MODULES = ("megatron.training.initialize", "megatron.bridge.training.initialize")
_ADAPTERS = "megatron.bridge.peft."


@contextlib.contextmanager
def unblock_trainers() -> Iterator[None]:
    """To be entered inside `cpu_rig`, before the script runs."""
    ledger = Ledger()
    ledger.set(builtins, "__import__", _with_engine_for_adapters(builtins.__import__))
    ledger.set(spawn, "get_preparation_data", _without_script(spawn.get_preparation_data))
    if not hasattr(typing, "override"):
        ledger.set(typing, "override", lambda method: method)
    imports = AfterImport({name: functools.partial(_unblock, ledger, name) for name in _MODULES})
    try:
        yield
    finally:
        imports.close()
        ledger.undo()


def _unblock(ledger: Ledger, name: str) -> None:
    """Before anybody can copy names of the module."""
    module = sys.modules[name]
    real = module.initialize_megatron
    if "allow_no_cuda" in inspect.signature(real).parameters:
        ledger.set(module, "initialize_megatron", functools.partial(real, allow_no_cuda=True))
    ledger.set_existing(module, "_compile_dependencies", _compile_dependencies)
    ledger.set_existing(module, "compile_helpers", _compile_helpers)


def _compile_helpers() -> None:
    """The data set's helpers, where they are missing; Bridge has one rank of each host call it."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        from megatron.core.datasets.utils import compile_helpers

        compile_helpers()


def _compile_dependencies() -> None:
    """Megatron-LM has every rank call it."""
    if dist.get_rank() == 0:
        _compile_helpers()
    dist.barrier()


def _without_script(real: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """What a spawned process is told, without the script: it would import the trainer outside of the rig.

    Megatron-Core spawns helpers when it writes checkpoints; what they run is in modules.
    """

    def get_preparation_data(name: str) -> dict[str, Any]:
        return {key: value for key, value in real(name).items() if not key.startswith("init_main_from")}

    return get_preparation_data


def _with_engine_for_adapters(real: Callable[..., Any]) -> Callable[..., Any]:
    """`import`, with an empty Transformer Engine for Bridge's adapters; others would believe that it is there."""

    def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        asks = level == 0 and name.partition(".")[0] == "transformer_engine" and globals
        if asks and str(globals.get("__name__")).startswith(_ADAPTERS):
            return _Engine(name if fromlist else "transformer_engine")
        return real(name, globals, locals, fromlist, level)

    return import_


class _Engine(ModuleType):
    """A module in which every name is a class of its own, that nothing is an instance of."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any = _Engine(f"{self.__name__}.{name}") if name.islower() else type(name, (), {})
        setattr(self, name, value)
        return value
