"""A schedule in time as a picture (SVG), in the style of the figures of the papers.

One row per pipeline rank from left to right: forward passes blue, input gradients green, weight gradients orange, an
undivided backward pass green above orange; lighter for higher chunks; the number is the microbatch. Below it the
activation memory of every rank on the same axis of time. Communication is not drawn. The colours are those of Okabe and
Ito, which the colour-blind can tell apart; they also differ in lightness, for a printer without colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from megamem.ir.schedule import COMMUNICATION, Kind, TimedAction

Curve = Sequence[tuple[float, float]]

_COLOURS: dict[Kind, str] = {
    "F": "#0072b2",
    "B": "#009e73",
    "W": "#e69f00",
    "BW": "#009e73",
    "S": "#cc79a7",
    "T": "#d55e00",
    "IF": "#f0e442",
    "IB": "#f0e442",
    "OFFLOAD": "#777777",
    "RELOAD": "#bbbbbb",
}
_LEGEND: dict[Kind, str] = {
    "F": "F forward",
    "B": "B input gradient",
    "W": "W weight gradient",
    "BW": "BW backward, undivided",
    "S": "S vocabulary",
    "T": "T vocabulary",
    "IF": "IF input embedding",
    "IB": "IB its gradient",
    "OFFLOAD": "offload",
    "RELOAD": "reload",
}
_COPIES = ("OFFLOAD", "RELOAD")

_LEFT, _RIGHT, _ROW, _BOX, _LANE, _CURVE = 64, 104, 30, 24, 7, 34
_NARROW, _WIDE, _PER_ACTION = 900, 4000, 15
_FONT = "font-family='Helvetica, Arial, sans-serif'"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is drawn.

    timeline:    actions with start and end
    title, caption:  above and below the rows
    memory:      per rank, (time, memory from then on); empty for no curves
    limit:       a line in the curves, or None
    """

    timeline: Sequence[TimedAction]
    title: str
    caption: str = ""
    memory: Sequence[Curve] = ()
    limit: float | None = None

    @property
    def drawn(self) -> list[TimedAction]:
        """Without communication and without what takes no time."""
        return [t for t in self.timeline if t.action.kind not in COMMUNICATION and t.end > t.start]

    @property
    def num_ranks(self) -> int:
        """Rows of the picture."""
        return 1 + max((timed.rank for timed in self.timeline), default=len(self.memory) - 1)


class _Scale:
    """From time to pixels: as wide as the shortest actions need for their numbers, within limits."""

    def __init__(self, drawn: Sequence[TimedAction]) -> None:
        self.end = max((timed.end for timed in drawn), default=1.0)
        durations = sorted(timed.end - timed.start for timed in drawn if timed.action.kind not in _COPIES)
        usual = durations[len(durations) // 10] if durations else self.end
        self.width = min(_WIDE, max(_NARROW, self.end / usual * _PER_ACTION))

    def x(self, time: float) -> float:
        return _LEFT + time / self.end * self.width


def render_svg(picture: Picture) -> str:
    """The picture as an SVG document."""
    drawn = picture.drawn
    scale = _Scale(drawn)
    lane = _LANE if any(timed.action.kind in _COPIES for timed in drawn) else 0
    pitch = _ROW + lane
    top = 62
    axis = top + picture.num_ranks * pitch + 2
    curves = axis + 44
    height = (curves + len(picture.memory) * _CURVE + 12 if picture.memory else axis + 30) + 24
    width = _LEFT + scale.width + _RIGHT
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:.0f} {height:.0f}' width='{width:.0f}' "
        f"height='{height:.0f}' {_FONT} role='img'>",
        f"<title>{escape(picture.title)}</title>",
        "<rect width='100%' height='100%' fill='white'/>",
        f"<text x='{_LEFT}' y='22' font-size='15' font-weight='bold'>{escape(picture.title)}</text>",
        *_legend(drawn),
    ]
    for rank in range(picture.num_ranks):
        y = top + rank * pitch
        parts.append(f"<text x='{_LEFT - 8}' y='{y + 16}' font-size='12' text-anchor='end'>rank {rank}</text>")
        parts.append(f"<rect x='{_LEFT}' y='{y}' width='{scale.width:.2f}' height='{_BOX}' fill='#f2f2f2'/>")
    chunks = 1 + max((timed.action.chunk for timed in drawn), default=0)
    for timed in drawn:
        parts += _box(timed, top + timed.rank * pitch, scale, chunks)
    parts += _axis(axis, scale)
    if picture.memory:
        parts += _curves(picture, curves, scale)
    parts.append(f"<text x='{_LEFT}' y='{height - 10:.0f}' font-size='12'>{escape(picture.caption)}</text>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(drawn: Sequence[TimedAction]) -> Iterator[str]:
    kinds = {timed.action.kind for timed in drawn}
    x = _LEFT
    for kind, text in _LEGEND.items():
        if kind in kinds:
            yield from _swatch(kind, x, 33, 14, 14)
            yield f"<text x='{x + 19}' y='44' font-size='12'>{text}</text>"
            x += 36 + 7 * len(text)
    if any(timed.action.chunk for timed in drawn):
        yield f"<text x='{x}' y='44' font-size='12'>lighter: higher chunks</text>"


def _swatch(kind: Kind, x: float, y: float, width: float, height: float, light: float = 0.0) -> Iterator[str]:
    """A box in the colour of a kind, mixed with white; an undivided backward has the colour of W in its lower third."""
    yield _rect(x, y, width, height, _lighter(_COLOURS[kind], light))
    if kind == "BW":
        yield _rect(x, y + height * 2 / 3, width, height / 3, _lighter(_COLOURS["W"], light))


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f"<rect x='{x:.2f}' y='{y:.2f}' width='{width:.2f}' height='{height:.2f}' fill='{colour}'/>"


def _box(timed: TimedAction, y: float, scale: _Scale, chunks: int) -> Iterator[str]:
    rank, action, start, end = timed
    left, right = scale.x(start), scale.x(end)
    width = max(right - left - 0.8, 0.4)
    light = 0.62 * action.chunk / max(1, chunks - 1)
    yield f"<g><title>rank {rank}: {action}, {start:.6g} to {end:.6g}</title>"
    if action.kind in _COPIES:
        lower = _LANE / 2 if action.kind == "RELOAD" else 0  # both directions may copy at the same time
        yield _rect(left, y + _BOX + 1 + lower, width, _LANE / 2, _COLOURS[action.kind])
    else:
        yield from _swatch(action.kind, left, y, width, _BOX, light)
        text = str(action.microbatch)
        size = min(12.0, width / (0.62 * len(text)))
        middle = y + _BOX / (3 if action.kind == "BW" else 2)
        if size >= 5:
            ink = "white" if action.kind == "F" and light < 0.4 else "black"
            yield (
                f"<text x='{(left + right) / 2:.2f}' y='{middle + size * 0.36:.2f}' font-size='{size:.1f}' "
                f"text-anchor='middle' fill='{ink}'>{text}</text>"
            )
    yield "</g>"


def _lighter(colour: str, share: float) -> str:
    """A colour (#rrggbb) mixed with this share of white."""
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(value + (255 - value) * share):02x}" for value in channels)


