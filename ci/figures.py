"""The tables of the documentation that are made from the benchmarks' files in ci/bench/results."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "bench" / "results"


def quickstart() -> str:
    """What the quickstart prints at its end, shortened, from the record of one run of it."""
    results = read("quickstart.cpu.json")["results"]
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


def vocabulary() -> str:
    """Memory of the output layer with its loss."""
    memory = read("vocabulary_memory.cpu.json")
    shape = memory["results"]
    lines = [
        f"Memory of the output layer with its loss, forward and backward, beside hidden states, weight and main_grad: "
        f"{shape['tokens']} tokens, h = {shape['hidden']}, V = {shape['vocabulary']}, bf16; every operator traced "
        f"(`python ci/bench/vocabulary_memory.py`; {where(memory)}).",
        "",
        "| | most at once | kept from forward to backward | largest tensor / (tokens x vocabulary) |",
        "|---|---|---|---|",
    ]
    for name, row in shape["rows"].items():
        if "4 ranks" in name or "16 ranks" in name:
            continue
        lines.append(
            f"| {_OUTPUT_LAYERS.get(name, name)} | {row['peak_bytes'] / 2**20:,.0f} MiB "
            f"| {row['kept_bytes'] / 2**20:,.1f} MiB | {row['largest']:.2f} |"
        )
    return "\n".join([*lines, "", *verdicts(memory)]) + "\n"


_OUTPUT_LAYERS = {
    "torch": "`F.linear`, `F.cross_entropy`",
    "Megatron": "Megatron-Core, unfused",
    "fused": "`vocabulary.fused_loss`",
}


def _speeds(data: dict[str, Any]) -> list[str]:
    lines = [
        "**What vocabulary parallelism is worth in time**: speed, as a share of what the ranks would reach without "
        "idle time or recomputation, by size of the vocabulary (`python ci/bench/vocabulary_schedules.py`; simulated "
        "with the models of arXiv 2411.05288, tables 5 and 6; "
        "parallel: one barrier, logits made again, and in brackets kept):",
        "",
        "| model | schedule | ranks | | 32k | 64k | 128k | 256k |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = data["results"]["rows"]
    for key in dict.fromkeys((row["model"], row["family"], row["ranks"]) for row in rows if row["published"]):
        again, kept = (
            [row for row in rows if (row["model"], row["family"], row["ranks"]) == key and row["recomputed"] == which]
            for which in (True, False)
        )
        stock = " | ".join(f"{row['baseline']['speed']:.2f}" for row in again)
        ours = " | ".join(
            f"{one['vocab-2']['speed']:.2f} ({other['vocab-2']['speed']:.2f})"
            for one, other in zip(again, kept, strict=True)
        )
        name = f"{key[0]} | `{key[1]}` | {key[2]}"
        lines += [f"| {name} | output layer on the last stage | {stock} |", f"| | | | parallel | {ours} |"]
    return [*lines, "", *verdicts(data)]


def _output_layer(data: dict[str, Any]) -> list[str]:
    lines = [
        "**What the loss without logits costs on a CPU**: output layer and mean loss, forward and backward, fp32. "
        "Processor time over that of Megatron-Core in the same run, and the most memory at once, gradients included "
        f"(`python ci/bench/linear_cross_entropy.py`; {where(data)}; on a GPU, Liger and CCE take part too). "
        "It multiplies four times, Megatron three times:",
        "",
    ]
    cells = data["results"]["cells"]
    shapes = [f"{cell['tokens']} x {cell['hidden']} x {cell['vocabulary']}" for cell in cells]
    lines += [f"| | {' | '.join(f'{shape}: time | memory' for shape in shapes)} |", f"|---{'|---' * 2 * len(cells)}|"]
    ran = [
        {name: one for name, one in cell["contenders"].items() if one["status"] == "ok" and one["cpu_ms"]}
        for cell in cells
    ]
    for name in ran[0]:
        row = [
            f"{of_cell[name]['cpu_ms']['median'] / of_cell['Megatron']['cpu_ms']['median']:.2f} | "
            f"{of_cell[name]['peak_bytes'] / 2**20:.0f} MiB"
            for of_cell in ran
        ]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return [*lines, "", *verdicts(data)]


def figures() -> str:
    """The tables of what was measured on the CPU."""
    parts = (
        _retained(read("retained_bytes.cpu.json")),
        _bookkeeping(read("bookkeeping.cpu.json")),
        _compressed(read("compressed_swap.cpu.json")),
        _tiled(read("tiled_mlp.cpu.json")),
        _saved(read("saved_activations.cpu.json")),
        _parity(read("training_parity.cpu.json"), "training_parity.cpu.svg", "RMSNorm, SwiGLU"),
        _parity(
            read("training_parity_gpt.cpu.json"),
            "training_parity_gpt.cpu.svg",
            "LayerNorm, GELU",
            " --model gpt --contenders bf16/fp32/regelu2",
        ),
        _output_layer(read("linear_cross_entropy.cpu.json")),
        _speeds(read("vocabulary_schedules.cpu.json")),
        _published(read("schedules.cpu.json")),
        _searched(read("schedule_search.cpu.json")),
        _loop(read("pipeline_loop.cpu.json")),
        _planner(read("planner.cpu.json")),
    )
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _planner(data: dict[str, Any]) -> list[str]:
    """What is predicted beside what papers publish, and beside what other tools predict."""
    results = data["results"]
    lines = [
        "**What `megamem plan` predicts, beside what is published**, from the hardware table alone; nothing is fitted "
        f"(`python ci/bench/planner.py`; {where(data)}):",
        "",
        "| | source | published | predicted | off by | asked for |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["published"]:
        asked = f"{100 * row['within']:.0f} %" if row["within"] else "exact"
        unit = row["unit"]
        lines.append(
            f"| {row['what']} | {row['source']} | {row['published']:,.4g} {unit} | {row['ours']:,.4g} {unit} "
            f"| {100 * row['error']:+.1f} % | {asked} |"
        )
    lines += [
        "",
        "**Memory of a GPU in GiB by different tools**: 8 GPUs, tensor parallel 8, one sequence of 32K tokens, bf16, "
        "fp32 gradients, Adam. Megatron's is `theoretical_memory_utils` of Megatron-Bridge 0.3.1, and assumes "
        "selective recomputation and sequence parallelism; DeepSpeed's is the formula of its documentation (ZeRO-2 / "
        "ZeRO-3 on 8 GPUs; it says nothing of activations); accelerate's is `estimate-memory`, for one GPU, with Adam.",
        "",
        "| | parameters | megamem: states | activations | Megatron: states | activations | DeepSpeed | accelerate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["estimators"]:
        mine, megatron, deepspeed, accelerate = row["ours"], row["megatron"], row["deepspeed"], row["accelerate"]
        theirs = (
            [gib(megatron["states"]), gib(megatron["activations"])] if isinstance(megatron, dict) else [megatron, ""]
        )
        whole = gib(accelerate["step"]) if isinstance(accelerate, dict) else accelerate
        lines.append(
            f"| {row['model']} | {row['parameters']['ours'] / 1e9:.2f} B | {gib(mine['states'])} "
            f"| {gib(mine['activations'])} | {theirs[0]} | {theirs[1]} "
            f"| {gib(deepspeed['zero2'])} / {gib(deepspeed['zero3'])} | {whole} |"
        )
    return [*lines, "", *verdicts(data)]


def gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:,.1f}"


def read(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return data


def where(data: dict[str, Any]) -> str:
    machine, versions = data["machine"], data["versions"]
    return (
        f"{machine['cores']} cores of {machine['cpu']}, torch {versions['torch']}, megatron-core "
        f"{versions['megatron-core']}, {data['date'][:10]}"
    )


def _retained(data: dict[str, Any]) -> list[str]:
    lines = [
        "**What one layer holds between its forward and its backward pass**, in units of s x b x h elements (bf16), "
        "counted by the engine and by an independent count of live storages, which agree to the byte "
        f"(`python ci/bench/retained_bytes.py`; {where(data)}):",
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
        f"(`python ci/bench/bookkeeping.py`; {where(data)}; median, with the range over the repetitions):",
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
    return [*lines, "", *verdicts(data)]


def _compressed(data: dict[str, Any]) -> list[str]:
    memo, llama = (data["results"]["shapes"][kind] for kind in ("memo", "llama"))
    lines = [
        "**What swap in FP8 moves, and what it does to gradients**: bytes over those of plain swap, which is bitwise "
        "equal to stock Megatron; relative error of the gradient of the input of "
        f"{data['results']['layers']} layers, and of the parameter where it is largest "
        f"(`python ci/bench/compressed_swap.py`; bf16, {where(data)}):",
        "",
        "| compressed | MEMO's layer: bytes | error, input | error, worst | Llama layer: bytes | error, input "
        "| error, worst |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in memo["contenders"]:
        what = "*query and key, which is refused*" if name == "query and key" else name
        cells = [
            f"{found['bytes_ratio']:.3f} | {found['error']['input']:.2%} | {found['error']['worst_parameter']:.2%}"
            for found in (memo["contenders"][name], llama["contenders"][name])
        ]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    cells = [
        f"| {case['bf16 itself']['input']:.2%} | {case['bf16 itself']['worst_parameter']:.2%}" for case in (memo, llama)
    ]
    lines.append(f"| *bf16 itself, against fp32* | {' | '.join(cells)} |")
    return [*lines, "", *verdicts(data)]


def _tiled(data: dict[str, Any]) -> list[str]:
    memo, llama = (data["results"]["shapes"][kind] for kind in ("memo", "llama"))
    columns = ("held", "forward, on top", "backward, on top", "FLOPs")
    lines = [
        "**What the MLP in tiles saves**, in units of s x b x h elements: what a layer holds between the passes, and "
        "the most that is in device memory besides in each pass; FLOPs of matrix products over stock's. Chunks are "
        "Megatron-Core's `mlp_chunks_for_training`; recomputed, those of the Mini-Sequence Transformer and ALST "
        f"(`python ci/bench/tiled_mlp.py`; {where(data)}):",
        "",
        "| policy: MLP | MEMO's layer: " + " | ".join(columns) + " | Llama layer: " + " | ".join(columns) + " |",
        "|---" * 9 + "|",
    ]
    for policy in ("off", "swap", "recompute"):
        for name in memo[policy]:
            cells = [
                f"{found['held_units']:.2f} | {found['forward_units']:.2f} | {found['backward_units']:.2f} "
                f"| {found['flops_ratio']:.2f}"
                for found in (memo[policy][name], llama[policy][name])
            ]
            lines.append(f"| {policy}: {name} | {' | '.join(cells)} |")
    return [*lines, "", *verdicts(data)]


def _saved(data: dict[str, Any]) -> list[str]:
    lines = [
        "**What the memory-light options keep, and what they do to gradients**: layers in bf16, bytes that one holds "
        "between forward and backward in units of s x b x h elements, and over stock's; of swap, what crosses the link "
        "over plain swap's. Norm of the gradients' difference from those in fp32 over their norm, of all parameters, "
        "of the input, and of the parameter where it is largest; stock's is that of bf16 itself. Time of a step over "
        "stock's, of swap in FP8 over plain swap's, on a CPU, where codes are made by PyTorch's operations one after "
        "the other and the processor makes the copies: no measure for a GPU. Processor time, median and range "
        f"(`python ci/bench/saved_activations.py`; {where(data)}):",
    ]
    for kind, case in data["results"]["shapes"].items():
        lines += [
            "",
            f"| {_LAYERS[kind]}, h = {case['hidden']}, {case['tokens']} tokens | held | of stock | moved, of swap "
            "| error, parameters | input | worst | time, CPU |",
            "|---" * 8 + "|",
        ]
        for name, one in case["contenders"].items():
            what = f"*{name}*" if name.startswith(("stock", "Megatron")) or name == "swap" else name
            held = f"{one['units']:.2f} | {one['of_stock']:.3f} |" if "units" in one else "| |"
            moved = f"{one['link_ratio']:.3f}" if "link_ratio" in one else ""
            lines.append(f"| {what} | {held} {moved} | {_wrong(one, 'parameters', 'input', 'worst')} | {_time(one)} |")
    rows = data["results"]["swiglu"]
    names = list(rows[0]["error"])
    lines += [
        "",
        "Error of SwiGLU's gradient alone, by the standard deviation of its input:",
        "",
        f"| | {' | '.join(format(row['scale'], 'g') for row in rows)} |",
        f"|---|{'---|' * len(rows)}",
        *(f"| {name} | {' | '.join(format(row['error'][name], '.1%') for row in rows)} |" for name in names),
        "",
    ]
    return [*lines, *verdicts(data)]


_LAYERS = {"llama-3-8b": "Llama 3 8B", "llama": "Llama", "gpt": "GPT (LayerNorm, GELU, 4 h)"}


def _wrong(one: dict[str, Any], *which: str) -> str:
    return " | ".join(f"{one['error'][name]:.2%}" for name in which)


def _time(one: dict[str, Any]) -> str:
    time = one["time_ratio"]
    return f"{time['median']:.2f} ({time['min']:.2f} to {time['max']:.2f})"


def _parity(data: dict[str, Any], picture: str, kind: str, flags: str = "") -> list[str]:
    found, given = data["results"]["contenders"], data["arguments"]
    lines = [
        f"**What {given['iterations']} steps of training make of it**: a small GPT ({kind}; 4 layers, h = 128) on the "
        f"sources of Python's standard library, {given['seeds']} seeds; validation loss, its mean difference from bf16 "
        "of the same seed, and its standard deviation over seeds "
        f"(`python ci/bench/training_parity.py{flags}`; {where(data)}):",
        "",
        f"![Losses](results/{picture})",
        "",
        "| | validation loss | against bf16 | over seeds |",
        "|---|---|---|---|",
    ]
    for name, one in found.items():
        lines.append(
            f"| {f'*stock, {name}*' if name in ('bf16', 'fp32') else name} | {one['validation']:.4f} "
            f"| {one['difference']:+.4f} | {one['validation_spread']:.4f} |"
        )
    return [*lines, "", *verdicts(data)]


def light() -> str:
    """The options that leave layers less to hold, side by side in one run."""
    data = read("saved_activations.cpu.json")
    shapes = data["results"]["shapes"]
    lines = [
        "Bytes that a layer holds between the passes, or that cross the link, over those of stock or of plain swap; "
        "relative error of the gradients of all parameters, and of the worst, against fp32; time of a step over "
        "stock's, with compressed swap over plain swap's, median and range on a CPU, where codes are made by PyTorch's "
        "operations one after the other and copies by the processor: no measure for a GPU "
        f"(`python ci/bench/saved_activations.py`; {where(data)}).",
        "",
        "| option | layer | bytes | error | worst | time, CPU |",
        "|---|---|---|---|---|---|",
    ]
    for kind, options in _LIGHT.items():
        case = shapes[kind]
        for name, option in options.items():
            one = case["contenders"][name]
            size = f"{one['link_ratio']:.3f} moved" if "link_ratio" in one else f"{one['of_stock']:.3f} held"
            layer = f"{_LAYERS[kind].partition(' (')[0]}, {case['tokens']} tokens"
            what = f"`{option}`" if option else "*stock, bf16*"
            lines.append(f"| {what} | {layer} | {size} | {_wrong(one, 'parameters', 'worst')} | {_time(one)} |")
    worst = shapes["gpt"]["contenders"]["stock"]["error"]
    lines += [
        "",
        f"Stock's {worst['worst']:.0%} is `{worst['worst_name']}`: PyTorch's LayerNorm on a CPU sums the gradient of "
        "its parameters over the tokens in bf16. `rebuild` and `mlp` sum it in fp32.",
    ]
    return "\n".join(lines) + "\n"


_FP8 = {"stock": ""} | {name: f"fp8.saved_activations: {name}" for name in ("rebuild", "mlp", "all", "regelu2")}
_LIGHT = {
    "llama-3-8b": {name: _FP8[name] for name in ("stock", "rebuild", "mlp", "all")}
    | {"swap in fp8": "activations.compress: fp8"},
    "llama": {"stock": "", "16 tiles": "mlp.tiles: 16"},
    "gpt": {name: _FP8[name] for name in ("stock", "rebuild", "mlp", "regelu2")},
}
"""Rows of the README's table: contenders by layer."""


