"""The picture of a solution: well-formed, to scale, and one rectangle per buffer."""

from xml.etree import ElementTree

import pytest

from megamem.ir.allocation import Buffer, Problem, Solution
from megamem.report import allocation_svg
from megamem.report.allocation_svg import render_svg

SVG = "{http://www.w3.org/2000/svg}"
BUFFERS = (
    Buffer(id="long <&>", lower=0, upper=10, size=100),
    Buffer(id="early", lower=0, upper=5, size=300),
    Buffer(id="late", lower=5, upper=10, size=300),
)
SOLUTION = Solution(problem=Problem(buffers=BUFFERS), offsets=(300, 0, 0))


def boxes(text: str) -> dict[str, dict[str, float]]:
    """Of the rectangles with a title: their numbers by buffer."""
    found = {}
    for rect in ElementTree.fromstring(text).iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None and title.text:
            found[title.text.partition(":")[0]] = {
                key: float(rect.attrib[key]) for key in ("x", "y", "width", "height")
            }
    return found


def test_rectangles_are_lifetimes_by_addresses() -> None:
    found = boxes(render_svg(SOLUTION, title="a & b", lower_bound=400))
    assert set(found) == {"long <&>", "early", "late"}
    early, late, long = found["early"], found["late"], found["long <&>"]
    assert early["x"] + early["width"] == pytest.approx(late["x"])
    assert early["width"] * 2 == pytest.approx(long["width"])
    assert long["y"] + long["height"] == pytest.approx(early["y"])
    assert early["height"] == pytest.approx(3 * long["height"])


def test_the_lower_bound_is_a_line_and_in_the_caption() -> None:
    text = render_svg(SOLUTION, title="t", lower_bound=200)
    assert "stroke-dasharray" in text
    assert "3 buffers, peak 400 B, lower bound 200 B" in text
    assert "stroke-dasharray" not in render_svg(SOLUTION, title="t")


def test_the_smallest_are_left_out_of_a_large_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation_svg, "_MOST", 2)
    text = render_svg(SOLUTION, title="t")
    assert set(boxes(text)) == {"early", "late"}
    assert "the 1 smallest are not drawn" in text


def test_an_empty_solution_can_be_drawn() -> None:
    assert boxes(render_svg(Solution(problem=Problem(buffers=()), offsets=()), title="t", lower_bound=0)) == {}