def _ticks(end: float, count: float) -> list[float]:
    """About `count` round numbers from 0 to `end`."""
    raw = end / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [index * step for index in range(int(end / step + 1e-9) + 1)]


def _axis(y: float, scale: _Scale) -> Iterator[str]:
    yield f"<path d='M{_LEFT} {y} H{_LEFT + scale.width:.2f}' stroke='black' fill='none'/>"
    for time in _ticks(scale.end, scale.width / 90):
        x = scale.x(time)
        yield f"<path d='M{x:.2f} {y} v4' stroke='black'/>"
        yield f"<text x='{x:.2f}' y='{y + 17}' font-size='11' text-anchor='middle'>{time:.6g}</text>"
    yield f"<text x='{_LEFT + scale.width + 24:.2f}' y='{y + 17}' font-size='11'>time</text>"


def _curves(picture: Picture, top: float, scale: _Scale) -> Iterator[str]:
    """One filled step curve per rank, all on the same scale."""
    peaks = [max((held for _, held in curve), default=0.0) for curve in picture.memory]
    most = max([*peaks, picture.limit or 0.0]) or 1.0
    yield f"<text x='{_LEFT}' y='{top - 8}' font-size='12'>activation memory</text>"
    for rank, curve in enumerate(picture.memory):
        base = top + rank * _CURVE + _CURVE - 6
        tall = _CURVE - 10
        steps = [f"M{_LEFT} {base}"]
        for (time, held), following in zip(curve, [*curve[1:], (math.inf, 0.0)], strict=True):
            if following[0] == time:
                continue  # of several changes in one moment, the last is drawn
            steps.append(f"H{scale.x(time):.2f}V{base - tall * held / most:.2f}")
        steps.append(f"H{_LEFT + scale.width:.2f}V{base}Z")
        yield f"<text x='{_LEFT - 8}' y='{base - 6}' font-size='12' text-anchor='end'>rank {rank}</text>"
        yield f"<path d='{''.join(steps)}' fill='#cfcfcf' stroke='#666666' stroke-width='0.7'/>"
        if picture.limit is not None:
            y = base - tall * picture.limit / most
            yield f"<path d='M{_LEFT} {y:.2f}H{_LEFT + scale.width:.2f}' stroke='#d55e00' stroke-dasharray='4 3'/>"
        yield f"<text x='{_LEFT + scale.width + 8:.2f}' y='{base - 6}' font-size='11'>peak {_short(peaks[rank])}</text>"


def _short(value: float) -> str:
    """Bytes in a readable unit; other amounts as they are."""
    if value < 1e6:
        return f"{value:.6g}"
    return f"{value / 2**30:.2f}GiB" if value >= 2**30 else f"{value / 2**20:.2f}MiB"
