"""Where the arena meets PyTorch's allocators: one front end per kind of device.

    CpuFrontEnd        before the CPU allocator (`c10::SetCPUAllocator`): at any time, undone exactly
    CudaFrontEnd       before the CUDA caching allocator, as a subclass of its interface: at any time, undone exactly
    PluggableFrontEnd  in place of the CUDA caching allocator (`CUDAPluggableAllocator`), by `install_pluggable()`
                       before CUDA is used: needs no headers, and loses PyTorch's memory statistics and snapshots

The first two are compiled on the user's machine, against the installed PyTorch (2.6 to 2.13), at first use.
"""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from megamem.errors import NativeError
from megamem.native import load, load_front_end
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


_CPU_FUNCTIONS: Any = (  # name, what it returns, what it takes
    ("arena", ctypes.c_void_p, []),
    ("install", None, []),
    ("uninstall", None, []),
    ("stream", ctypes.c_uint64, []),
)
_CUDA_FUNCTIONS: Any = (
    ("arena", ctypes.c_void_p, [ctypes.c_int32]),
    ("install", ctypes.c_int32, []),
    ("uninstall", None, []),
)


def _declare(library: ctypes.CDLL, prefix: str, functions: Any) -> None:
    for name, result, arguments in functions:
        function = getattr(library, f"megamem_{prefix}_{name}")
        function.argtypes, function.restype = arguments, result


@final
class CpuFrontEnd(FrontEnd):
    """Before PyTorch's CPU allocator. A thread stands for a stream, and the arena for a device's memory.

    Raises NativeError where it cannot be built.
    """

    name = "CPU allocator"
    min_size = 1024

    def __init__(self) -> None:
        self._library = compile_front_end("cpu_allocator.cpp", links=("-lc10",))
        _declare(self._library, "cpu", _CPU_FUNCTIONS)
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


@final
class CudaFrontEnd(FrontEnd):
    """Before PyTorch's CUDA caching allocator, whose statistics, snapshots, pools and errors stay as they are.

    Raises NativeError where it cannot be built, or where the allocator is another one.
    """

    name = "CUDA caching allocator"
    min_size = 1 << 20  # below it the caching allocator has a pool of small blocks

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._library = compile_front_end("cuda_allocator.cpp", links=("-lc10_cuda", "-lc10"), flags=cuda_flags())
        _declare(self._library, "cuda", _CUDA_FUNCTIONS)
        torch.cuda.init()  # type: ignore[no-untyped-call]
        handle = self._library.megamem_cuda_arena(self._index)
        if handle is None:
            raise NativeError("the arena of this process is on another CUDA device; keep to one device a process")
        self.core = ArenaCore(self._library, handle)
        if torch.cuda.memory.get_allocator_backend() == "pluggable":
            raise NativeError(
                "PyTorch's allocator has been replaced by a CUDAPluggableAllocator that is not megamem's, and an arena "
                "before it would see what that one hides; leave it out"
            )

    @property
    def _index(self) -> int:
        return torch.cuda.current_device() if self._device.index is None else self._device.index

    def install(self) -> None:
        if not self._library.megamem_cuda_install():
            raise NativeError("another CUDA allocator was put in since megamem was switched on; leave it out")

    def stream(self) -> int:
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def uninstall(self) -> None:
        self._library.megamem_cuda_uninstall()


def cuda_flags() -> tuple[str, ...]:
    """What the wrapper of the CUDA allocator needs to be compiled. Raises NativeError without CUDA's headers."""
    major, minor = torch.__version__.split(".")[:2]
    return (
        *("-isystem", str(_cuda_headers())),
        "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE",  # a header that says how c10 was built, and is not always installed
        f"-DMEGAMEM_TORCH_VERSION={100 * int(major) + int(minor)}",
    )


