"""The page of a plan: what is in the file, and what a real browser shows of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import Browser
from sample_plan import MICROBATCHES, RANKS, grid, sample

from megamem.ir.plan import MEMORY_KINDS, Plan, Prediction
from megamem.report.charts import Axis, amount, duration
from megamem.report.page import Measured, PlanReport, render_page


def plan() -> Plan:
    found = sample().plan
    assert found is not None
    return found


def predicted() -> Prediction:
    found = plan().predicted
    assert found is not None
    return found


def page(**changed: Any) -> str:
    settings = yaml.safe_dump({"megamem": sample().settings()}, sort_keys=False)
    return render_page(PlanReport(**{"plan": plan(), "settings": settings, "what_if": grid(), **changed}))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def shown(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Browser:
    path = tmp_path_factory.mktemp("page") / "plan.html"
    path.write_text(page(), encoding="utf-8")
    browser.open(path)
    return browser


def test_nothing_is_loaded_from_anywhere(shown: Browser) -> None:
    assert shown.messages() == []  # neither errors of the script nor refusals of the policy
    assert shown.evaluate("performance.getEntriesByType('resource').length") == 0
    text = page()
    assert "default-src 'none'" in text
    assert not re.findall(r"(?:src|href)\s*=\s*['\"]?(?!data:)[a-z]+:", text)
    assert {"http://www.w3.org/2000/svg"} == set(re.findall(r"https?://[^'\"\s<)]+", text))


def test_a_browser_draws_every_kind_of_memory_of_every_rank(shown: Browser) -> None:
    bars = shown.evaluate(
        "[...document.querySelectorAll('svg.memory-bars rect.memory')].map(r => [r.textContent, "
        "r.getBoundingClientRect().width, r.getBoundingClientRect().height])"
    )
    wanted = {
        f"rank {rank.rank}: {kind.replace('_', ' ')} {amount(nbytes)}": nbytes
        for rank in predicted().memory
        for kind in MEMORY_KINDS
        if (nbytes := rank.kinds.get(kind))
    }
    assert {text for text, *_ in bars} == wanted.keys()
    scale = sum(width for _, width, _ in bars) / sum(wanted.values())
    for text, width, height in bars:
        assert width == pytest.approx(wanted[text] * scale, abs=0.6)
        assert height > 10


def test_a_browser_draws_the_memory_of_one_rank_over_time_and_the_others_on_request(shown: Browser) -> None:
    visible = (
        "[...document.querySelectorAll('svg.memory-over-time')].filter(s => s.getBoundingClientRect().width > 0)"
        ".map(s => s.querySelector('title').textContent)"
    )
    fullest = max(predicted().memory, key=lambda rank: rank.peak).rank
    assert shown.evaluate(visible) == [f"rank {fullest}: device memory over one step"]
    shown.evaluate("document.querySelectorAll('.picks button')[0].click()")
    assert shown.evaluate(visible) == ["rank 0: device memory over one step"]
    area = shown.evaluate(
        "(() => { const s = document.querySelector('svg.memory-over-time'); const p = [...s.querySelectorAll('path')]"
        ".find(p => p.textContent.includes('activations')); const b = p.getBBox(); return [b.width, b.height]; })()"
    )
    assert area[0] > 700 and area[1] > 20


def test_a_browser_draws_the_schedule(shown: Browser) -> None:
    actions = sum(len(line.split()) for line in predicted().pipeline)
    titles = shown.evaluate("[...document.querySelectorAll('#schedule-picture svg g title')].map(t => t.textContent)")
    assert len(titles) == actions == 3 * 2 * MICROBATCHES * RANKS  # F, B and W on two chunks
    assert sum(": F" in re.sub(r"\d", "", title) for title in titles) == actions / 3
    assert shown.evaluate("document.querySelector('#schedule-picture svg').getBoundingClientRect().height") > 150


def test_a_browser_draws_time_and_trade_off(shown: Browser) -> None:
    widths = shown.evaluate(
        "[...document.querySelectorAll('svg.time-bar rect.time')]"
        ".map(r => [r.textContent, r.getBoundingClientRect().width])"
    )
    total = sum(predicted().time.values())
    assert len(widths) == len(predicted().time)
    assert {text.split(":")[0].replace(" ", "_") for text, _ in widths} == predicted().time.keys()
    for text, width in widths:
        kind = text.split(":")[0].replace(" ", "_")
        assert width == pytest.approx(760 * predicted().time[kind] / total, abs=0.6)
    points = shown.evaluate("[...document.querySelectorAll('svg.trade-off .point')].map(p => p.textContent)")
    names = {one.name for one in (*predicted().front, *predicted().alternatives)}
    assert {text.split(":")[0] for text in points} == names | {"the plan"}
    assert shown.evaluate("document.querySelector('svg.trade-off .front').getTotalLength()") > 10


def test_headline_figures(shown: Browser) -> None:
    assert shown.evaluate("document.getElementById('peak-memory').textContent") == amount(predicted().peak_memory)
    assert shown.evaluate("document.getElementById('step-time').textContent") == duration(predicted().step_seconds)
    assert shown.evaluate("document.title") == "sample, 32,768 tokens, TP 4 x PP 4 x 2 chunks"


def test_sliders_show_what_the_planner_said_of_every_cell(shown: Browser) -> None:
    what_if = grid()
    get = "(id => document.getElementById(id).textContent)"
    for i, sequence in enumerate(what_if.seq_lengths):
        for j, host in enumerate(what_if.host_memories):
            shown.evaluate(
                f"[['sequence', {i}], ['host', {j}]].forEach(([id, v]) => {{ const s = document.getElementById(id); "
                "s.value = v; s.dispatchEvent(new Event('input')); })"
            )
            cell = what_if.cells[i][j]
            assert shown.evaluate(f"{get}('sequence-value')") == f"{sequence:,} tokens"
            assert shown.evaluate(f"{get}('host-value')") == f"{amount(host)} a rank"
            found = shown.evaluate(
                f"['fit', 'peak', 'step', 'needs', 'rate', 'choice'].map(n => {get}('what-if-' + n))"
            )
            numbers = [
                amount(cell.peak_memory),
                duration(cell.step_seconds),
                amount(cell.host_memory),
                f"{cell.tokens_per_second_per_gpu:,.0f}",
            ]
            verdict = "It fits." if cell.fits else "It does not fit."
            assert found == [verdict, *(numbers if cell.fits else ["\u2013"] * 4), cell.choice]
            assert shown.evaluate("document.querySelectorAll('.grid td.here').length") == 1
    assert {cell.fits for row in what_if.cells for cell in row} == {True, False}
    shown.evaluate('document.querySelector(\'.grid td[data-i="2"][data-j="0"]\').click()')
    assert shown.evaluate("document.getElementById('sequence').value") == "2"


def test_pointing_at_a_part_says_what_it_is(shown: Browser) -> None:
    said = shown.evaluate(
        "(() => { const r = document.querySelector('svg.memory-bars rect.memory'); "
        "r.dispatchEvent(new MouseEvent('mousemove', {bubbles: true, clientX: 50, clientY: 50})); "
        "const t = document.getElementById('tip'); return [t.textContent, getComputedStyle(t).display]; })()"
    )
    assert said == [f"rank 0: weights {amount(predicted().memory[0].kinds['weights'])}", "block"]


def test_a_screenshot_is_not_blank(shown: Browser) -> None:
    assert len(shown.screenshot()) > 20_000  # a white window of this size takes 5 kB


def test_names_are_text_and_never_markup(browser: Browser, tmp_path: Path) -> None:
    config = sample("<img src=x onerror=document.title='broken'> & \"co\"")
    assert config.plan is not None
    text = render_page(PlanReport(plan=config.plan, settings="a: <b>", what_if=grid(), command="megamem report '<x>'"))
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    browser.open(path)
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert browser.evaluate("document.querySelector('h1').textContent").startswith("<img src=x")
    assert browser.messages() == []


def test_what_is_not_predicted_is_not_drawn(browser: Browser, tmp_path: Path) -> None:
    bare = Prediction(step_seconds=1.5, utilization=predicted().utilization)
    text = render_page(PlanReport(plan=replace(plan(), predicted=bare), settings=""))
    path = tmp_path / "bare.html"
    path.write_text(text, encoding="utf-8")
    browser.open(path)
    assert browser.messages() == []
    assert browser.evaluate("document.querySelectorAll('svg').length") == 0
    assert browser.evaluate("document.querySelector('h1').textContent").startswith("sample")


def test_edited_settings_and_measured_times_are_said() -> None:
    rows = [Measured(stage=0, name="forward", predicted=0.012, measured=0.01)]
    text = page(is_edited=True, measured=rows, memory=[[(0.0, 1 << 30), (1.0, 1 << 31)], [(0.0, 5)]])
    assert "id='edited'" in text and "id='edited'" not in page()
    assert "1.20" in text and "12.0 ms" in text
    assert "peak, measured" in text and text.count("class='measured'") == 2
    assert "measured, at most 2.00 GiB" in text and "class='measured'" not in page()
    assert "slower &lt;by&gt; a little &amp; not smaller" in text


@pytest.mark.parametrize(
    ("nbytes", "says"),
    [(0, "0 B"), (1023, "1023 B"), (1 << 20, "1.00 MiB"), (34.1 * 2**30, "34.1 GiB"), (268 << 30, "268 GiB")],
)
def test_amounts(nbytes: float, says: str) -> None:
    assert amount(nbytes) == says


@pytest.mark.parametrize(("seconds", "says"), [(10.84, "10.8 s"), (0.0123, "12.3 ms"), (1010, "1,010 s"), (0, "0 s")])
def test_durations(seconds: float, says: str) -> None:
    assert duration(seconds) == says


def test_ticks_are_round_and_within() -> None:
    axis = Axis(9.7, 0, 100, least=3.2)
    assert axis.ticks(5) == [4, 6, 8]
    assert axis(3.2) == 0 and axis(9.7) == 100
    assert Axis(80 * 2**30, 0, 1).ticks(4, binary=True) == [n * 20 * 2**30 for n in range(5)]
