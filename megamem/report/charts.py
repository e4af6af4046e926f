"""What a plan predicts, as pictures (SVG): memory by kind, memory over time, time by kind, memory against time.

Each picture says its numbers when the pointer rests on a part of it, and is complete without any script. The colours
are those of Okabe and Ito and mixtures with white; what belongs together has one hue.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from megamem.ir.plan import MEMORY_KINDS, TIME_KINDS, Alternative, Prediction, RankMemory

ACTIVATION_KINDS = ("kept", "at_work", "staging", "weight_gradients", "output_layer")
"""What `RankMemory.timeline` is the sum of."""

MEMORY_COLOURS = {
    "weights": "#0072b2", "gradients": "#5aa9d6", "optimizer": "#a6d0e8",
    "kept": "#009e73", "at_work": "#66c5ab", "staging": "#b3e2d5", "weight_gradients": "#e69f00",
    "output_layer": "#cc79a7", "transients": "#f0e442", "buffers": "#d9d28a",
    "fragmentation": "#999999", "context": "#cccccc",
}  # fmt: skip
TIME_COLOURS = {
    "gemm": "#0072b2", "attention": "#5aa9d6", "elementwise": "#a6d0e8", "output_layer": "#cc79a7",
    "recompute": "#e69f00", "exposed_copies": "#d55e00",
    "tensor_parallel": "#009e73", "context_parallel": "#66c5ab", "expert_parallel": "#b3e2d5",
    "bubble": "#cccccc", "data_parallel": "#999999", "optimizer": "#666666",
}  # fmt: skip

_MEASURED = "#000000"
_LEFT, _RIGHT, _WIDTH = 84, 120, 760
_ROW, _BAR = 30, 22


def amount(nbytes: float) -> str:
    """Bytes in a readable unit, to three digits or more."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(nbytes) >= unit:
            return f"{nbytes / unit:,.{_decimals(nbytes / unit)}f} {name}"
    return f"{nbytes:.0f} B"


