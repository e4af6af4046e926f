"""README.md and the pages beside it say what the code and the benchmarks' files say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_made_parts_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "ci/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part == "build" for part in path.relative_to(ROOT).parts)
]


@pytest.mark.parametrize("name", PAGES)
def test_every_file_that_a_page_links_to_is_there(name: str) -> None:
    page = ROOT / name
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_there_are_pages_with_links() -> None:
    assert {"README.md", "examples/OPTIONS.md", "ci/bench/RESULTS.md", "examples/schedules/README.md"} <= set(PAGES)
    assert "](" in (ROOT / "README.md").read_text(encoding="utf-8")
