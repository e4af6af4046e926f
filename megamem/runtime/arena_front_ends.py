"""Where the arena meets PyTorch's allocators: one front end per kind of device.

    CpuFrontEnd        before the CPU allocator (`c10::SetCPUAllocator`): at any time, undone exactly

Front ends are compiled on the user's machine, against the installed PyTorch, at first use.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, final

import torch

from megamem.errors import NativeError
from megamem.native import load_front_end
from megamem.native.arena import ArenaCore


class FrontEnd(ABC):
    """What asks the arena for memory before it asks the native allocator."""

    name: ClassVar[str]
    min_size: ClassVar[int]  # bytes; smaller requests are the native allocator's, unless the user says otherwise
    core: ArenaCore

    @abstractmethod
    def stream(self) -> int:
        """The stream whose requests are planned: that of the caller."""

    @abstractmethod
    def install(self) -> None:
        """New requests come to the arena first."""

    @abstractmethod
    def uninstall(self) -> None:
        """The native allocator takes new requests again; blocks of the arena stay valid."""


def compile_front_end(source: str, *, links: tuple[str, ...], flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """A front end's library, built against the installed PyTorch. Raises NativeError where that cannot be done."""
    folder = Path(torch.__file__).parent
    return load_front_end(
        source,
        (
            *("-isystem", str(folder / "include")),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
            f"-DMEGAMEM_TORCH={torch.__version__}",  # read by nobody; another PyTorch, another library
            *flags,
        ),
        ("-L", str(folder / "lib"), *links),
    )


_CPU_FUNCTIONS = (
    ("arena", ctypes.c_void_p),
    ("install", None),
    ("uninstall", None),
    ("stream", ctypes.c_uint64),
)


@final
class CpuFrontEnd(FrontEnd):
    """Before PyTorch's CPU allocator. A thread stands for a stream, and the arena for a device's memory.

    Raises NativeError where it cannot be built.
    """

    name = "CPU allocator"
    min_size = 1024

    def __init__(self) -> None:
        self._library = compile_front_end("cpu_allocator.cpp", links=("-lc10",))
        for name, result in _CPU_FUNCTIONS:
            function = getattr(self._library, f"megamem_cpu_{name}")
            function.argtypes, function.restype = [], result
        handle = self._library.megamem_cpu_arena()
        if handle is None:
            raise NativeError("there is no memory for an arena")
        self.core = ArenaCore(self._library, handle)

    def install(self) -> None:
        self._library.megamem_cpu_install()

    def stream(self) -> int:
        return int(self._library.megamem_cpu_stream())

    def uninstall(self) -> None:
        self._library.megamem_cpu_uninstall()


def front_end_for(device: torch.device) -> FrontEnd:
    """The front end for tensors on `device`, compiled but not installed.

    Raises NativeError, with the remedy, where it cannot be built, or where there is none for the device.
    """
    if device.type == "cpu":
        return CpuFrontEnd()
    raise NativeError(f"there is no arena for tensors on {device.type!r}")
