"""A plan as one HTML page: memory, time, schedule, trade-off, what-if, reasons. Nothing is loaded from anywhere.

Pictures are SVG made here, numbers are written here; the script (`page.js`) only chooses what is seen, so a page
without it shows everything but the sliders' other cells. A content security policy forbids the page to load anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from megamem.ir.plan import Plan, Prediction
from megamem.ir.what_if import Cell, WhatIf
from megamem.report.charts import amount, duration, memory_bars, memory_over_time, time_bar, trade_off, words
from megamem.report.schedule_svg import Picture, render_svg

_NOTHING = "\u2013"
_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One time of a stage, in seconds per microbatch, predicted and measured; None where it is not."""

    stage: int
    name: str
    predicted: float | None
    measured: float | None


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """What the page is made of.

    plan:      with its predictions
    settings:  the sections, as YAML
    is_edited: the settings are not those that the predictions are about
    what_if:   other sequence lengths and amounts of host memory, where they were planned
    measured:  times of a profile beside the predicted ones
    memory:    measured memory over time of the ranks, in order: (seconds, bytes from then on)
    command:   how this page is made again
    """

    plan: Plan
    settings: str
    is_edited: bool = False
    what_if: WhatIf | None = None
    measured: Sequence[Measured] = ()
    memory: Sequence[Sequence[tuple[float, float]]] = ()
    command: str = ""

    @property
    def predicted(self) -> Prediction:
        """What the plan predicts. Raises ValueError where it predicts nothing."""
        if self.plan.predicted is None:
            raise ValueError("the plan has no predictions")
        return self.plan.predicted


def render_page(report: PlanReport) -> str:
    """The page."""
    title = _title(report)
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    sections = [
        *_head(report, title),
        *_memory(report),
        *_schedule(report.predicted),
        *_time(report),
        *_what_if(report.what_if),
        *_trade_off(report.predicted),
        *_reasons(report.predicted),
        *_settings(report),
    ]
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n<body>\n"
        + "\n".join(sections)
        + f"\n<div id='tip'></div>\n<script>\n{script}</script>\n</body></html>\n"
    )


def _title(report: PlanReport) -> str:
    job = report.plan.made_for.job
    return f"{job.model.name or 'A model'}, {job.seq_length:,} tokens, {job.layout.text()}"


def _head(report: PlanReport, title: str) -> Iterator[str]:
    job, predicted = report.plan.made_for.job, report.predicted
    limit = _limit(predicted)
    yield f"<h1>{escape(title)}</h1>"
    hardware = report.plan.made_for.hardware or predicted.hardware
    yield (
        f"<p class='faint'>{job.layout.world_size:,} GPUs{f' ({escape(hardware)})' if hardware else ''}, "
        f"{job.global_batch_size:,} sequences a step in microbatches of {job.micro_batch_size}, "
        f"{'bf16' if job.bf16 else 'fp32'}. Planned by megamem {escape(report.plan.made_for.megamem)}; nothing on this "
        "page was measured unless it says so.</p>"
    )
    if report.is_edited:
        yield (
            "<p class='warning' id='edited'>The settings were edited after planning: the predictions below are of the "
            "settings that were planned. Make the plan again with <code>megamem plan</code>.</p>"
        )
    fullest = f"of {amount(limit)}, on the fullest rank" if limit else "on the fullest rank"
    host = max((rank.host for rank in predicted.memory), default=0)
    traffic = predicted.traffic
    cards = [
        ("peak-memory", amount(predicted.peak_memory), f"device memory {fullest}"),
        ("step-time", duration(predicted.step_seconds), "a step"),
        ("mfu", f"{100 * predicted.utilization.mfu:.1f} %", "of the peak FLOP rate (MFU)"),
        ("throughput", f"{predicted.tokens_per_second_per_gpu:,.0f}", "tokens per second per GPU"),
        ("host-memory", amount(host), "pinned host memory a rank"),
        (
            "traffic",
            amount(traffic.to_host + traffic.from_host),
            f"over the host link a step, {duration(traffic.exposed_seconds)} of it exposed",
        ),
    ]
    yield "<div class='cards'>"
    for name, value, says in cards:
        yield f"<div class='card'><b id='{name}'>{value}</b><span>{escape(says)}</span></div>"
    yield "</div>"
    yield f"<p class='faint'>MFU: {escape(predicted.utilization.formula)}</p>"


def _limit(predicted: Prediction) -> int:
    """The least device memory that any rank has; 0 where it is not known."""
    return min((rank.limit for rank in predicted.memory if rank.limit), default=0)


