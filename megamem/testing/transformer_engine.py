"""Transformer Engine's own Python on a CPU: only its compiled extension is replaced, by `te_kernels`.

    install(folder)                         # of an unpacked wheel `transformer_engine-<version>-py3-none-any.whl`
    with cpu_rig(), claiming_cuda():
        import transformer_engine.pytorch   # its modules, autograd functions, quantised storages, weight-gradient store

To be called before Megatron-Core is imported, which looks for Transformer Engine then and only then. For the life of
the process: what has been imported cannot be taken back.

The wheel is pure Python; the extension is compiled with CUDA. Attention, block scaling and everything else that is not
in `te_kernels` cannot be run so, and says so when it is called.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import importlib.machinery
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megamem.testing import te_kernels
from megamem.testing._undo import Ledger

_EXTENSION = "transformer_engine_torch"
_GEMMS = (1, 2, 3)
_DTYPES = {
    "kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6, "kFloat8E4M3": 7, "kFloat8E5M2": 8,
    "kFloat4E2M1": 10,
}  # fmt: skip


def install(folder: Path) -> str:
    """Make `transformer_engine` importable from an unpacked wheel; its version. Its `pytorch` is not imported yet."""
    (metadata,) = folder.glob("transformer_engine-*.dist-info")
    version = metadata.name.removesuffix(".dist-info").rpartition("-")[2]
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its way of being imported where no library is built yet
    extension = _Extension(_EXTENSION)
    package = types.ModuleType("transformer_engine")
    package.__path__ = [str(folder / "transformer_engine")]
    package.__spec__ = importlib.machinery.ModuleSpec("transformer_engine", None, is_package=True)
    package.__version__ = version  # type: ignore[attr-defined]
    onnx = _Placeholders("transformer_engine.pytorch.onnx_extensions")  # needs onnxscript; only its export runs it
    sys.modules |= {_EXTENSION: extension, package.__name__: package, onnx.__name__: onnx}
    common: Any = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    return version


@contextlib.contextmanager
def claiming_cuda() -> Iterator[None]:
    """While Transformer Engine runs: it asks whether there is CUDA, and of each input whether it is there.

    Its quantised tensors are made on the current device, by a function that no mode sees.
    """
    ledger = Ledger()
    ledger.set(torch.cuda, "current_device", lambda: torch.device("cpu"))
    ledger.set(torch.cuda, "is_available", lambda: True)
    ledger.set(torch.Tensor, "is_cuda", property(lambda tensor: True))
    try:
        yield
    finally:
        ledger.undo()


class _TensorMeta:
    """Scales and histories of delayed scaling; Transformer Engine fills them in."""

    scale: Any
    scale_inv: Any
    amax_history: Any


class _Placeholder(type):
    """Something of the extension that is not here: a class, a function, or an enumeration.

    Members of an enumeration come to be when they are asked for. What is called does not go on.
    """

    def __getattr__(cls, name: str) -> Any:
        if name == "__members__":
            return dict(vars(cls)["_members"])
        if name.startswith("__"):
            raise AttributeError(name)
        members: dict[str, int] = vars(cls)["_members"]
        return members.setdefault(name, len(members))

    def __call__(cls, *args: object, **kwargs: object) -> Any:
        raise NotImplementedError(
            f"{cls.__module__}.{cls.__name__} is not among the definitions in megamem/testing/te_kernels.py"
        )


class _Placeholders(types.ModuleType):
    """A module in which every name is there."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Placeholder(name, (), {"_members": {}, "__module__": self.__name__})
        setattr(self, name, made)
        return made


class _Extension(_Placeholders):
    """`transformer_engine_torch`, as far as `te_kernels` goes."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        forward = [f"GEMM{number}_{what}" for number in _GEMMS for what in ("INPUT", "WEIGHT", "OUTPUT")]
        backward = [f"GRAD_{what}{number}" for number in _GEMMS for what in ("OUTPUT", "INPUT")]
        self.DType = enum.IntEnum("DType", _DTYPES)  # type: ignore[misc]
        self.FP8FwdTensors = enum.IntEnum("FP8FwdTensors", forward, start=0)  # type: ignore[misc]
        self.FP8BwdTensors = enum.IntEnum("FP8BwdTensors", backward, start=0)  # type: ignore[misc]
        self.FP8TensorMeta = _TensorMeta
        for function in vars(te_kernels).values():
            if isinstance(function, types.FunctionType) and not function.__name__.startswith("_"):
                setattr(self, function.__name__, function)
