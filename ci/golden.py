"""Golden numbers: loss and gradient norm of each step of a few tiny jobs, recorded once and compared ever after.

The tests compare megamem with stock Megatron-Core, side by side. They do not notice when both change: another release
of PyTorch or Megatron-Core, a change to examples/pretrain_gpt.py, another driver. This does. Every job has fixed seeds,
a fixed text and fixed flags; what it showed is in ci/golden/CLASS.json, by device class (`cpu`, or the name of the GPU)
and by the series of torch and megatron-core, within which numbers are expected to stay.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "ci" / "golden"
SCRIPT = ROOT / "examples" / "pretrain_gpt.py"
PACKAGES = ("torch", "megatron-core")
NUMBERS = ("loss", "grad_norm")
TIMEOUT_S = 600

Json = dict[str, Any]


class GoldenError(RuntimeError):
    """A job could not be run, or a file could not be read; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The largest relative difference of each number, and the reason for it."""

    loss: float
    grad_norm: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of examples/pretrain_gpt.py on `ranks` processes."""

    ranks: int
    flags: str


COMMON = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --global-batch-size 8 --train-iters 6"
    " --swiglu --normalization RMSNorm --disable-bias-linear --lr 1e-3 --seed 1234"
)
JOBS = {
    "stock": Job(ranks=1, flags=""),
    "memo": Job(
        ranks=1, flags="--megamem-activations-policy memo --megamem-activations-keep-last-layers 0"
    ),
    "zb-h1": Job(ranks=2, flags="--pipeline-model-parallel-size 2 --megamem-schedule-name zb-h1"),
    "fused-loss": Job(ranks=1, flags="--megamem-vocabulary-fused-loss true"),
}  # fmt: skip

CPU = Tolerance(
    loss=1e-6,
    grad_norm=5e-6,
    # Measured between the SSE, AVX2 and AVX-512 paths of one CPU: at most 5.3e-8 of a loss and 2.1e-7 of a norm.
    reason="float32 on one thread, which another vector width sums in another order; 20 times what that was seen to do",
)
OTHER = Tolerance(
    loss=2e-3,
    grad_norm=2e-2,
    reason="bfloat16 keeps 8 bits, 4e-3 of each product, and GPU kernels differ between drivers",
)


def tolerance_of(device_class: str) -> Tolerance:
    """What may differ on this class of device."""
    return CPU if device_class == "cpu" else OTHER


def compare(job: str, golden: Sequence[Json], found: Sequence[Json], tolerance: Tolerance) -> list[str]:
    """What is off, one line each: the job, the step, the number, by how much. A number that is no number is off."""
    problems = []
    if len(golden) != len(found):
        problems.append(f"{job}: {len(found)} steps, {len(golden)} recorded")
    for expected, step in zip(golden, found, strict=False):
        for name in NUMBERS:
            ours, theirs, allowed = step[name], expected[name], getattr(tolerance, name)
            difference = abs(ours - theirs) / abs(theirs) if isinstance(ours, float) else math.inf
            if not difference <= allowed:
                problems.append(
                    f"{job}, step {expected['step']}: {name} {ours!r}, recorded {theirs!r}, "
                    f"relative difference {difference:.1e}, allowed {allowed:.0e}"
                )
    return problems


def write_corpus(folder: Path) -> str:
    """Twenty small texts of words drawn from a fixed seed; the digest of all of them."""
    draw = random.Random(20260101)
    words = ["".join(draw.choice("etaoinshrdlu") for _ in range(draw.randint(2, 8))) for _ in range(200)]
    digest = hashlib.sha256()
    for number in range(20):
        text = " ".join(words[int(200 * draw.random() ** 3)] for _ in range(400)) + "\n"
        (folder / f"{number:02}.txt").write_text(text, encoding="ascii")
        digest.update(text.encode("ascii"))
    return digest.hexdigest()[:16]