def _memory(report: PlanReport) -> Iterator[str]:
    predicted = report.predicted
    if not predicted.memory:
        return
    yield "<h2 id='memory'>Memory</h2>"
    yield "<p>Device memory of each pipeline rank at its fullest moment; the dashed line is what there is.</p>"
    yield f"<div class='scroll'>{memory_bars(predicted.memory)}</div>"
    yield "<p>The same over one step.</p>"
    fullest = max(range(len(predicted.memory)), key=lambda index: predicted.memory[index].peak)
    names = [f"rank {rank.rank}" for rank in predicted.memory]
    measured = [*report.memory, *[()] * len(predicted.memory)]
    pictures = [
        memory_over_time(r, predicted.step_seconds, c) for r, c in zip(predicted.memory, measured, strict=False)
    ]
    yield from _picks(names, pictures, fullest)
    kinds = [kind for kind in predicted.memory[0].kinds if any(rank.kinds.get(kind) for rank in predicted.memory)]
    rows = [
        [
            f"rank {rank.rank}",
            *(amount(rank.kinds.get(kind, 0)) for kind in kinds),
            amount(rank.peak),
            amount(rank.host),
        ]
        for rank in predicted.memory
    ]
    head = ["", *map(words, kinds), "peak", "host"]
    if report.memory:
        head.append("peak, measured")
        peaks = [amount(max(nbytes for _, nbytes in curve)) if curve else "" for curve in measured]
        rows = [[*row, peak] for row, peak in zip(rows, peaks, strict=False)]
    yield _table("memory-table", head, rows, numbers=range(1, len(head)))


def _picks(names: Sequence[str], pictures: Iterable[str], first: int = 0) -> Iterator[str]:
    """Pictures of which one is seen, chosen by a row of buttons."""
    yield f"<div class='picks' data-first='{first}'>"
    yield "".join(f"<button type='button' aria-pressed='false'>{escape(name)}</button>" for name in names)
    yield "</div><div class='scroll'>"
    yield "".join(f"<div>{picture}</div>" for picture in pictures)
    yield "</div>"


def _schedule(predicted: Prediction) -> Iterator[str]:
    timeline = predicted.timeline()
    if not timeline:
        return
    yield "<h2 id='schedule'>Pipeline schedule</h2>"
    yield "<p>What each pipeline rank does in one step, in seconds, and the activations it holds meanwhile.</p>"
    curves = [rank.curve() for rank in predicted.memory]
    picture = Picture(
        timeline=timeline,
        title="one step",
        memory=curves if all(curves) else (),
        caption=f"{len(timeline)} actions on {len(predicted.pipeline)} pipeline ranks; time in seconds",
    )
    yield f"<div class='scroll' id='schedule-picture'>{render_svg(picture)}</div>"


def _time(report: PlanReport) -> Iterator[str]:
    predicted = report.predicted
    if predicted.time:
        yield "<h2 id='time'>Time</h2>"
        yield "<p>One step of the pipeline rank that computes longest.</p>"
        yield f"<div class='scroll'>{time_bar(predicted)}</div>"
    if report.measured:
        yield "<h2 id='measured'>Predicted and measured</h2>"
        rows = [
            [
                f"stage {row.stage}",
                row.name,
                "" if row.predicted is None else duration(row.predicted),
                "" if row.measured is None else duration(row.measured),
                f"{row.predicted / row.measured:.2f}" if row.predicted and row.measured else "",
            ]
            for row in report.measured
        ]
        head = ["", "of one microbatch", "predicted", "measured", "predicted / measured"]
        yield _table("measured-table", head, rows, numbers=range(2, 5))


def _what_if(what_if: WhatIf | None) -> Iterator[str]:
    if what_if is None:
        return
    texts = [[_cell_texts(cell) for cell in row] for row in what_if.cells]
    lengths = [f"{length:,} tokens" for length in what_if.seq_lengths]
    memories = [f"{amount(nbytes)} a rank" for nbytes in what_if.host_memories]
    i, j = what_if.at
    yield "<h2 id='what-if'>What if?</h2>"
    yield (
        "<p>The same model in the same layout on the same GPUs, planned anew for other sequence lengths and other "
        "amounts of host memory. The number of sequences a step stays.</p>"
    )
    yield _slider("sequence", "sequence length", len(lengths), i, lengths[i])
    yield _slider("host", "host memory", len(memories), j, memories[j])
    here = texts[i][j]
    yield f"<p id='what-if-verdict'><b id='what-if-fit'>{here['fit']}</b> <span id='what-if-choice'></span></p>"
    yield "<div class='cards'>"
    for name, says in (
        ("peak", "device memory"),
        ("step", "a step"),
        ("rate", "tokens per second per GPU"),
        ("mfu", "MFU"),
        ("needs", "host memory a rank"),
    ):
        yield f"<div class='card'><b id='what-if-{name}'>{here[name]}</b><span>{says}</span></div>"
    yield "</div>"
    yield "<p class='faint'>Step time of every cell; grey does not fit.</p>"
    yield "<div class='scroll'><table class='grid'><tr><th></th>"
    yield "".join(f"<th>{length:,}</th>" for length in what_if.seq_lengths) + "</tr>"
    for column, nbytes in reversed(list(enumerate(what_if.host_memories))):
        cells = "".join(
            f"<td data-i='{row}' data-j='{column}' class='{'fits' if line[column].fits else 'not'}'>"
            f"{texts[row][column]['step'] if line[column].fits else '&mdash;'}</td>"
            for row, line in enumerate(what_if.cells)
        )
        yield f"<tr><th>{amount(nbytes)}</th>{cells}</tr>"
    yield "</table></div>"
    data = {"seq_lengths": lengths, "host_memories": memories, "cells": texts}
    content = json.dumps(data).replace("<", "\\u003c")
    yield f"<script type='application/json' id='what-if-data'>{content}</script>"


