"""The compiled core: a small C++17 library behind a C ABI (`src/megamem.h`), loaded with ctypes. No torch in it.

    load()                   the library, built at the first call on a machine
    python -m megamem.native build it now, for instance while a container image is made

The sources travel with the package. They are compiled with the system's compiler into a per-user cache, keyed by the
sources, the flags and the compiler: an upgrade of any of them builds anew, and ranks on one machine share a file. Where
it cannot be built, `NativeError` says how to get a compiler; solvers then use their slower Python twins.

Environment: CXX names the compiler, MEGAMEM_CACHE the cache's folder, MEGAMEM_NATIVE=0 switches the library off.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

from megamem.errors import NativeError
from megamem.native.build import build

ABI = 1
Poll = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_uint64)

_INT32S = ctypes.POINTER(ctypes.c_int32)
_INT64S = ctypes.POINTER(ctypes.c_int64)
_INSTANCE: list[Any] = [ctypes.c_int32, _INT32S, _INT32S, _INT64S]
_SIGNATURES: dict[str, list[Any]] = {
    "megamem_abi": [],
    "megamem_first_fit": [*_INSTANCE, _INT32S, ctypes.c_int32, _INT64S, Poll],
    "megamem_canonical_search": [
        *_INSTANCE, ctypes.c_int64, _INT32S, ctypes.c_uint64, _INT64S, ctypes.POINTER(ctypes.c_uint64), Poll,
    ],
}  # fmt: skip


@functools.cache
def load() -> ctypes.CDLL:
    """The library with its signatures declared. Raises NativeError, with the remedy, where there is none."""
    if os.environ.get("MEGAMEM_NATIVE", "1") == "0":
        raise NativeError("the compiled core is switched off by MEGAMEM_NATIVE=0; unset it to use the core")
    path = build()
    try:
        library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int32
    except (OSError, AttributeError) as fault:
        raise NativeError(f"{path} cannot be loaded ({fault}); delete it, so that it is built again") from fault
    if library.megamem_abi() != ABI:
        raise NativeError(f"{path} has ABI {library.megamem_abi()}, this megamem needs {ABI}; delete it")
    return library
