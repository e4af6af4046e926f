"""A solved allocation problem as a picture (SVG): time to the right, addresses upwards, one rectangle per buffer.

This is how the papers draw it (MiniMalloc, figure 1; MEMO, figure 7). Colours tell neighbours apart by size, larger is
darker. A dashed line is the lower bound. Rectangles too small to be seen are not drawn one by one, and the caption says
how many; those that are as large as a pixel always are.
"""

from __future__ import annotations

from html import escape

from megamem.ir.allocation import Solution

_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 18, 34, 50
_WIDTH, _HEIGHT = 1100, 520
_MOST = 30_000  # rectangles: what browsers still show without delay
_FONT = "font-family='Helvetica, Arial, sans-serif'"
# Okabe and Ito, which the colour-blind can tell apart, from light to dark.
_COLOURS = ("#f0e442", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#0072b2")
_TICKS = 4


def render_svg(solution: Solution, *, title: str, lower_bound: int | None = None) -> str:
    """The picture of a solution; `lower_bound` in bytes. Ids are shown when the pointer rests on a rectangle."""
    buffers = solution.problem.buffers
    begin = min((buffer.lower for buffer in buffers), default=0)
    end = max((buffer.upper for buffer in buffers), default=1)
    top = max(solution.peak, lower_bound or 0, 1)
    across, up = _WIDTH / (end - begin), _HEIGHT / top
    boxes = []
    for offset, buffer in solution:
        width, height = (buffer.upper - buffer.lower) * across, buffer.size * up
        left = _LEFT + (buffer.lower - begin) * across
        boxes.append((width * height, left, _TOP + _HEIGHT - (offset + buffer.size) * up, width, height, buffer))
    boxes.sort(key=lambda box: -box[0])
    largest = max((buffer.size for buffer in buffers), default=1)
    parts = [
        f"<rect x='{x:.2f}' y='{y:.2f}' width='{max(width, 0.3):.2f}' height='{max(height, 0.3):.2f}' "
        f"fill='{_colour(buffer.size, largest)}'><title>{escape(buffer.id)}: {buffer.size} bytes, "
        f"[{buffer.lower}, {buffer.upper})</title></rect>"
        for _, x, y, width, height, buffer in boxes[:_MOST]
    ]
    left_out = len(boxes) - _MOST
    caption = f"{len(buffers)} buffers, peak {_amount(solution.peak)}"
    if lower_bound is not None:
        caption += f", lower bound {_amount(lower_bound)}"
        y = _TOP + _HEIGHT - lower_bound * up
        parts.append(
            f"<path d='M{_LEFT} {y:.2f}H{_LEFT + _WIDTH}' fill='none' "
            "stroke='#000' stroke-width='1' stroke-dasharray='6 4'/>"
        )
    if left_out > 0:
        caption += f"; the {left_out} smallest are not drawn"
    width, height = _LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + _BOTTOM
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
            f"viewBox='0 0 {width} {height}'>",
            f"<rect width='{width}' height='{height}' fill='#fff'/>",
            f"<text x='{_LEFT}' y='22' font-size='15' {_FONT}>{escape(title)}</text>",
            f"<g stroke='#fff' stroke-width='0.25'>{''.join(parts)}</g>",
            *_axes(begin, end, top),
            f"<text x='{_LEFT}' y='{height - 8}' font-size='12' {_FONT}>{escape(caption)}</text>",
            "</svg>",
        ]
    ) + "\n"  # fmt: skip


def _axes(begin: int, end: int, top: int) -> list[str]:
    bottom = _TOP + _HEIGHT
    lines = [f"<path d='M{_LEFT} {_TOP}V{bottom}H{_LEFT + _WIDTH}' stroke='#000' fill='none'/>"]
    for tick in range(_TICKS + 1):
        x, y = _LEFT + _WIDTH * tick / _TICKS, bottom - _HEIGHT * tick / _TICKS
        instant, address = begin + (end - begin) * tick // _TICKS, top * tick // _TICKS
        anchor = "end" if tick == _TICKS else "middle"
        lines.append(
            f"<text x='{x:.1f}' y='{bottom + 16}' font-size='11' text-anchor='{anchor}' {_FONT}>{instant}</text>"
            f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' font-size='11' text-anchor='end' {_FONT}>{_amount(address)}</text>"
        )
    return lines


def _colour(size: int, largest: int) -> str:
    """By powers of four below the largest, so that a few sizes that differ much use all colours."""
    step = (largest.bit_length() - size.bit_length()) // 2
    return _COLOURS[max(len(_COLOURS) - 1 - step, 0)]


def _amount(nbytes: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.4g} {name}"
    return f"{nbytes} B"
