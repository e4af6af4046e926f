"""The picture, the trace and the text of a schedule hold what the simulator says, and nothing else."""

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from megamem.ir.schedule import Action, TimedAction
from megamem.report.perfetto import chrome_trace
from megamem.report.schedule_svg import Picture, render_svg
from megamem.report.schedule_text import render_text

SVG = "{http://www.w3.org/2000/svg}"


def timeline(*rows: tuple[int, str, float, float]) -> list[TimedAction]:
    return [TimedAction(rank, Action.parse(text), start, end) for rank, text, start, end in rows]


TWO_RANKS = timeline(
    (0, "0F0", 0, 1),
    (0, "0SEND_F0", 1, 1),
    (0, "1F0", 2, 3),
    (0, "1BW0", 3, 5),
    (0, "0B0", 6, 7),
    (0, "0W0", 7, 8),
    (1, "0F0", 1, 2),
    (1, "0OFFLOAD0", 2, 3.5),
    (1, "0RELOAD0", 3, 5),
    (1, "0B0", 5, 6),
    (1, "0W0:0/2", 6, 6.5),
    (1, "0W0:1/2", 6.5, 7),
)


def boxes(svg: str) -> dict[str, list[tuple[float, float, str]]]:
    """By tooltip: x, width and colour of every rectangle."""
    root = ElementTree.fromstring(svg)
    found = {}
    for group in root.iter(f"{SVG}g"):
        title = group.find(f"{SVG}title")
        assert title is not None and title.text is not None
        rects = group.findall(f"{SVG}rect")
        found[title.text] = [(float(r.attrib["x"]), float(r.attrib["width"]), r.attrib["fill"]) for r in rects]
    return found


def test_the_picture_has_every_action_but_communication_at_its_time() -> None:
    found = boxes(render_svg(Picture(timeline=TWO_RANKS, title="two")))
    assert len(found) == 11
    assert not any("SEND" in title for title in found)
    left, width, _ = found["rank 0: 0F0, 0 to 1"][0]
    for title, rects in found.items():
        match = re.fullmatch(r"rank \d: \S+, (\S+) to (\S+)", title)
        assert match is not None
        start, end = map(float, match.groups())
        gap = 0.8  # between neighbours
        assert rects[0][0] == pytest.approx(left + start * (width + gap), abs=0.02)
        assert rects[0][1] == pytest.approx((end - start) * (width + gap) - gap, abs=0.02)


def test_kinds_have_their_own_colour_and_higher_chunks_are_lighter() -> None:
    found = boxes(render_svg(Picture(timeline=TWO_RANKS, title="two")))
    first, second = found["rank 0: 0F0, 0 to 1"][0][2], found["rank 0: 1F0, 2 to 3"][0][2]
    assert first == "#0072b2"
    assert int(second[1:3], 16) > int(first[1:3], 16)
    colours = {found[f"rank 0: {text}"][0][2] for text in ("0F0, 0 to 1", "0B0, 6 to 7", "0W0, 7 to 8")}
    assert len(colours) == 3
    assert len(found["rank 0: 1BW0, 3 to 5"]) == 2  # B above W


def test_the_picture_says_what_it_is_told_and_escapes_it() -> None:
    curves = [[(0.0, 0.0), (1.0, 2.0), (7.0, 0.0)], [(0.0, 0.0), (1.0, 3.5 * 2**30), (2.0, 0.0)]]
    picture = Picture(timeline=TWO_RANKS, title="a < b & c", caption="bubble > 0", memory=curves, limit=4 * 2.0**30)
    texts = [text.text for text in ElementTree.fromstring(render_svg(picture)).iter(f"{SVG}text")]
    assert "a < b & c" in texts
    assert "bubble > 0" in texts
    assert "peak 3.50GiB" in texts
    assert "lighter: higher chunks" in texts
    assert texts.count("rank 1") == 2  # once beside the actions, once beside the memory


def test_microbatches_are_numbered_where_there_is_room() -> None:
    def numbers(rows: list[TimedAction]) -> list[str | None]:
        root = ElementTree.fromstring(render_svg(Picture(timeline=rows, title="x")))
        return [text.text for group in root.iter(f"{SVG}g") for text in group.iter(f"{SVG}text")]

    few = timeline(*((0, f"0F{m}", m, m + 1) for m in range(12)))
    assert numbers(few) == [str(m) for m in range(12)]
    many = timeline(*((0, f"0F{m}", m, m + 1) for m in range(3000)))
    assert numbers(many) == []


@pytest.mark.parametrize("rows", [[], timeline((0, "0F0", 0, 0))])
def test_nothing_to_draw_is_still_a_picture(rows: list[TimedAction]) -> None:
    ElementTree.fromstring(render_svg(Picture(timeline=rows, title="nothing")))
    assert render_text(rows, 80) is None


def events(text: str, phase: str) -> list[dict[str, Any]]:
    return [event for event in json.loads(text)["traceEvents"] if event["ph"] == phase]


def test_the_trace_has_complete_events_in_microseconds() -> None:
    trace = chrome_trace(TWO_RANKS, microseconds=1000)
    complete = events(trace, "X")
    assert len(complete) == 11
    backward = next(event for event in complete if event["name"] == "1BW0")
    assert (backward["pid"], backward["tid"], backward["ts"], backward["dur"]) == (0, 0, 3000, 2000)
    assert backward["args"] == {"kind": "BW", "chunk": 1, "microbatch": 0}
    assert [event["name"] for event in events(trace, "i")] == ["0SEND_F0"]


def test_slices_of_a_thread_never_overlap() -> None:
    """Perfetto nests slices that overlap on a thread, which looks like a call; both copy directions have their own."""
    by_thread: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events(chrome_trace(TWO_RANKS), "X"):
        by_thread.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert len(by_thread) == 4
    for spans in by_thread.values():
        spans.sort()
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def test_the_trace_names_ranks_and_threads_and_counts_memory() -> None:
    trace = chrome_trace(
        TWO_RANKS, memory={1: [(0.0, 0.0), (1.0, 2.5)]}, memory_name="activations (bytes)", title="measured"
    )
    names = {(e["pid"], e["tid"], e["name"]): e["args"].get("name") for e in events(trace, "M")}
    assert names[0, 0, "process_name"] == "measured rank 0"
    assert names[1, 1, "thread_name"] == "copies to the host"
    assert (0, 1, "thread_name") not in names
    counters = events(trace, "C")
    assert [(c["name"], c["pid"], c["ts"], c["args"]) for c in counters] == [
        ("activations (bytes)", 1, 0.0, {"held": 0.0}),
        ("activations (bytes)", 1, 1.0, {"held": 2.5}),
    ]


def test_text_in_even_steps() -> None:
    rows = timeline((0, "0F0", 0, 1), (0, "0BW0", 3, 5), (1, "0F0", 1, 2), (1, "0BW0", 2, 4))
    assert render_text(rows, 80) == "rank 0 F0  .   .   BW0----\nrank 1 .   F0  BW0---- ."
    assert render_text(rows, 26) is not None
    assert render_text(rows, 11) is None


def test_text_in_slices_of_time() -> None:
    rows = timeline((0, "0F0", 0, 1.5), (0, "0B0", 2.5, 4), (0, "0W0", 4, 5))
    assert render_text(rows, 17) == "rank 0 FFF..BBBWW"
    fused = timeline((0, "0F0", 0, 1.1), (0, "0BW0", 1.1, 4))
    assert render_text(fused, 47) == "rank 0 " + "F" * 11 + "D" * 29
