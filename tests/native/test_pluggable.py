"""What PyTorch's `CUDAPluggableAllocator` would call, over the stub of a CUDA runtime: each case in a process of its
own, because an allocator is put in for the life of one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

STUB = Path(__file__).with_name("cudart_stub.c")
MIB = 1 << 20

PREPARE = """
import ctypes, sys
from megamem.errors import NativeError
from megamem.runtime.arena_front_ends import PluggableFrontEnd, set_up_pluggable

MIB = 1 << 20
stub = ctypes.CDLL(sys.argv[1])
def of_stub(name, kind):
    return kind.in_dll(stub, name)
capacity, used, mallocs = (of_stub(f"stub_{n}", ctypes.c_size_t) for n in ("capacity", "used", "mallocs"))
events_done = of_stub("stub_events_done", ctypes.c_int)
assert not PluggableFrontEnd.is_set_up()
library = set_up_pluggable(stub, 0)
front_end = PluggableFrontEnd()
core = front_end.core
malloc, free = library.megamem_pluggable_malloc, library.megamem_pluggable_free
record = library.megamem_pluggable_record_stream
malloc.argtypes, malloc.restype = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
free.argtypes, free.restype = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p], None
record.argtypes, record.restype = [ctypes.c_void_p, ctypes.c_void_p], None
"""

CASES = {
    "once": """
try:
    set_up_pluggable(stub, 0)
except NativeError as fault:
    assert "in place already" in str(fault)
else:
    raise AssertionError("twice")
""",
    "the heap caches, splits and merges": """
one, two = malloc(4 * MIB, 0, None), malloc(4 * MIB, 0, None)
assert two == one + 4 * MIB and mallocs.value == 1 and used.value == 20 * MIB
free(one, 4 * MIB, 0, None); free(two, 4 * MIB, 0, None)
assert malloc(8 * MIB, 0, None) == one and mallocs.value == 1
small = malloc(100, 0, None)
assert malloc(0, 0, None) is None and mallocs.value == 1
other = malloc(4 * MIB, 0, 77)
assert mallocs.value == 2, "another stream has segments of its own"
free(one, 8 * MIB, 0, None); free(small, 100, 0, None); free(other, 4 * MIB, 0, 77); free(None, 0, 0, None)
capacity.value = used.value + 2 * MIB
large = malloc(30 * MIB, 0, None)  # what is free is given back first
assert large and used.value == 30 * MIB
""",
    "steps are recorded": """
core.watch(max_events=10)
core.begin(None, 0)
one = malloc(3 * MIB, 0, None)
record(one, 5)
free(one, 3 * MIB, 0, None)
assert [(e.kind, e.size, e.stream) for e in core.events()] == [
    ("step", -1, 0), ("malloc", 3 * MIB, 0), ("use", 0, 5), ("free", 0, 0)]
""",
    "plans are served": """
core.load(0, [4 * MIB, 2 * MIB], [0, 4 * MIB], min_size=MIB)
for step in range(3):
    assert core.begin(0, 0)
    small, one, two = malloc(10, 0, None), malloc(4 * MIB, 0, None), malloc(2 * MIB, 0, None)
    assert (one, two) == (core.base, core.base + 4 * MIB) and not core.base <= small < core.base + 6 * MIB
    before = mallocs.value if step == 0 else before
    for at in (small, one, two):
        free(at, 1, 0, None)
assert mallocs.value == before, "no cudaMalloc after the switch"
""",
    "a second stream keeps blocks of arena and heap": """
core.load(0, [4 * MIB], [0], min_size=MIB)
core.begin(0, 0)
events_done.value = 0
one = malloc(4 * MIB, 0, None)
core.begin(None, 0)
two = malloc(4 * MIB, 0, None)
for at in (one, two):
    record(at, 5)
    free(at, 4 * MIB, 0, None)
core.begin(0, 0)
assert malloc(4 * MIB, 0, None) not in (one, two)
events_done.value = 1
core.begin(0, 0)
assert malloc(4 * MIB, 0, None) == one
assert malloc(4 * MIB, 0, None) == two
""",
    "an idle arena gives way": """
core.load(0, [40 * MIB], [0], min_size=MIB)
core.begin(0, 0)
free(malloc(40 * MIB, 0, None), 40 * MIB, 0, None)
core.end()
capacity.value = 50 * MIB
assert malloc(30 * MIB, 0, None) and core.counters().capacity == 0
assert not core.begin(0, 0), "there is no room for it now"
""",
}


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    target = tmp_path_factory.mktemp("stub") / "libcudart_stub.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", str(STUB), "-o", str(target)], check=True)
    return target


def test_all_of_it(stub: Path, tmp_path: Path) -> None:
    """One interpreter for all cases, forked for each: torch takes seconds to load."""
    body = "\n".join(
        f"if os.fork() == 0:\n    exec({case!r}, globals()); os._exit(0)\nif os.wait()[1]: print({name!r})"
        for name, case in CASES.items()
    )
    script = tmp_path / "cases.py"
    script.write_text(f"import os\n{PREPARE}\n{body}\n", encoding="utf-8")
    run = subprocess.run([sys.executable, str(script), str(stub)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