def _slider(name: str, label: str, count: int, at: int, value: str) -> str:
    return (
        f"<label>{label}<input type='range' id='{name}' min='0' max='{count - 1}' step='1' value='{at}'>"
        f"<output id='{name}-value' for='{name}'>{value}</output></label>"
    )


def _cell_texts(cell: Cell) -> dict[str, str | bool]:
    """What the page says of a cell, by the ids of the places."""
    found: dict[str, str | bool] = {
        "fits": cell.fits,
        "fit": "It fits." if cell.fits else "It does not fit.",
        "choice": cell.choice,
    }
    numbers = {
        "peak": amount(cell.peak_memory),
        "step": duration(cell.step_seconds),
        "rate": f"{cell.tokens_per_second_per_gpu:,.0f}",
        "mfu": f"{100 * cell.mfu:.1f} %",
        "needs": amount(cell.host_memory),
    }
    return found | (numbers if cell.fits else dict.fromkeys(numbers, _NOTHING))


def _trade_off(predicted: Prediction) -> Iterator[str]:
    if not (predicted.front or predicted.alternatives):
        return
    yield "<h2 id='trade-off'>Memory against time</h2>"
    yield (
        "<p>Everything that was considered. Blue: no other is better in both (the Pareto front). Filled: the plan. "
        "Dashed: does not fit.</p>"
    )
    yield f"<div class='scroll'>{trade_off(predicted, _limit(predicted))}</div>"
    rows = [
        [
            one.name,
            duration(one.step_seconds) if one.step_seconds else _NOTHING,
            amount(one.peak_memory) if one.peak_memory else _NOTHING,
            amount(one.host_memory) if one.peak_memory else _NOTHING,
            one.verdict,
        ]
        for one in predicted.alternatives
    ]
    if rows:
        yield "<p>What lost, the best first.</p>"
        yield _table("alternatives", ["", "step", "device memory", "host memory", "why not"], rows, numbers=range(1, 4))


def _reasons(predicted: Prediction) -> Iterator[str]:
    if predicted.decisions:
        yield "<h2 id='reasons'>Reasons</h2>"
        rows = [
            [
                row.subject,
                row.layers,
                row.fate if row.fraction == 1 else f"{row.fate} {100 * row.fraction:.0f} %",
                amount(row.nbytes) if row.nbytes else "",
                duration(row.seconds) if row.seconds else "",
                "" if row.fate != "swap" else "hidden" if row.hidden else "exposed",
                row.reason,
            ]
            for row in predicted.decisions
        ]
        head = ["", "layers", "what", "bytes", "to recompute", "copies", "why"]
        yield _table("decisions", head, rows, numbers=(3, 4))
    if predicted.notes:
        yield "<h2 id='notes'>What is taken for granted</h2><ul>"
        yield "".join(f"<li>{escape(note)}</li>" for note in predicted.notes)
        yield "</ul>"


def _settings(report: PlanReport) -> Iterator[str]:
    yield "<h2 id='settings'>Settings</h2>"
    yield "<p>The plan file runs as it is: <code>--megamem FILE</code>, or <code>megamem.enable(FILE)</code>.</p>"
    yield f"<pre>{escape(report.settings)}</pre>"
    if report.command:
        yield f"<p class='faint'>This page: <code>{escape(report.command)}</code></p>"


def _table(name: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = ()) -> str:
    right = set(numbers)

    def line(cells: Sequence[str], tag: str) -> str:
        inner = "".join(
            f"<{tag}{' class=number' if index in right else ''}>{escape(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        )
        return f"<tr>{inner}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<div class='scroll'><table id='{name}'>{line(head, 'th')}{body}</table></div>"
