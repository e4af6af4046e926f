"""Schedules as data: the text form both ways, placements, and what is refused."""

import random

import pytest

from megamem.errors import ScheduleError
from megamem.ir.schedule import KINDS, Action, Placement, Schedule, order_text, parse_schedule

TEXT = """megamem-schedule 1
name: zb-h1
placement: round-robin
ranks: 2
chunks: 1
microbatches: 2
rank 0: 0F0 0F1 0B0 0W0 0B1 0W1
rank 1: 0F0 0B0 0F1 0B1 0W0 0W1
"""


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("0F3", Action("F", 0, 3)),
        ("12BW345", Action("BW", 12, 345)),
        ("1SEND_B0", Action("SEND_B", 1, 0)),
        ("0W3:1/4", Action("W", 0, 3, 1, 4)),
        ("3OFFLOAD7", Action("OFFLOAD", 3, 7)),
    ],
)
def test_an_action_has_one_text(text: str, action: Action) -> None:
    assert Action.parse(text) == action
    assert str(action) == text


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_back(kind: str) -> None:
    action = Action(kind, 10, 20)  # type: ignore[arg-type]
    assert Action.parse(str(action)) == action


@pytest.mark.parametrize(
    "text",
    ["", "F", "F3", "0F", "0X3", "0f3", "-1F0", "0F-1", "0F3:0/2", "0W3:4/4", "0W3:0/0", "0W3:1", "0F3 0F4", "0F3x"],
)
def test_what_is_no_action_is_named(text: str) -> None:
    with pytest.raises(ScheduleError, match=r"no action|parts"):
        Action.parse(text)


