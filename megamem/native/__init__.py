"""The compiled core: a small C++17 library behind a C ABI (`src/megamem.h`), loaded with ctypes. No torch in it.

    load()                   the library, built at the first call on a machine
    load_front_end(...)      the same with a front end of the arena for PyTorch in it, built against its headers
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
from pathlib import Path
from typing import Any

from megamem.errors import NativeError
from megamem.native.build import FLAGS, build

ABI = 3
Poll = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_uint64)

_INT32S = ctypes.POINTER(ctypes.c_int32)
_INT64S = ctypes.POINTER(ctypes.c_int64)
_INSTANCE: list[Any] = [ctypes.c_int32, _INT32S, _INT32S, _INT64S]
_ARENA, _AT, _STREAM = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64
# name: (what it returns, what it takes)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "megamem_abi": (ctypes.c_int32, []),
    "megamem_first_fit": (ctypes.c_int32, [*_INSTANCE, _INT32S, ctypes.c_int32, _INT64S, Poll]),
    "megamem_canonical_search": (
        ctypes.c_int32,
        [
            *_INSTANCE,
            ctypes.c_int64,
            _INT32S,
            ctypes.c_int32,
            ctypes.c_uint64,
            _INT64S,
            ctypes.POINTER(ctypes.c_uint64),
            Poll,
        ],
    ),
    "megamem_align": (ctypes.c_int32, [ctypes.c_int32, _INT64S, ctypes.c_int32, _INT64S, _INT32S]),
    "megamem_arena_create_host": (_ARENA, []),
    "megamem_arena_destroy": (None, [_ARENA]),
    "megamem_arena_load": (ctypes.c_int32, [_ARENA, ctypes.c_int32, ctypes.c_int32, _INT64S, _INT64S, ctypes.c_int64]),
    "megamem_arena_begin": (ctypes.c_int32, [_ARENA, ctypes.c_int32, _STREAM]),
    "megamem_arena_end": (None, [_ARENA]),
    "megamem_arena_reset": (None, [_ARENA]),
    "megamem_arena_shrink": (ctypes.c_int32, [_ARENA]),
    "megamem_arena_malloc": (_AT, [_ARENA, ctypes.c_size_t, _STREAM]),
    "megamem_arena_free": (ctypes.c_int32, [_ARENA, _AT]),
    "megamem_arena_record_use": (ctypes.c_int32, [_ARENA, _AT, _STREAM]),
    "megamem_arena_watch": (None, [_ARENA, ctypes.c_int32, ctypes.c_int64]),
    "megamem_arena_note_malloc": (None, [_ARENA, _AT, ctypes.c_size_t, _STREAM]),
    "megamem_arena_note_free": (None, [_ARENA, _AT]),
    "megamem_arena_num_events": (ctypes.c_int64, [_ARENA]),
    "megamem_arena_read_events": (ctypes.c_int64, [_ARENA, ctypes.c_void_p, ctypes.c_int64]),
    "megamem_arena_poison": (None, [_ARENA, ctypes.c_int32]),
    "megamem_arena_counters": (None, [_ARENA, _INT64S]),
    "megamem_arena_blocks": (ctypes.c_int64, [_ARENA, _INT64S, _INT64S, ctypes.c_int64]),
    "megamem_arena_base": (_AT, [_ARENA]),
    "megamem_pluggable_setup": (_ARENA, [ctypes.c_void_p, ctypes.c_int32]),
    "megamem_pluggable_arena": (_ARENA, []),
    "megamem_pluggable_reserved": (ctypes.c_int64, []),
}


@functools.cache
def load() -> ctypes.CDLL:
    """The library with its signatures declared. Raises NativeError, with the remedy, where there is none."""
    _refuse_if_off()
    return _declared(build())


@functools.cache
def load_front_end(name: str, flags: tuple[str, ...], links: tuple[str, ...]) -> ctypes.CDLL:
    """The library with the front end `name` in it (see `build`). It stays loaded: tensors may outlive everything.

    Raises NativeError, with the remedy, where it cannot be built.
    """
    _refuse_if_off()
    return _declared(build((*FLAGS, *flags), front_end=name, links=links))


def _refuse_if_off() -> None:
    if os.environ.get("MEGAMEM_NATIVE", "1") == "0":
        raise NativeError("the compiled core is switched off by MEGAMEM_NATIVE=0; unset it to use the core")


def _declared(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
    except (OSError, AttributeError) as fault:
        raise NativeError(f"{path} cannot be loaded ({fault}); delete it, so that it is built again") from fault
    if library.megamem_abi() != ABI:
        raise NativeError(f"{path} has ABI {library.megamem_abi()}, this megamem needs {ABI}; delete it")
    return library