def duration(seconds: float) -> str:
    """Seconds in a readable unit."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit:
            return f"{seconds / unit:,.{_decimals(seconds / unit)}f} {name}"
    return f"{seconds:.3g} s"


def _decimals(value: float) -> int:
    return max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0


def words(kind: str) -> str:
    """A kind as it is read."""
    return kind.replace("_", " ")


@dataclass(frozen=True)
class Axis:
    """Amounts to pixels: from `least` to `most` on `length` pixels from `start`."""

    most: float
    start: float
    length: float
    least: float = 0.0

    def __call__(self, value: float) -> float:
        return self.start + self.length * (value - self.least) / (self.most - self.least)

    def ticks(self, count: int, *, binary: bool = False) -> list[float]:
        """About `count` round amounts; `binary`: round in powers of 1024."""
        unit = 1024.0 ** math.floor(math.log(self.most, 1024)) if binary and self.most >= 1 else 1.0
        raw = (self.most - self.least) / unit / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9)) * unit
        first = math.ceil(self.least / step - 1e-9)
        return [step * index for index in range(first, int(self.most / step + 1e-9) + 1)]


def svg(width: float, height: float, title: str, parts: Sequence[str], name: str) -> str:
    """A document with these parts; `name` is its class on the page."""
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' class='{name}' viewBox='0 0 {width:.0f} {height:.0f}' "
        f"width='{width:.0f}' height='{height:.0f}' role='img' font-family='Helvetica, Arial, sans-serif'>"
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def text(x: float, y: float, content: str, *, anchor: str = "start", size: int = 12, more: str = "") -> str:
    """One line of text."""
    return f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' text-anchor='{anchor}' {more}>{escape(content)}</text>"


def box(x: float, y: float, width: float, height: float, colour: str, says: str, name: str = "") -> str:
    """A rectangle that says something when the pointer rests on it."""
    return (
        f"<rect x='{x:.2f}' y='{y:.2f}' width='{max(width, 0):.2f}' height='{max(height, 0):.2f}' fill='{colour}'"
        f"{f' class={name!r}' if name else ''}><title>{escape(says)}</title></rect>"
    )


def legend(colours: Mapping[str, str], y: float) -> tuple[list[str], float]:
    """Names beside their colours, in lines, and where the next thing may begin."""
    parts, x = [], float(_LEFT)
    for name, colour in colours.items():
        needed = 34 + 6.6 * len(name)
        if x + needed > _LEFT + _WIDTH:
            x, y = float(_LEFT), y + 18
        parts.append(f"<rect x='{x}' y='{y}' width='12' height='12' fill='{colour}'/>")
        parts.append(text(x + 17, y + 10, name))
        x += needed
    return parts, y + 26


def _named(kinds: Sequence[str], colours: Mapping[str, str]) -> dict[str, str]:
    return {words(kind): colours[kind] for kind in kinds}


def memory_bars(memory: Sequence[RankMemory]) -> str:
    """Device memory of each pipeline rank at its peak, by kind, with the limit."""
    most = max([*(rank.peak for rank in memory), *(rank.limit for rank in memory), 1])
    axis = Axis(most * 1.02, _LEFT, _WIDTH)
    used = [kind for kind in MEMORY_KINDS if any(rank.kinds.get(kind) for rank in memory)]
    parts, top = legend(_named(used, MEMORY_COLOURS), 8)
    for rank in memory:
        y, x = top + rank.rank * _ROW, float(_LEFT)
        parts.append(text(_LEFT - 8, y + 15, f"rank {rank.rank}", anchor="end"))
        for kind in used:
            nbytes = rank.kinds.get(kind, 0)
            if nbytes:
                width = axis(nbytes) - _LEFT
                says = f"rank {rank.rank}: {words(kind)} {amount(nbytes)}"
                parts.append(box(x, y, width, _BAR, MEMORY_COLOURS[kind], says, "memory"))
                x += width
        if rank.limit:
            parts.append(_line(axis(rank.limit), y - 3, _BAR + 6, f"rank {rank.rank}: limit {amount(rank.limit)}"))
        parts.append(text(max(x, axis(rank.limit)) + 8, y + 15, amount(rank.peak)))
    bottom = top + len(memory) * _ROW
    parts += _amounts(axis, bottom)
    return svg(_LEFT + _WIDTH + _RIGHT, bottom + 30, "device memory at the peak, by kind", parts, "memory-bars")


def _line(x: float, y: float, height: float, says: str) -> str:
    return (
        f"<g><title>{escape(says)}</title><path d='M{x:.1f} {y:.1f}v{height}' stroke='#d55e00' stroke-width='2' "
        "stroke-dasharray='4 2'/></g>"
    )


def _amounts(axis: Axis, y: float) -> Iterator[str]:
    """A horizontal axis of bytes."""
    yield f"<path d='M{axis.start} {y}h{axis.length}' stroke='black'/>"
    for value in axis.ticks(7, binary=True):
        yield f"<path d='M{axis(value):.1f} {y}v4' stroke='black'/>" + text(
            axis(value), y + 17, amount(value), anchor="middle", size=11
        )


def memory_over_time(rank: RankMemory, end: float, measured: Sequence[tuple[float, float]] = ()) -> str:
    """Memory of a rank over one step of `end` seconds: what does not change as bands, activations above, the limit.

    `measured` is drawn over it as a line: (seconds, bytes from then on).
    """
    curve = rank.curve() or [(0.0, sum(rank.kinds.get(kind, 0) for kind in ACTIVATION_KINDS))]
    fixed = {kind: rank.kinds[kind] for kind in MEMORY_KINDS if rank.kinds.get(kind) and kind not in ACTIVATION_KINDS}
    transients = fixed.pop("transients", 0)
    base = sum(fixed.values())
    highest = max(nbytes for _, nbytes in curve)
    most = max([rank.limit, base + highest + transients, 1, *(nbytes for _, nbytes in measured)]) * 1.04
    stop = max([end, 1e-9, *(moment for moment, _ in measured[-1:])])
    names = {**_named([*fixed], MEMORY_COLOURS), "activations": MEMORY_COLOURS["kept"]}
    if transients:
        names["working space"] = MEMORY_COLOURS["transients"]
    if measured:
        names["measured"] = _MEASURED
    parts, top = legend(names, 8)
    high = 240.0
    across, up = Axis(stop, _LEFT, _WIDTH), Axis(most, top + high, -high)
    level = 0.0
    for kind, nbytes in fixed.items():
        says = f"rank {rank.rank}: {words(kind)} {amount(nbytes)}, all the time"
        parts.append(
            box(_LEFT, up(level + nbytes), _WIDTH, up(level) - up(level + nbytes), MEMORY_COLOURS[kind], says, "band")
        )
        level += nbytes
    if transients:
        parts.append(_area(curve, end, across, up, level, transients, MEMORY_COLOURS["transients"], "working space"))
    says = f"rank {rank.rank}: activations, at most {amount(highest)}"
    parts.append(_area(curve, end, across, up, level, 0, MEMORY_COLOURS["kept"], says))
    if measured:
        seen = max(nbytes for _, nbytes in measured)
        line = "".join(f"H{across(moment):.2f}V{up(nbytes):.2f}" for moment, nbytes in measured[1:])
        parts.append(
            f"<path class='measured' d='M{_LEFT} {up(measured[0][1]):.2f}{line}' stroke='{_MEASURED}' fill='none' "
            f"stroke-width='1.5'><title>measured, at most {amount(seen)}</title></path>"
        )
    if rank.limit:
        y = up(rank.limit)
        parts.append(
            f"<path d='M{_LEFT} {y:.1f}h{_WIDTH}' stroke='#d55e00' stroke-width='1.5' stroke-dasharray='6 3'/>"
        )
        parts.append(text(_LEFT + _WIDTH + 6, y + 4, f"limit {amount(rank.limit)}", size=11))
    for value in up.ticks(5, binary=True):
        parts.append(
            f"<path d='M{_LEFT - 4} {up(value):.1f}h4' stroke='black'/>"
            + text(_LEFT - 7, up(value) + 4, amount(value), anchor="end", size=11)
        )
    parts.append(f"<path d='M{_LEFT} {top}v{high}h{_WIDTH}' stroke='black' fill='none'/>")
    for moment in across.ticks(8):
        x = across(moment)
        parts.append(
            f"<path d='M{x:.1f} {top + high}v4' stroke='black'/>"
            + text(x, top + high + 17, f"{moment:.6g} s", anchor="middle", size=11)
        )
    title = f"rank {rank.rank}: device memory over one step"
    return svg(_LEFT + _WIDTH + _RIGHT, top + high + 30, title, parts, "memory-over-time")


def _area(
    curve: Sequence[tuple[float, float]],
    end: float,
    across: Axis,
    up: Axis,
    base: float,
    extra: float,
    colour: str,
    says: str,
) -> str:
    """A filled step curve above `base`, by `extra` higher than `curve`."""
    steps = [f"M{across(0):.1f} {up(base):.1f}"]
    for (moment, nbytes), (following, _) in zip(curve, [*curve[1:], (math.inf, 0.0)], strict=True):
        if following > moment:
            steps.append(f"H{across(min(moment, end)):.2f}V{up(base + nbytes + extra):.2f}")
    steps.append(f"H{across(end):.1f}V{up(base):.1f}Z")
    return f"<path d='{''.join(steps)}' fill='{colour}'><title>{escape(says)}</title></path>"


def time_bar(prediction: Prediction) -> str:
    """The time of a step by kind, on the rank that computes longest."""
    used = [kind for kind in TIME_KINDS if prediction.time.get(kind)]
    parts, top = legend(_named(used, TIME_COLOURS), 8)
    total = sum(prediction.time.values()) or 1.0
    axis, x = Axis(total, _LEFT, _WIDTH), float(_LEFT)
    for kind in used:
        seconds = prediction.time[kind]
        width = axis(seconds) - _LEFT
        says = f"{words(kind)}: {duration(seconds)}, {100 * seconds / total:.1f} %"
        parts.append(box(x, top, width, 34, TIME_COLOURS[kind], says, "time"))
        if width > 46:
            parts.append(
                text(x + width / 2, top + 21, f"{100 * seconds / total:.0f} %", anchor="middle", more="class='ink'")
            )
        x += width
    parts.append(text(_LEFT + _WIDTH + 8, top + 21, duration(prediction.step_seconds)))
    return svg(_LEFT + _WIDTH + _RIGHT, top + 44, "time of one step, by kind", parts, "time-bar")


def trade_off(prediction: Prediction, limit: int) -> str:
    """Peak memory against step time: the Pareto front as a line, what lost as circles, the plan as a filled one.

    What has no memory or no time, because it was only estimated or cannot be, is in no place.
    """
    points = [one for one in (*prediction.front, *prediction.alternatives) if one.peak_memory and one.step_seconds]
    chosen = Alternative(
        name="the plan", step_seconds=prediction.step_seconds, peak_memory=prediction.peak_memory, fits=True, verdict=""
    )
    most = max([*(one.peak_memory for one in points), chosen.peak_memory, 1]) * 1.08
    times = [*(one.step_seconds for one in points), chosen.step_seconds]
    high, top = 260.0, 24.0
    # What is far out would press all the rest together; it stands at the edge, and says where it belongs.
    across = Axis(max(min(most, 1.6 * limit) if limit else most, limit * 1.02), _LEFT, _WIDTH)
    up = Axis(max(times) * 1.04, top + high, -high, least=min(times) * 0.9)
    parts = [f"<path d='M{_LEFT} {top}v{high}h{_WIDTH}' stroke='black' fill='none'/>", *_amounts(across, top + high)]
    for value in up.ticks(5):
        parts.append(
            f"<path d='M{_LEFT - 4} {up(value):.1f}h4' stroke='black'/>"
            + text(_LEFT - 7, up(value) + 4, f"{value:.4g} s", anchor="end", size=11)
        )
    if limit:
        parts.append(_line(across(limit), top, high, f"limit {amount(limit)}"))
        parts.append(text(across(limit) + 5, top + 12, "limit", size=11))
    front = sorted(prediction.front, key=lambda one: one.peak_memory)
    path = "L".join(f"{across(min(one.peak_memory, across.most)):.1f} {up(one.step_seconds):.1f}" for one in front)
    if path:
        parts.append(f"<path class='front' d='M{path}' stroke='#0072b2' fill='none'/>")
    for one in points:
        parts.append(_point(one, across, up, "#0072b2" if one in prediction.front else "#999999", "white", 4))
    parts.append(_point(chosen, across, up, "#d55e00", "#d55e00", 6))
    parts.append(text(_LEFT + 6, top - 8, "step time", size=11))
    parts.append(text(_LEFT + _WIDTH, top + high + 32, "peak device memory of the fullest rank", anchor="end", size=11))
    return svg(_LEFT + _WIDTH + _RIGHT, top + high + 40, "peak memory against step time", parts, "trade-off")


def _point(one: Alternative, across: Axis, up: Axis, edge: str, fill: str, radius: float) -> str:
    says = f"{one.name}: {amount(one.peak_memory)}, {duration(one.step_seconds)}{'' if one.fits else ', does not fit'}"
    if one.verdict:
        says += f". {one.verdict}"
    dashes = "" if one.fits else " stroke-dasharray='2 2'"
    x, y = across(min(one.peak_memory, across.most)), up(one.step_seconds)
    return (
        f"<circle class='point' cx='{x:.1f}' cy='{y:.1f}' r='{radius}' "
        f"stroke='{edge}' stroke-width='1.5' fill='{fill}'{dashes}><title>{escape(says)}</title></circle>"
    )
