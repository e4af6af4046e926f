"""The wrapper of the CUDA caching allocator: it compiles against the installed PyTorch and, where a PyTorch for CUDA is
at hand, works with that one's own allocator over the stub of a CUDA runtime. Neither needs a GPU.

MEGAMEM_CUDA_TORCH names a folder `torch` of an unpacked wheel for CUDA (its include/ and lib/), where the installed
PyTorch is one for CPUs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megamem.errors import NativeError
from megamem.native.build import SOURCES

torch = pytest.importorskip("torch", reason="pip install 'megamem[train]'")

from megamem.runtime.arena_front_ends import cuda_flags  # noqa: E402

HERE = Path(__file__).parent
INSTALLED = Path(torch.__file__).parent


def flags() -> list[str]:
    """What the wrapper is compiled with; skips where CUDA's headers are nowhere."""
    try:
        return ["-std=c++17", "-Wall", "-Wextra", "-Werror", *cuda_flags()]
    except NativeError as fault:
        pytest.skip(str(fault))


def compiler() -> str:
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def test_it_compiles_against_the_installed_pytorch() -> None:
    """Every virtual function that this PyTorch has is overridden or pure in nothing: the class can be made."""
    if not (INSTALLED / "include" / "c10" / "cuda" / "CUDACachingAllocator.h").is_file():
        pytest.skip("the installed PyTorch has no headers of its CUDA allocator")
    source = SOURCES / "torch" / "cuda_allocator.cpp"
    command = [compiler(), *flags(), "-isystem", str(INSTALLED / "include"), "-fsyntax-only", str(source)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-4000:]


def cuda_torch() -> Path:
    folder = Path(os.environ.get("MEGAMEM_CUDA_TORCH", INSTALLED))
    if not (folder / "lib" / "libc10_cuda.so").is_file():
        pytest.skip(f"{folder.name} is no PyTorch for CUDA; MEGAMEM_CUDA_TORCH names an unpacked one")
    return folder


def test_it_works_with_pytorch_s_own_allocator(tmp_path: Path) -> None:
    """Recording, serving, second streams, snapshots, pools, memory running out, and what outlives it; sanitized."""
    folder = cuda_torch()
    needed = subprocess.run(
        ["readelf", "-d", str(folder / "lib" / "libc10_cuda.so")], capture_output=True, text=True, check=True
    )
    name = re.findall(r"\[(libcudart\.so\.\d+)\]", needed.stdout)[0]
    (tmp_path / "names").write_text(f"{name} {{ global: *; }};", encoding="utf-8")
    stub = tmp_path / name
    subprocess.run(
        [
            *("cc", "-shared", "-fPIC", "-O1", "-w", str(HERE / "cudart_stub.c"), "-o", str(stub)),
            *(f"-Wl,-soname,{name}", f"-Wl,--version-script={tmp_path / 'names'}"),
        ],
        check=True,
    )
    core = [SOURCES / f"{name}.cpp" for name in ("align", "arena", "arena_c", "matcher", "region")]
    sources = [HERE / "cuda_driver.cpp", SOURCES / "torch" / "cuda_allocator.cpp", *core]
    subprocess.run(
        [
            *(compiler(), *flags(), "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
            *("-isystem", str(folder / "include"), f"-I{SOURCES}", "-x", "c++", "-", "-x", "none"),
            *(f"-L{folder / 'lib'}", "-lc10_cuda", "-lc10", str(stub), "-o", str(tmp_path / "driver")),
            f"-Wl,-rpath,{folder / 'lib'}:{tmp_path}",
        ],
        input="".join(f'#include "{source}"\n' for source in sources),
        text=True,
        check=True,
    )
    run = subprocess.run([str(tmp_path / "driver")], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "passed\n"), run.stderr