def verdicts(data: dict[str, Any]) -> list[str]:
    lines = []
    for one in data["results"]["targets"]:
        where = one.get("exceptions") or {}
        cells = (
            ", ".join(f"{name} in {count} cells" for name, count in where.items()) if isinstance(where, dict) else ""
        )
        verdict = "met" if one["met"] else f"**not met**{f' ({cells})' if cells else ''}"
        lines.append(f"* {one['what']}: {verdict}")
    return lines


def _published(data: dict[str, Any]) -> list[str]:
    return [
        "**What the simulator says of published schedules** (`python ci/bench/schedules.py`; exact, but for the times; "
        f"{where(data)}):",
        "",
        *verdicts(data),
    ]


def _searched(data: dict[str, Any]) -> list[str]:
    results = data["results"]
    lines = [
        "**What `auto` finds at the memory of V-Half**: its step time over V-Half's, at several numbers of microbatches"
        f" and seven sets of costs (`python ci/bench/schedule_search.py`; simulated; {where(data)}):",
        "",
        "| pipeline ranks | cells | median | best | worst |",
        "|---|---|---|---|---|",
    ]
    rows = results["v_half"]["rows"]
    for ranks in sorted({row["p"] for row in rows}):
        values = sorted(row["ratio"] for row in rows if row["p"] == ranks)
        middle = statistics.median(values)
        lines.append(f"| {ranks} | {len(values)} | {middle:.3f} | {values[0]:.3f} | {values[-1]:.3f} |")
    counts, large = results["records"]["all"], results["large"]
    lines += [
        "",
        f"* records of published schedules, at no more memory: {counts['better']} beaten, {counts['equal']} equalled, "
        f"{counts['worse']} not reached",
        f"* p = {large['p']}, m = {large['m']}: {large['cpu_seconds']:.1f} s of processor time, within "
        f"{100 * large['above_bound']:.1f} % of the lower bound",
        *verdicts(data),
    ]
    return lines


def _loop(data: dict[str, Any]) -> list[str]:
    lines = [
        "**What our loop costs** in place of Megatron's own function, for the same order, two CPU ranks "
        f"(`python ci/bench/pipeline_loop.py`; {where(data)}; median with quartiles):",
        "",
        "| | step time, ours / Megatron's | processor time |",
        "|---|---|---|",
    ]
    for part, what in (("steps", "a small model"), ("overhead", "layers so small that only Python is left")):
        for name, found in data["results"][part].items():
            cells = [
                f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})"
                for ratio in (found["ratio"], found["ratio_cpu_time"])
            ]
            lines.append(f"| {name}, {what} | {' | '.join(cells)} |")
    return lines
