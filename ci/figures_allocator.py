"""The README's figures of the static allocator, from the benchmarks' files in ci/bench/results."""

from __future__ import annotations

from figures import gib, read, verdicts, where


def allocator() -> str:
    """What jobs on a CPU rank say of their memory plan."""
    data = read("arena.cpu.json")
    size, core = data["results"]["jobs"]["size"], data["results"]["core"]["ns_per_pair"]
    lines = [
        f"A GPT of Megatron-Core ({size['layers']} layers, h = {size['hidden']}, s = {size['sequence']}, four "
        "microbatches) on one CPU rank, where host memory stands in for a device's (`python ci/bench/arena.py`; "
        f"{where(data)}). Requests below 1 KiB are left out; step is processor time over that without the arena.",
        "",
        "| | planned peak | above the bound | served, of the bytes | of the requests | fallbacks | step | losses |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, job in data["results"]["jobs"]["jobs"].items():
        ratio, above = job["step_ratio"], job["planned_peak_bytes"] / job["lower_bound_bytes"] - 1
        lines.append(
            f"| {name} | {job['planned_peak_bytes'] / 2**20:.1f} MiB | {100 * above:.2f} % "
            f"| {100 * job['served_bytes_share']:.2f} % | {100 * job['served_share']:.1f} % | {job['fallbacks']} "
            f"| {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}) "
            f"| {'bitwise equal' if job['losses_equal'] else '**different**'} |"
        )
    spread = ", ".join(f"{found['median']:.0f} ns with {live} live blocks" for live, found in core.items())
    return "\n".join([*lines, "", f"* a malloc/free pair in the core: {spread}", *verdicts(data)]) + "\n"


def solvers() -> str:
    """What the solvers of a memory plan reach on MiniMalloc's instances and on traces of models."""
    data = read("allocation_solvers.cpu.json")
    published, traces = data["results"]["published"], data["results"]["traces"]
    totals = published["total_seconds"]
    ours, theirs = totals["megamem"], totals["minimalloc"]
    slowest = max(found["megamem"]["seconds"]["max"] for found in published["instances"].values())
    lines = [
        f"MiniMalloc's {len(published['instances'])} challenging instances, each into {published['capacity']:,} bytes, "
        f"whole processes in turns: megamem {ours['cpu_seconds']:.1f} s of processor time ({ours['seconds']:.0f} s by "
        f"the clock, {slowest:.1f} s at most for one), MiniMalloc {theirs['cpu_seconds']:.1f} s "
        f"({theirs['seconds']:.0f} s); all solved by both. One iteration of Megatron models, beside what PyTorch's "
        "caching allocator reserves for it (simulated):",
        "",
        "| trace | requests | least possible | `auto` above it | proven | s | two levels | caching allocator "
        "| expandable segments |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, trace in traces.items():
        auto, two, cached = trace["solvers"]["auto"], trace["solvers"]["two levels"], trace["caching_allocator"]
        lines.append(
            f"| {name} | {trace['requests']:,} | {gib(trace['lower_bound'])} GiB | {100 * auto['gap']:.3f} % "
            f"| {'yes' if auto['optimal'] else ''} | {auto['seconds']:.1f} | {100 * two['gap']:.3f} % "
            f"| {100 * (cached['native'] - 1):.1f} % above | {100 * (cached['expandable segments'] - 1):.1f} % above |"
        )
    scale = data["results"]["scale"]
    first = scale["solvers"]["first order"]
    lines += [
        "",
        f"{scale['requests']:,} requests are placed in {first['seconds']:.1f} s, {100 * first['gap']:.2f} % above the "
        f"least possible (`python ci/bench/allocation_solvers.py`; {where(data)}).",
    ]
    return "\n".join(lines) + "\n"
