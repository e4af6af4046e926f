"""Training with coded activations beside training in bf16: losses of the same job, on real text, with several seeds.

    python ci/bench/training_parity.py --out ci/bench/results/training_parity.cpu.json
    python ci/bench/training_parity.py --model gpt --out ci/bench/results/training_parity_gpt.cpu.json

Runs `examples/pretrain_gpt.py` once for each contender and seed: a small GPT on the sources of Python's standard
library. `--model llama` has RMSNorm, SwiGLU, grouped queries and rotary positions; `gpt` LayerNorm, GELU of 4 h, biases
and learned positions, and `regelu2` among its contenders. A seed decides weights and data, so runs of one seed differ
in what their contender changes, and in what becomes of such a difference in 300 steps. The yardsticks: `fp32`, stock
Megatron without bf16, says what another precision changes; the spread of bf16 over seeds what chance changes.

`curve` is the mean training loss of every ten steps. A picture of the curves is written beside the JSON file.

Target: no contender's validation loss differs from bf16's, in the mean over seeds, by more than fp32's does or by more
than half the standard deviation of bf16 over seeds, whichever is larger.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import common
from curves import Panel, Series, render_curves

BASELINE = "bf16"
FP8 = "--megamem-fp8-saved-activations"
SWAPPED = (
    *("--megamem-activations-policy", "memo", "--megamem-activations-keep-last-layers", "0"),
    *("--megamem-activations-compress", "fp8", "--megamem-activations-swap-fraction"),
)
TILES = ("--megamem-mlp-tiles", "4")
_EVERYWHERE: dict[str, tuple[str, ...]] = {
    BASELINE: ("--bf16",),
    "fp32": (),
    "rebuild": ("--bf16", FP8, "rebuild"),
    "mlp": ("--bf16", FP8, "mlp"),
}
CONTENDERS: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": {
        **_EVERYWHERE,
        "all": ("--bf16", FP8, "all"),
        "all, int8": ("--bf16", FP8, "all", "--megamem-fp8-format", "int8"),
        "all, e5m2": ("--bf16", FP8, "all", "--megamem-fp8-format", "e5m2"),
        "all, powers of two": ("--bf16", FP8, "all", "--megamem-fp8-power-of-two-scales", "true"),
        "swapped in fp8": ("--bf16", *SWAPPED, "1"),
        "tiles": ("--bf16", *TILES),
        "half swapped in fp8, tiles": ("--bf16", *SWAPPED, "0.5", *TILES),
    },
    "gpt": {**_EVERYWHERE, "regelu2": ("--bf16", FP8, "regelu2")},
}
"""By model, and flags by name."""
_SIZES = (
    "--num-layers=4", "--hidden-size=128", "--num-attention-heads=4", "--seq-length=128", "--micro-batch-size=8",
    "--lr=2e-3", "--log-interval=100",
)  # fmt: skip
MODELS: dict[str, tuple[str, ...]] = {
    "llama": (*_SIZES, "--ffn-hidden-size=384", "--group-query-attention", "--num-query-groups=2", "--swiglu",
              "--normalization=RMSNorm", "--disable-bias-linear"),
    "gpt": (*_SIZES, "--normalization=LayerNorm", "--position-embedding-type=learned_absolute"),
}  # fmt: skip
EVERY = 10  # steps of a point of the curves


def train(flags: tuple[str, ...], seed: int, args: argparse.Namespace, folder: Path) -> common.Json:
    """One run of the example: its losses and the activation bytes of its fullest rank."""
    log = folder / "log.jsonl"
    log.unlink(missing_ok=True)
    sizes = (
        f"--train-iters={args.iterations}", f"--lr-warmup-iters={args.iterations // 15}",
        f"--eval-iters={args.evaluations}", f"--seed={seed}",
    )  # fmt: skip
    data = ("--data-text", str(args.text), "--data-cache-path", str(folder / "data"), "--device", args.device)
    command = [sys.executable, "-W", "ignore", str(common.ROOT / "examples" / "pretrain_gpt.py")]
    subprocess.run(
        [*command, *MODELS[args.model], *data, *sizes, *flags, "--log-json", str(log)], check=True, cwd=common.ROOT
    )
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "run" in line and "loss" in line]
    summary = next(line for line in lines if "summary" in line)
    return {
        "curve": [round(statistics.fmean(losses[at : at + EVERY]), 5) for at in range(0, len(losses), EVERY)],
        "validation": summary["validation"][-1][1],
        "activation_bytes": summary["activation_bytes"],
        "median_step_ms": summary["median_step_ms"],
    }


def run(args: argparse.Namespace) -> common.Json:
    """Every contender with every seed; those of one seed follow one another."""
    runs: dict[str, list[common.Json]] = {name: [] for name in args.contenders}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, args.seeds + 1):
            for number, name in enumerate(runs, start=1):
                print(f"seed {seed} of {args.seeds}, contender {number} of {len(runs)}: {name}", flush=True)
                runs[name].append(train(CONTENDERS[args.model][name], seed, args, Path(folder)))
    results: common.Json = {
        "every": EVERY,
        "contenders": {name: summarised(runs, name, CONTENDERS[args.model][name]) for name in runs},
    }
    results["targets"] = targets(results["contenders"])
    return results


def summarised(runs: dict[str, list[common.Json]], name: str, flags: tuple[str, ...]) -> common.Json:
    """A contender's runs, and the differences of its validation losses from bf16's of the same seed."""
    found = runs[name]
    differences = [one["validation"] - other["validation"] for one, other in zip(found, runs[BASELINE], strict=True)]
    return {
        "flags": " ".join(flags),
        "validation": statistics.fmean(one["validation"] for one in found),
        "validation_spread": statistics.pstdev(one["validation"] for one in found),
        "difference": statistics.fmean(differences),
        "differences": differences,
        "activation_bytes": found[0]["activation_bytes"],
        "runs": found,
    }


def targets(found: common.Json) -> list[common.Json]:
    """What was asked for."""
    noise = max(abs(found["fp32"]["difference"]), found[BASELINE]["validation_spread"] / 2)
    return [
        {
            "what": f"{name}: validation loss {one['difference']:+.4f} against bf16, {noise:.4f} is noise",
            "met": abs(one["difference"]) <= noise,
        }
        for name, one in found.items()
        if name not in (BASELINE, "fp32")
    ]


def picture(results: common.Json) -> str:
    """Losses over steps, and their differences from bf16 of the same seed; lines are means over seeds."""
    found, every = results["contenders"], results["every"]
    base = [run["curve"] for run in found[BASELINE]["runs"]]
    steps = [every * (index + 1) for index in range(len(base[0]))]
    losses, differences = [], []
    for name, one in found.items():
        curves = [run["curve"] for run in one["runs"]]
        losses.append(Series(name, [statistics.fmean(values) for values in zip(*curves, strict=True)]))
        if name != BASELINE:
            apart = [
                [ours - theirs for ours, theirs in zip(*pair, strict=True)] for pair in zip(curves, base, strict=True)
            ]
            differences.append(Series(name, [statistics.fmean(values) for values in zip(*apart, strict=True)]))
    spread = [statistics.pstdev(values) for values in zip(*base, strict=True)]
    return render_curves(
        f"Training loss, {len(base)} seeds",
        [
            Panel("mean over seeds", "training loss", steps, losses),
            Panel("difference from bf16 of the same seed; grey: bf16's standard deviation over seeds", "", steps,
                  differences, band=spread),
        ],
    )  # fmt: skip


def main() -> None:
    """Run, draw and write."""
    parser = common.argument_parser(__doc__ or "")
    parser.add_argument("--iterations", type=int, default=300, help="training steps (default: %(default)s)")
    parser.add_argument("--evaluations", type=int, default=16, help="batches of the evaluation (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="cpu")
    parser.add_argument("--text", type=Path, help="a folder with text files (default: Python's standard library)")
    parser.add_argument("--model", choices=tuple(MODELS), default="llama", help="default: %(default)s")
    parser.add_argument(
        "--contenders", type=lambda text: text.split("/"), metavar="NAME/NAME",
        help="bf16 and fp32, and any of the model's others (default: all)",
    )  # fmt: skip
    args = parser.parse_args()
    args.contenders = args.contenders or list(CONTENDERS[args.model])
    if unknown := set(args.contenders) - set(CONTENDERS[args.model]):
        parser.error(f"--model {args.model} has {', '.join(CONTENDERS[args.model])}; not {', '.join(sorted(unknown))}")
    if missing := {BASELINE, "fp32"} - set(args.contenders):
        parser.error(f"what the others are compared with is left out: {', '.join(sorted(missing))}")
    args.text = args.text or Path(sysconfig.get_paths()["stdlib"])
    if args.quick:
        args.iterations, args.evaluations, args.seeds = 4, 1, 1
    results = run(args)
    args.text = args.text.name  # no path of this machine
    rows = [
        (name, f"{one['validation']:.4f}", f"{one['difference']:+.4f}", f"{one['validation_spread']:.4f}",
         common.mib(one["activation_bytes"]) if one["activation_bytes"] else "-")
        for name, one in results["contenders"].items()
    ]  # fmt: skip
    header = ("", "validation loss", "against bf16", "over seeds", "activations MiB")
    common.print_table(f"{args.iterations} steps, {args.seeds} seeds", header, rows)
    for target in results["targets"]:
        print(("  met      " if target["met"] else "  NOT MET  ") + target["what"])
    common.write(args.out, "training_parity", args, results)
    args.out.with_suffix(".svg").write_text(picture(results), encoding="utf-8")


if __name__ == "__main__":
    main()
