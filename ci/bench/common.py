"""What all benchmarks share: the machine and versions they ran on, medians with spread, the table and the JSON file.

Each benchmark is a script; Python puts its folder first on the path, so `import common` finds this module.

No result of a benchmark means anything without the machine, the versions and the spread beside it, so `write` takes
no result without them. Times are compared within one run only: contenders are interleaved and repeated, and medians
are taken over the repetitions, all of which are in the file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = 1

Json = dict[str, Any]


def argument_parser(doc: str) -> argparse.ArgumentParser:
    """The arguments every benchmark has; `doc` is the module's docstring, shown by --help as it is."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="where the results go")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs, measures nothing")
    return parser


def describe_machine(with_gpu: bool) -> Json:
    """Processor, memory and, if it was used, GPU."""
    machine: Json = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _available_memory(),
        "load_1min": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": None,
    }
    if with_gpu:
        machine["gpu"] = _gpu()
    return machine


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _available_memory() -> int:
    from megamem.host import host_memory

    return host_memory().total_nbytes


def _gpu() -> Json:
    import torch

    found: Json = {"name": torch.cuda.get_device_name(), "memory_bytes": torch.cuda.mem_get_info()[1], "driver": None}
    command = ["nvidia-smi", "--query-gpu=driver_version,pcie.link.gen.current,clocks.max.sm", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
        found["driver"], found["pcie_generation"], found["max_clock"] = (part.strip() for part in line.split(","))
    return found


def describe_versions() -> Json:
    """Of Python, of the packages that matter, and the commit of this repository."""
    versions: Json = {"python": platform.python_version()}
    for package in ("torch", "megatron-core", "megamem", "transformer-engine"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    torch = sys.modules.get("torch")
    versions["cuda"] = torch.version.cuda if torch is not None else None
    versions["commit"] = _git("rev-parse", "HEAD")
    versions["dirty"] = bool(_git("status", "--porcelain", "--untracked-files=no", "--", "megamem", "patches", "ci"))
    return versions


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def summary(values: Iterable[float]) -> Json:
    """Median, quartiles and extremes of repetitions, with the repetitions."""
    each = list(values)
    if not each:
        raise ValueError("a summary of no repetitions")
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return {
        "median": middle, "q1": low, "q3": high, "min": min(each), "max": max(each), "repetitions": each,
    }  # fmt: skip


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Json:
    """Of two series of medians over neighbouring repetitions: the ratio pair by pair, so that drift cancels."""
    return summary(above / below for above, below in zip(numerators, denominators, strict=True))


def interleaved(contenders: Mapping[str, Callable[[], Json]], rounds: int) -> dict[str, list[Json]]:
    """Run each contender once a round, in turning order, so that none always follows the same other."""
    found: dict[str, list[Json]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            found[name].append(contenders[name]())
    return found


class Clock:
    """Wall and processor time of a block, in seconds; processor time is of all threads and ignores other processes."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[Clock]:
        """Add the block's time."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield self
        finally:
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu


def max_rss_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write(path: Path, benchmark: str, arguments: argparse.Namespace, results: Json, *, with_gpu: bool = False) -> None:
    """Write the results with all that is needed to judge them; written beside and renamed, so never half a file."""
    plain = {key: value for key, value in vars(arguments).items() if key != "out"}
    document = {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": describe_machine(with_gpu),
        "versions": describe_versions(),
        "arguments": plain,
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
    beside.replace(path)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table for people: the first column to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"\n{title}")
    for number, row in enumerate(cells):
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  " + "  ".join([first, *others]))
        if number == 0:
            print("  " + "  ".join("-" * width for width in widths))
    sys.stdout.flush()


def mib(nbytes: float) -> str:
    """Bytes as MiB, for tables."""
    return f"{nbytes / 2**20:,.2f}"