def run_job(job: Job, device: str, folder: Path) -> list[Json]:
    """Train; the numbers of each step. Raises GoldenError with the job's last words."""
    log = folder / "log.jsonl"
    command = [sys.executable]
    if job.ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.ranks)]
    command += [str(SCRIPT), "--data-text", str(folder / "text"), "--data-cache-path", str(folder / "cache")]
    command += ["--log-json", str(log), *flags_of(job, device).split()]
    # One thread, and cuBLAS without a choice of workspaces: the same sums in the same order.
    fixed = {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    try:
        done = subprocess.run(
            command, env=os.environ | fixed, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise GoldenError(f"took longer than {TIMEOUT_S} s") from error
    if done.returncode:
        raise GoldenError(f"ended with status {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [
        {"step": line["iteration"], **{name: line[name] for name in NUMBERS}} for line in lines if "iteration" in line
    ]


def flags_of(job: Job, device: str) -> str:
    """All flags that decide the numbers."""
    precision = "--device cuda --bf16" if device == "cuda" else "--device cpu"
    return " ".join(f"{COMMON} {precision} {job.flags}".split())


def run_jobs(names: Sequence[str], device: str, gpus: int) -> tuple[dict[str, Json], list[str]]:
    """Run these jobs one after the other: what each showed, and the failures. Jobs with too many ranks are left out."""
    found: dict[str, Json] = {}
    failures = []
    for name in names:
        job = JOBS[name]
        if device == "cuda" and job.ranks > gpus:
            print(f"golden: {name}: not run, needs {job.ranks} GPUs, this machine has {gpus}")
            continue
        with tempfile.TemporaryDirectory(prefix="megamem-golden-") as scratch:
            folder = Path(scratch)
            (folder / "text").mkdir()
            text = write_corpus(folder / "text")
            try:
                steps = run_job(job, device, folder)
            except GoldenError as error:
                failures.append(f"{name}: {error}")
                continue
        found[name] = {"ranks": job.ranks, "flags": flags_of(job, device), "text": text, "steps": steps}
    return found, failures


def check(found: Mapping[str, Json], record: Json, device_class: str) -> list[str]:
    """What is off between what was found and the record of this class and series; prints what agrees."""
    tolerance = tolerance_of(device_class)
    problems = []
    for name, ours in found.items():
        golden = record["jobs"].get(name)
        if golden is None:
            print(f"golden: {name}: no record for this job on {device_class}; {HOW}")
            continue
        if changed := [key for key in ("ranks", "flags", "text") if golden[key] != ours[key]]:
            problems.append(f"{name}: recorded with other {', '.join(changed)}: it is another job now; {HOW}")
            continue
        off = compare(name, golden["steps"], ours["steps"], tolerance)
        problems += off
        if not off:
            print(f"golden: {name}: {len(ours['steps'])} steps as recorded")
    return problems


HOW = "to make one: python ci/golden.py --record on that machine, look at the numbers, and commit the file"


def series() -> str:
    """The versions within which numbers are expected to stay, such as `torch 2.13, megatron-core 0.16`."""
    return ", ".join(f"{name} {'.'.join(metadata.version(name).split('.')[:2])}" for name in PACKAGES)


def device_class(device: str) -> str:
    """`cpu`, or the name of the first GPU as a file name."""
    if device == "cpu":
        return "cpu"
    import torch

    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")


def load(path: Path) -> Json:
    """The file of a device class; one without records if it is not there. Raises GoldenError if it cannot be read."""
    if not path.is_file():
        return {"records": {}}
    try:
        document: Json = json.loads(path.read_text(encoding="utf-8"))
        document["records"].items()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise GoldenError(f"{path}: not a file of golden numbers: {error!r}") from error
    return document


def store(path: Path, document: Json, jobs: Mapping[str, Json]) -> None:
    """Put these jobs into the document's record of this series, and write it; beside and renamed, never half a file."""
    record = document["records"].setdefault(series(), {"jobs": {}})
    versions = {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
    record.update(date=time.strftime("%Y-%m-%d", time.gmtime()), machine=platform.machine(), versions=versions)
    record["jobs"].update(jobs)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)
    print(f"golden: {', '.join(jobs)} of {series()} written to {path}")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="ci/golden.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Status 0: as recorded, or no record of this device class and series; 1: off, or failed; 2: usage.",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="run the jobs and compare with the record")
    what.add_argument("--record", action="store_true", help="run the jobs and write the record")
    parser.add_argument("--only", action="append", choices=tuple(JOBS), help="this job only; may be repeated")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs if there are any")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the records are (default: ci/golden)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="with --check: write what was found, as a record, also without one"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check or record; the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.record and args.out is not None:
        parser.error("--out goes with --check; --record writes into --folder")
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.device == "cuda" and not gpus:
        parser.error("--device cuda, but PyTorch sees no GPU")
    device = "cpu" if args.device == "cpu" or not gpus else "cuda"
    kind = device_class(device)
    try:
        return _run(args, device, kind, gpus)
    except GoldenError as error:
        print(f"golden: {error}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace, device: str, kind: str, gpus: int) -> int:
    path = args.folder / f"{kind}.json"
    document = load(path)
    record = document["records"].get(series())
    if args.check and record is None:
        known = "; there are records for " + " and for ".join(document["records"]) if document["records"] else ""
        print(f"golden: no record for {kind}, {series()}{known}; {HOW}")
        if args.out is None:
            return 0
    found, failures = run_jobs(args.only or list(JOBS), device, gpus)
    if args.record and not failures:
        store(path, document, found)
    if args.out is not None and found:
        store(args.out, {"records": {}}, found)
    if args.check and record is not None:
        failures += check(found, record, kind)
    for failure in failures:
        print(f"golden: {failure}", file=sys.stderr)
    if failures:
        allowed = tolerance_of(kind)
        print(f"golden: FAILED on {kind}, {series()}; tolerances: {allowed.reason}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
