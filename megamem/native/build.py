"""Compile the core with the system's C++ compiler into a per-user cache, once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megamem.errors import NativeError

SOURCES = Path(__file__).parent / "src"
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=default", "-Wall", "-Wextra")
_COMPILERS = ("c++", "g++", "clang++")
_REMEDY = (
    "install one (Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: conda install cxx-compiler) "
    "or name it in CXX"
)


def build(flags: Sequence[str] = FLAGS, *, front_end: str | None = None, links: Sequence[str] = ()) -> Path:
    """The path of the library, compiled if the cache has it not. Raises NativeError with the remedy.

    With `front_end`, a source in `src/torch`, that of the core and this front end in one, linked with `links`. `flags`
    must then tell one PyTorch from another, since its headers are no part of the cache's key.
    """
    compiler = find_compiler()
    target = cache_folder() / f"megamem-{_key(compiler, [*flags, front_end or '', *links])}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=target.parent, suffix=".part")
        os.close(handle)
    except OSError as fault:
        raise NativeError(
            f"the compiled core cannot be kept in {target.parent} ({fault.strerror}); name a folder that can be "
            "written in MEGAMEM_CACHE"
        ) from fault
    part = Path(name)
    try:
        sources = [*sorted(SOURCES.glob("*.cpp")), *([SOURCES / "torch" / front_end] if front_end else [])]
        # As one: half of the time goes into headers that all of them include.
        text = "".join(f'#include "{source.relative_to(SOURCES).as_posix()}"\n' for source in sources)
        _compile([*compiler, *flags, "-I", str(SOURCES), "-o", str(part), "-x", "c++", "-", "-x", "none", *links], text)
        part.replace(target)  # at once: another rank sees no library or a whole one
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
    return target


def cache_folder() -> Path:
    """Where built libraries are kept: MEGAMEM_CACHE, else megamem/ in the user's cache folder."""
    if folder := os.environ.get("MEGAMEM_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "megamem"
    try:
        return Path.home() / ".cache" / "megamem"
    except RuntimeError as fault:
        raise NativeError("there is no home folder to keep the compiled core in; name one in MEGAMEM_CACHE") from fault


def find_compiler() -> list[str]:
    """The compiler's command; CXX may hold arguments too. Raises NativeError with the remedy where there is none."""
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked:
        if shutil.which(asked[0]) is None:
            raise NativeError(f"CXX names the compiler {asked[0]!r}, which is not there; {_REMEDY}")
        return asked
    for name in _COMPILERS:
        if shutil.which(name) is not None:
            return [name]
    raise NativeError(f"no C++ compiler ({', '.join(_COMPILERS)}) was found, so the core cannot be built; {_REMEDY}")


def _key(compiler: Sequence[str], flags: Sequence[str]) -> str:
    """Sixteen hex digits that change with sources, flags, compiler and platform."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    try:
        version = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError) as fault:
        raise NativeError(f"{shlex.join(compiler)} --version fails ({fault}); {_REMEDY}") from fault
    digest.update("\0".join([*flags, shlex.join(compiler), version, sys.platform, os.uname().machine]).encode())
    return digest.hexdigest()[:16]


def _compile(command: Sequence[str], source: str) -> None:
    try:
        run = subprocess.run(command, input=source, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.SubprocessError) as fault:
        raise NativeError(f"{shlex.join(command)} cannot be run ({fault}); {_REMEDY}") from fault
    if run.returncode != 0:
        raise NativeError(
            f"the core does not compile; it needs a compiler of C++17, and {shlex.join(command)} says:\n"
            f"{run.stderr.strip()[-2000:]}\n{_REMEDY}"
        )
