"""Plans of the arena as data, and their file form: what is malformed is refused, never half read."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from megamem.errors import AllocationError
from megamem.ir.arena import NATIVE, OPTIONAL, ArenaPlan, parse_plan, read_plan, write_plan

PLAN = ArenaPlan(
    key="training, 4 microbatches",
    sizes=(1000, 0, 2048, 77),
    offsets=(0, NATIVE, 1024, OPTIONAL),
    min_size=64,
    lower_bound=3072,
    solver="greedy",
)


def test_what_a_plan_says_of_itself() -> None:
    assert (PLAN.peak, PLAN.num_planned, PLAN.planned_nbytes, PLAN.gap) == (3072, 2, 3048, 0.0)
    empty = ArenaPlan(key="", sizes=(), offsets=(), min_size=0, lower_bound=0)
    assert (empty.peak, empty.num_planned, empty.gap) == (0, 0, 0.0)


@pytest.mark.parametrize(
    ("sizes", "offsets"),
    [
        ((1,), ()),
        ((0,), (0,)),
        ((-1,), (NATIVE,)),
        ((1,), (-3,)),
        ((1,), (100,)),
        ((1 << 62,), (0,)),
        ((1,), (1 << 62,)),
    ],
)
def test_what_cannot_be_is_refused(sizes: tuple[int, ...], offsets: tuple[int, ...]) -> None:
    with pytest.raises(AllocationError):
        ArenaPlan(key="k", sizes=sizes, offsets=offsets, min_size=0, lower_bound=0)
    with pytest.raises(AllocationError, match="cannot be negative"):
        ArenaPlan(key="k", sizes=(), offsets=(), min_size=-1, lower_bound=0)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "plan.json.gz"
    write_plan(path, PLAN)
    assert read_plan(path) == PLAN and list(path.parent.iterdir()) == [path]
    with pytest.raises(AllocationError, match=r"none\.json\.gz: cannot be read"):
        read_plan(tmp_path / "none.json.gz")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(AllocationError, match="cannot be written"):
        write_plan(tmp_path / "file" / "plan.json.gz", PLAN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "no plan of megamem's arena"),
        ({"version": 2}, "version 2, and 1 can be read"),
        ({"sizes": [1.5, 0, 2048, 77]}, "1.5 where a whole number"),
        ({"sizes": [True, 0, 2048, 77]}, "True where a whole number"),
        ({"offsets": [1, -1, 1024, -2]}, "cannot lie at 1"),
        ({"offsets": 5}, "cannot be read"),
        ({"min_size": None}, "None where a whole number"),
    ],
)
def test_malformed_files_are_named(change: dict[str, object], message: str) -> None:
    content = {**json.loads(gzip.decompress(PLAN.to_bytes())), **change}
    with pytest.raises(AllocationError, match=message):
        parse_plan(gzip.compress(json.dumps(content).encode()))


def test_random_damage_is_refused_or_harmless() -> None:
    """Whatever is wrong with a file, it is an AllocationError, or else a plan that keeps all the rules."""
    good, text = PLAN.to_bytes(), gzip.decompress(PLAN.to_bytes())
    for seed in range(3000):
        generator = random.Random(seed)
        damaged = bytearray(good if seed % 3 == 0 else text)
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(len(damaged))
            if generator.random() < 0.3:
                del damaged[at : at + generator.randint(1, 9)]
            else:
                damaged[at : at + 1] = generator.choice((b"-", b"9", b"]", b"{", b"0", b"e", b"\xff", b",", b'"'))
        try:
            plan = parse_plan(bytes(damaged) if seed % 3 == 0 else gzip.compress(bytes(damaged)))
        except AllocationError:
            continue
        assert len(plan.sizes) == len(plan.offsets)
        assert all(
            offset < 0 or (size > 0 and offset % 512 == 0)
            for size, offset in zip(plan.sizes, plan.offsets, strict=True)
        )
