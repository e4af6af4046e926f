"""The compiled core is built once, by whoever comes first, and its absence is told with the remedy."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megamem import native
from megamem.errors import NativeError
from megamem.native.build import FLAGS, SOURCES, build, cache_folder
from megamem.planner.allocation.core import best_core

FAST = (*FLAGS, "-O0")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MEGAMEM_CACHE", str(tmp_path / "cache"))
    native.load.cache_clear()
    yield tmp_path / "cache"
    native.load.cache_clear()


def test_it_is_built_once_and_keyed_by_its_flags(cache: Path) -> None:
    first = build(FAST)
    changed = first.stat().st_mtime_ns
    assert build(FAST) == first
    assert first.stat().st_mtime_ns == changed
    assert build((*FAST, "-g0")) != first
    assert sorted(path.suffix for path in cache.iterdir()) == [".so", ".so"]


def test_ranks_that_build_at_once_end_with_one_library(cache: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        paths = set(pool.map(lambda _: build(FAST), range(3)))
    assert list(cache.iterdir()) == list(paths)


def test_no_compiler_is_told_with_the_remedy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(NativeError, match=r"no C\+\+ compiler .* apt install g\+\+"):
        native.load()
    core, reason = best_core()
    assert (core.name, "apt install g++" in reason) == ("python", True)


def test_a_compiler_that_is_not_there_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(NativeError, match="CXX names the compiler 'no-such-compiler'"):
        build()


def test_a_compiler_that_fails_is_quoted(cache: Path) -> None:
    with pytest.raises(NativeError, match="does not compile") as caught:
        build((*FLAGS, "-std=c++no"))
    assert "-std=c++no" in str(caught.value)
    assert list(cache.iterdir()) == [], "nothing half-made is left"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("MEGAMEM_CACHE", str(tmp_path / "file"))
    with pytest.raises(NativeError, match="name a folder that can be written in MEGAMEM_CACHE"):
        build()


def test_a_damaged_library_is_named(cache: Path) -> None:
    path = build()
    path.write_bytes(b"no library")
    with pytest.raises(NativeError, match="delete it, so that it is built again"):
        native.load()


def test_it_can_be_switched_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMEM_NATIVE", "0")
    with pytest.raises(NativeError, match="MEGAMEM_NATIVE=0"):
        native.load()
    assert best_core()[0].name == "python"


def test_the_cache_follows_the_user_s_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGAMEM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/megamem")


def test_the_abi_is_the_header_s() -> None:
    assert f"#define MEGAMEM_ABI {native.ABI}" in (SOURCES / "megamem.h").read_text(encoding="utf-8")


def test_it_can_be_built_ahead_of_time(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megamem.native"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()).is_file()
    environment = os.environ | {"CXX": "no-such-compiler"}
    failed = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert failed.returncode == 1
    assert failed.stderr.startswith("megamem: CXX names")


@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler named c++")
def test_the_header_is_c(tmp_path: Path) -> None:
    """Others may call the core from C: the header has no C++ in it."""
    (tmp_path / "user.c").write_text(
        '#include "megamem.h"\nint main(void) { return MEGAMEM_FOUND; }\n', encoding="utf-8"
    )
    command = ["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{SOURCES}", "-fsyntax-only", "user.c"]
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    subprocess.run(command, check=True, cwd=tmp_path)