def _cuda_headers() -> Path:
    """The folder of cuda_runtime_api.h: of the packages that PyTorch comes with, or of an installed toolkit."""
    packages = Path(torch.__file__).parent.parent
    folders = [
        *sorted(packages.glob("nvidia/c*/include"), reverse=True),
        *packages.glob("triton/backends/nvidia/include"),
        *(Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ),
        Path("/usr/local/cuda/include"),
    ]
    for folder in folders:
        if (folder / "cuda_runtime_api.h").is_file():
            return folder
    raise NativeError(
        "the headers of CUDA's runtime are not there, and the wrapper of PyTorch's allocator needs them; pip install "
        "nvidia-cuda-runtime (the one of torch.version.cuda), or set CUDA_HOME"
    )


_RUNTIME = (
    *("cudaMalloc", "cudaFree", "cudaMemsetAsync", "cudaEventCreateWithFlags", "cudaEventRecord", "cudaEventQuery"),
    *("cudaEventDestroy", "cudaGetLastError"),
)


def install_pluggable(device: int = 0) -> None:
    """Replace PyTorch's CUDA allocator by megamem's, for the life of the process and before CUDA is used.

    For where the wrapper cannot be compiled. `torch.cuda.memory_stats`, snapshots, CUDA-graph pools and the type of
    out-of-memory errors are lost: PyTorch has no way to ask a pluggable allocator for them.
    Raises NativeError where the core cannot be built, RuntimeError where CUDA is in use already.
    """
    library = set_up_pluggable(_cuda_runtime(), device)
    allocator = torch.cuda.memory.CUDAPluggableAllocator(
        library._name, "megamem_pluggable_malloc", "megamem_pluggable_free"
    )
    record = ctypes.cast(library.megamem_pluggable_record_stream, ctypes.c_void_p).value
    allocator.allocator().set_record_stream_fn(record)  # type: ignore[no-untyped-call]
    torch.cuda.memory.change_current_allocator(allocator)


def set_up_pluggable(runtime: ctypes.CDLL, device: int) -> ctypes.CDLL:
    """Make the arena and the heap behind the C functions that PyTorch is given; the library with these functions.

    Raises NativeError where that has been done.
    """
    library = load()
    addresses = (ctypes.c_void_p * len(_RUNTIME))(
        *(ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value for name in _RUNTIME)
    )
    if library.megamem_pluggable_setup(addresses, device) is None:
        raise NativeError("megamem's pluggable allocator is in place already, or there is no memory for it")
    return library


def _cuda_runtime() -> ctypes.CDLL:
    """The CUDA runtime that PyTorch has loaded."""
    major = (torch.version.cuda or "").partition(".")[0]
    for name in (None, f"libcudart.so.{major}"):
        try:
            library = ctypes.CDLL(name)
            if hasattr(library, _RUNTIME[0]):
                return library
        except OSError:
            continue
    raise NativeError("the CUDA runtime is not loaded; is this a PyTorch for CUDA?")


@final
class PluggableFrontEnd(FrontEnd):
    """In place of PyTorch's CUDA allocator, once `install_pluggable` has put it there."""

    name = "pluggable CUDA allocator"
    min_size = 1 << 20

    def __init__(self) -> None:
        library = load()
        self.core = ArenaCore(library, library.megamem_pluggable_arena())

    @staticmethod
    def is_set_up() -> bool:
        """Whether it is there."""
        return load().megamem_pluggable_arena() is not None

    def install(self) -> None:
        """It is installed for the life of the process."""

    def stream(self) -> int:
        return int(torch.cuda.current_stream().cuda_stream)

    def uninstall(self) -> None:
        """It stays, and serves no plan."""


def front_end_for(device: torch.device) -> FrontEnd:
    """The front end for tensors on `device`, compiled but not installed.

    Raises NativeError, with the remedy, where it cannot be built, or where there is none for the device.
    """
    if device.type == "cpu":
        return CpuFrontEnd()
    if device.type == "cuda":
        return PluggableFrontEnd() if PluggableFrontEnd.is_set_up() else CudaFrontEnd(device)
    raise NativeError(f"there is no arena for tensors on {device.type!r}")
