"""The README's first command as a benchmark: stock Megatron-Core and megamem train the same GPT, one after the other.

    python ci/bench/quickstart.py --out ci/bench/results/quickstart.cpu.json
    python ci/bench/quickstart.py --out FILE.json -- --megamem-schedule-name gis-h      # flags for the training job

Runs `examples/quickstart.sh` and keeps what its log says: every iteration's loss in both runs, and the most memory that
activations took on any rank. Step times are in the file too, but the two runs follow each other, so they are no
measurement of speed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import common

RUNS = ("stock", "megamem")


def run(flags: list[str]) -> common.Json:
    """Run the script; by run, its iterations and its summary."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        command = [str(common.ROOT / "examples" / "quickstart.sh"), "--log-json", str(log), *flags]
        subprocess.run(command, check=True, cwd=common.ROOT)
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return {
        name: {
            "iterations": [line for line in lines if line.get("run") == name and "loss" in line],
            "summary": next(line for line in lines if line.get("summary") == name),
        }
        for name in RUNS
    }


def compared(runs: common.Json) -> common.Json:
    """What the README says of it."""
    stock, ours = (runs[name]["summary"]["activation_bytes"] for name in RUNS)
    losses = [[line["loss"] for line in runs[name]["iterations"]] for name in RUNS]
    return {
        "activation_bytes": {"stock": stock, "megamem": ours, "ratio": ours / stock},
        "max_loss_difference": max(abs(one - other) for one, other in zip(*losses, strict=True)),
        "bitwise": losses[0] == losses[1],
    }


def main() -> None:
    """Run and write."""
    parser = common.argument_parser(__doc__ or "")
    parser.add_argument("flags", nargs="*", metavar="FLAG", help="for examples/pretrain_gpt.py, after --")
    args = parser.parse_args()
    flags = ["--train-iters", "3", "--num-layers", "4", "--seq-length", "128"] if args.quick else []
    runs = run([*flags, *args.flags])
    results = {"runs": runs, **compared(runs)}
    results["targets"] = [{"what": "the losses of both runs are bitwise equal", "met": results["bitwise"]}]
    common.write(args.out, "quickstart", args, results)


if __name__ == "__main__":
    sys.exit(main())
