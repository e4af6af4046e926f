"""Writes the parts of README.md that are made from something else, so that no figure is ever typed by hand.

    python ci/readme.py            rewrite README.md
    python ci/readme.py --check    exit 1 if it is stale

options   from the declarations in megamem/config.py
quickstart, figures   from the benchmarks' files in ci/bench/results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from megamem.config import options_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "ci" / "bench" / "results"


def main() -> int:
    """Rewrite or check; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if README.md is stale")
    is_check = parser.parse_args().check
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = filled(old)
    if is_check:
        if new != old:
            print("README.md is stale: run python ci/readme.py", file=sys.stderr)
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    return 0


def filled(text: str) -> str:
    """The README with its made parts made anew."""
    for name, content in (("quickstart", quickstart()), ("options", options_table()), ("figures", figures())):
        pattern = re.compile(rf"(<!-- {name}[^>]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, content=content: f"{match[1]}{content}{match[2]}", text)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"README.md: {count} places for {name}, instead of one")
    return text


def quickstart() -> str:
    """What the quickstart prints at its end, shortened, from the record of one run of it."""
    results = _read("quickstart.cpu.json")["results"]
    pairs = list(zip(*(results["runs"][name]["iterations"] for name in ("stock", "megamem")), strict=True))
    lines = ["```text", "iteration |   stock loss | megamem loss | difference"]
    for stock, ours in (*pairs[:2], pairs[-1]):
        if stock is pairs[-1][0]:
            lines.append("       ...")
        difference = abs(stock["loss"] - ours["loss"])
        lines.append(f"{stock['iteration']:>9} | {stock['loss']:12.6f} | {ours['loss']:12.6f} | {difference:10.1e}")
    memory = results["activation_bytes"]
    left, right = (f"{memory[name] / 2**20:.1f} MiB" for name in ("stock", "megamem"))
    verdict = "bitwise equal" if results["bitwise"] else f"max difference {results['max_loss_difference']:.1e}"
    lines += [
        "",
        f"{'':24} {'stock':>14} {'megamem':>14}   megamem / stock",
        f"{'activations, peak':24} {left:>14} {right:>14}   {memory['ratio']:.2f}",
        f"{'losses':24} {verdict}",
        "```",
        "",
    ]
    return "\n".join(lines)


def figures() -> str:
    """The tables of what was measured on the CPU."""
    return "\n".join(
        [*_retained(_read("retained_bytes.cpu.json")), "", *_bookkeeping(_read("bookkeeping.cpu.json")), ""]
    )


def _read(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return data


def _where(data: dict[str, Any]) -> str:
    machine, versions = data["machine"], data["versions"]
    return (
        f"{machine['cores']} cores of {machine['cpu']}, torch {versions['torch']}, megatron-core "
        f"{versions['megatron-core']}, {data['date'][:10]}"
    )


def _retained(data: dict[str, Any]) -> list[str]:
    lines = [
        "**What one layer holds between its forward and its backward pass**, in units of s x b x h elements (bf16), "
        "counted by the engine and by an independent count of live storages, which agree to the byte "
        f"(`python ci/bench/retained_bytes.py`; {_where(data)}):",
        "",
        "| | MEMO's layer (GPT, GELU 4h): device | host | Llama layer (GQA, SwiGLU): device | host |",
        "|---|---|---|---|---|",
    ]
    memo = data["results"]["memo bf16"]["contenders"]
    llama = data["results"]["llama bf16"]["contenders"]
    for name in memo:
        cells = [f"{row['live_units']:.2f} | {row['host_units']:.2f}" for row in (memo[name], llama[name])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _bookkeeping(data: dict[str, Any]) -> list[str]:
    steps, layers = data["results"]["steps"], data["results"]["layers"]
    ratio, added = steps["ratio"], layers["added_microseconds"]
    lines = [
        "**What the engine costs the processor** "
        f"(`python ci/bench/bookkeeping.py`; {_where(data)}; median, with the range over the repetitions):",
        "",
        "| | |",
        "|---|---|",
        "| a step with everything swapped over a step of stock Megatron, "
        f"h = {steps['hidden']}, s = {steps['tokens']}, copies made by the processor included "
        f"| {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}) |",
    ]
    for name, what in (
        ("empty hooks", "saved-tensor hooks of PyTorch that do nothing"),
        ("keep", "the engine, everything kept"),
        ("memo 1", "the engine, everything swapped"),
    ):
        total = added[name]["total"]
        lines.append(
            f"| microseconds added to a layer, forward and backward: {what} | {total['median']:.0f} "
            f"({total['min']:.0f} to {total['max']:.0f}) |"
        )
    verdicts = [f"* {one['what']}: {'met' if one['met'] else '**not met**'}" for one in data["results"]["targets"]]
    return [*lines, "", *verdicts]


if __name__ == "__main__":
    sys.exit(main())