def test_what_computes() -> None:
    assert [kind for kind in KINDS if Action(kind, 0, 0).is_compute] == ["F", "B", "W", "BW", "S", "T", "IF", "IB"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", ["round-robin", "v"])
def test_a_placement_is_one_to_one(shape: str, ranks: int, chunks: int) -> None:
    placement = Placement(shape=shape, num_ranks=ranks, num_chunks=chunks)  # type: ignore[arg-type]
    stages = {placement.stage(rank, chunk): (rank, chunk) for rank in range(ranks) for chunk in range(chunks)}
    assert sorted(stages) == list(range(placement.num_stages))
    for stage, (rank, chunk) in stages.items():
        assert (placement.rank_of(stage), placement.chunk_of(stage)) == (rank, chunk)


def test_a_v_turns_at_the_ends() -> None:
    """Rank 0 holds the first and the last stage of two chunks; neighbours are never more than one rank apart."""
    v = Placement(shape="v", num_ranks=4, num_chunks=2)
    assert [v.rank_of(stage) for stage in range(8)] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert [Placement(shape="round-robin", num_ranks=3, num_chunks=2).rank_of(s) for s in range(6)] == [
        0,
        1,
        2,
        0,
        1,
        2,
    ]


@pytest.mark.parametrize(("shape", "ranks", "chunks"), [("w", 2, 1), ("v", 0, 1), ("v", 2, 0)])
def test_impossible_placements(shape: str, ranks: int, chunks: int) -> None:
    with pytest.raises(ScheduleError):
        Placement(shape=shape, num_ranks=ranks, num_chunks=chunks)  # type: ignore[arg-type]


def test_the_text_form_of_the_docstring() -> None:
    schedule = parse_schedule(TEXT)
    assert schedule.to_text() == TEXT
    assert order_text(schedule.ranks[1]) == "0F0 0B0 0F1 0B1 0W0 0W1"
    assert schedule.splits_backward
    assert len(list(schedule)) == 12


def test_comments_spaces_and_order_of_lines_do_not_matter() -> None:
    lines = TEXT.splitlines()
    shuffled = [lines[0], *reversed(lines[1:])]
    pasted = "\n\n# from a bug report\n" + "\n".join(f"   {line}  " for line in shuffled)
    assert parse_schedule(pasted) == parse_schedule(TEXT)


@pytest.mark.parametrize("seed", range(20))
def test_anything_that_can_be_written_is_read_back(seed: int) -> None:
    rng = random.Random(seed)
    ranks, chunks, microbatches = (rng.randint(1, 5) for _ in range(3))
    lists = []
    for _ in range(ranks):
        actions = [Action(rng.choice(KINDS), rng.randrange(chunks), rng.randrange(microbatches)) for _ in range(9)]
        actions += [Action("W", rng.randrange(chunks), rng.randrange(microbatches), rng.randrange(3), 3)]
        lists.append(tuple(actions))
    schedule = Schedule(
        name="some name, 1",
        placement=Placement(shape=rng.choice(["round-robin", "v"]), num_ranks=ranks, num_chunks=chunks),  # type: ignore[arg-type]
        num_microbatches=microbatches,
        ranks=tuple(lists),
        group=rng.choice([None, 3]),
    )
    assert parse_schedule(schedule.to_text()) == schedule


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("megamem-schedule 1", "schedule"), "begins with the line"),
        (("placement: round-robin\n", ""), "lacks placement"),
        (("placement: round-robin", "placement: w"), "round-robin or v, not 'w'"),
        (("chunks: 1", "chunks: one"), "chunks: 'one' is no number"),
        (("chunks: 1", "chunks: 0"), "must be at least 1"),
        (("chunks: 1", "colour: red\nchunks: 1"), "unknown keys: colour"),
        (("chunks: 1", "chunks: 1\nchunks: 2"), "line 6: chunks is there twice"),
        (("ranks: 2", "ranks: 3"), "ranks: 3, and there are lines for ranks \\[0, 1\\]"),
        (("ranks: 2", "ranks: 2000000000000"), "ranks: 2000000000000, and there are lines"),
        (("rank 1:", "rank 0:"), "line 8: rank 0 is there twice"),
        (("rank 1:", "rank 2:"), "there are lines for ranks \\[0, 2\\]"),
        (("rank 1:", "rank one:"), "line 8: rank: 'one' is no number"),
        (("0F0 0B0", "0F0 0Q0"), "line 8: '0Q0' is no action"),
        (("0F0 0B0", "0F0 0B2"), "rank 1 has 0B2, with 1 chunks and 2 microbatches"),
        (("0F0 0B0", "0F0 1B0"), "rank 1 has 1B0"),
        (("microbatches: 2", "microbatches: 0"), "at least one microbatch"),
        (("name: zb-h1", "name:"), "no name"),
        (("chunks: 1", "chunks"), "line 5: 'chunks' is neither"),
    ],
)
def test_a_wrong_text_is_refused_with_its_line(change: tuple[str, str], reason: str) -> None:
    assert change[0] in TEXT
    with pytest.raises(ScheduleError, match=reason):
        parse_schedule(TEXT.replace(*change))


def test_nothing_is_no_schedule() -> None:
    with pytest.raises(ScheduleError, match="begins with the line 'megamem-schedule 1'"):
        parse_schedule("# only a comment\n")


def test_lists_must_fit_the_placement() -> None:
    placement = Placement(shape="v", num_ranks=2, num_chunks=1)
    with pytest.raises(ScheduleError, match="1 lists of actions for 2 ranks"):
        Schedule(name="x", placement=placement, num_microbatches=1, ranks=((),))
    with pytest.raises(ScheduleError, match="no name"):
        Schedule(name="two\nlines", placement=placement, num_microbatches=1, ranks=((), ()))


def test_with_ranks_keeps_everything_else() -> None:
    schedule = parse_schedule(TEXT)
    other = schedule.with_ranks([[Action("F", 0, 0)], []])
    assert other.ranks == ((Action("F", 0, 0),), ())
    assert (other.name, other.placement, other.num_microbatches) == ("zb-h1", schedule.placement, 2)
    assert not other.splits_backward
