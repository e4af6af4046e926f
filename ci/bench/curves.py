"""Curves as a picture (SVG): panels beside one another, one line a series, the same colour for a name everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP, _BOTTOM = 470, 300, 62, 56, 70, 74
_FONT = "font-family='Helvetica, Arial, sans-serif'"
# Okabe and Ito, which the colour-blind can tell apart.
_COLOURS = ("#000000", "#999999", "#56b4e9", "#009e73", "#d55e00", "#0072b2", "#cc79a7", "#e69f00")
_TICKS = 5


@dataclass(frozen=True)
class Series:
    """A line: as many values as its panel has steps."""

    name: str
    values: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """Lines over the same steps; `band`: half the height of a grey band around zero, for each step."""

    title: str
    unit: str
    steps: Sequence[int]
    lines: Sequence[Series]
    band: Sequence[float] | None = None

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the largest value that is drawn."""
        values = [value for line in self.lines for value in line.values]
        values += [sign * value for value in self.band or () for sign in (1, -1)]
        low, high = min(values), max(values)
        room = 0.05 * (high - low) or 1.0
        return low - room, high + room


def render_curves(title: str, panels: Sequence[Panel]) -> str:
    """The picture."""
    width = _LEFT + len(panels) * (_WIDTH + _GAP) - _GAP + 20
    height = _TOP + _HEIGHT + _BOTTOM
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' viewBox='0 0 {width} {height}'>",
        f"<rect width='{width}' height='{height}' fill='#fff'/>",
        f"<text x='{_LEFT}' y='22' font-size='15' {_FONT}>{escape(title)}</text>",
    ]
    for index, panel in enumerate(panels):
        parts += _panel(panel, _LEFT + index * (_WIDTH + _GAP), colours)
    x = float(_LEFT)
    for name, colour in colours.items():
        y = _TOP + _HEIGHT + 52
        parts.append(f"<path d='M{x:.0f} {y - 4}h18' stroke='{colour}' stroke-width='2.5'/>")
        parts.append(f"<text x='{x + 23:.0f}' y='{y}' font-size='12' {_FONT}>{escape(name)}</text>")
        x += 45 + 6.6 * len(name)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, left: int, colours: dict[str, str]) -> Iterator[str]:
    low, high = panel.limits
    across = _WIDTH / (panel.steps[-1] - panel.steps[0] or 1)

    def x(step: int) -> float:
        return left + (step - panel.steps[0]) * across

    def y(value: float) -> float:
        return _TOP + _HEIGHT * (high - value) / (high - low)

    yield f"<text x='{left}' y='{_TOP - 10}' font-size='12' {_FONT}>{escape(panel.title)}</text>"
    yield f"<rect x='{left}' y='{_TOP}' width='{_WIDTH}' height='{_HEIGHT}' fill='none' stroke='#ccc'/>"
    if panel.band is not None:
        edge = [f"{x(s):.1f},{y(v):.1f}" for s, v in zip(panel.steps, panel.band, strict=True)]
        back = [f"{x(s):.1f},{y(-v):.1f}" for s, v in zip(panel.steps, panel.band, strict=True)]
        yield f"<polygon points='{' '.join([*edge, *reversed(back)])}' fill='#000' fill-opacity='0.08'/>"
    for index in range(_TICKS):
        value = low + (high - low) * (index + 0.5) / _TICKS
        yield f"<path d='M{left} {y(value):.1f}h{_WIDTH}' stroke='#eee'/>"
        yield f"<text x='{left - 6}' y='{y(value) + 4:.1f}' font-size='11' text-anchor='end' {_FONT}>{value:.3g}</text>"
    for line in panel.lines:
        points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(panel.steps, line.values, strict=True))
        yield f"<polyline points='{points}' fill='none' stroke='{colours[line.name]}' stroke-width='1.5'/>"
    for step in (panel.steps[0], panel.steps[-1]):
        yield (
            f"<text x='{x(step):.1f}' y='{_TOP + _HEIGHT + 16}' font-size='11' text-anchor='middle' {_FONT}>"
            f"step {step}</text>"
        )
    if panel.unit:
        yield f"<text x='{left + 6}' y='{_TOP + 16}' font-size='11' {_FONT}>{escape(panel.unit)}</text>"
