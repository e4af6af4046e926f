"""Every kind of mistake is found and named; no valid schedule is refused."""

import random
import time
from collections.abc import Callable

import pytest
from random_schedules import one_f_one_b, random_costs, random_schedule, runs_to_its_end, schedule_of

from megamem.errors import InfeasibleError, ScheduleError
from megamem.ir.schedule import Action, Schedule, parse_schedule
from megamem.ir.workload import Uniform
from megamem.planner.schedules.checker import accumulates_in_order, check_schedule, find_problems
from megamem.planner.schedules.passes import add_communication
from megamem.planner.schedules.simulator import price, simulate


def of(*texts: str, microbatches: int = 1, chunks: int = 1, shape: str = "round-robin") -> Schedule:
    """A schedule from the text of its ranks."""
    return schedule_of(
        [tuple(map(Action.parse, text.split())) for text in texts], microbatches, chunks=chunks, shape=shape
    )


def faults(schedule: Schedule) -> list[str]:
    return [f"{problem.rank}: {problem.text}" for problem in find_problems(schedule)]


@pytest.mark.parametrize("seed", range(60))
def test_valid_schedules_pass_with_and_without_communication(seed: int) -> None:
    schedule = random_schedule(seed)
    check_schedule(schedule)
    check_schedule(add_communication(schedule, lookahead=seed % 3))


@pytest.mark.parametrize("seed", range(150))
def test_an_exchange_is_refused_exactly_when_the_lists_cannot_run(seed: int) -> None:
    rng = random.Random(seed)
    schedule = random_schedule(seed)
    lists = [list(actions) for actions in schedule.ranks]
    for _ in range(rng.randint(1, 2)):
        actions = rng.choice(lists)
        first, second = rng.randrange(len(actions)), rng.randrange(len(actions))
        actions[first], actions[second] = actions[second], actions[first]
    changed = schedule.with_ranks(lists)
    assert bool(find_problems(changed)) == (not runs_to_its_end(changed))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("communicates", [False, True])
def test_a_lost_or_repeated_action_is_always_noticed(seed: int, communicates: bool) -> None:
    rng = random.Random(seed)
    schedule = random_schedule(seed)
    schedule = add_communication(schedule) if communicates else schedule
    rank = rng.randrange(len(schedule.ranks))
    place = rng.randrange(len(schedule.ranks[rank]))
    lists = [list(actions) for actions in schedule.ranks]
    action = lists[rank].pop(place)
    assert faults(schedule.with_ranks(lists))
    lists[rank][place:place] = [action, action]
    assert f"{rank}: {action} is there twice" in faults(schedule.with_ranks(lists))


@pytest.mark.parametrize(
    ("schedule", "wants"),
    [
        (of("0F0"), ["0: 0B0 (or 0BW0) is missing"]),
        (of("0BW0"), ["0: 0F0 is missing"]),
        (of("0F0 0B0"), ["0: 0W0: is missing"]),
        (of("0BW0 0F0"), ["0: 0BW0 is before 0F0"]),
        (of("0F0 0W0 0B0"), ["0: 0W0 is before 0B0"]),
        (of("0F0 0B0 0BW0 0W0"), ["0: 0B0 and 0BW0 are both there", "0: 0W0 is there beside 0BW0"]),
        (of("0F0 0B0 0W0:0/3 0W0:2/3"), ["0: 0W0: of 3 parts, 1 missing"]),
        (of("0F0 0B0 0W0 0W0:0/2"), ["0: 0W0: is divided in different ways: 0W0 0W0:0/2"]),
        (of("0F0 0OFFLOAD0 0BW0"), ["0: 0OFFLOAD0 without its RELOAD"]),
        (of("0F0 0RELOAD0 0BW0"), ["0: 0RELOAD0 without its OFFLOAD"]),
        (of("0OFFLOAD0 0F0 0RELOAD0 0BW0"), ["0: 0OFFLOAD0 is before 0F0"]),
        (of("0F0 0RELOAD0 0OFFLOAD0 0BW0"), ["0: 0RELOAD0 is before its OFFLOAD"]),
        (of("0F0 0OFFLOAD0 0BW0 0RELOAD0"), ["0: 0RELOAD0 is after the backward pass that needs it"]),
        (of("0F0 0SEND_F0 0BW0"), ["0: 0SEND_F0 has no other rank at its end"]),
        (
            of("0F0 0SEND_F0 0BW0", "0RECV_F0 0F0 0BW0 0SEND_B0"),
            ["0: 0BW0 without its 0RECV_B0"],
        ),
        (
            of("0SEND_F0 0F0 0BW0 0RECV_B0", "0F0 0RECV_F0 0SEND_B0 0BW0"),
            [
                "0: 0SEND_F0 is before the action that makes the message",
                "0: 0RECV_B0 is after the action that needs the message",
                "1: 0RECV_F0 is after the action that needs the message",
                "1: 0SEND_B0 is before the action that makes the message",
            ],
        ),
        (
            of(
                "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0RECV_B1 0BW0 0BW1",
                "0RECV_F1 0RECV_F0 0F0 0BW0 0SEND_B0 0F1 0BW1 0SEND_B1",
                microbatches=2,
            ),
            [
                "1: the F channel from rank 0 to rank 1 is not in one order: message 0 is sent for stage 1, microbatch "
                "0, and received for stage 1, microbatch 1"
            ],
        ),
        (of("0F0 0S0 0BW0", "0F0 0S0 0BW0 0T0"), ["0: T of microbatch 0 is missing"]),
        (of("0F0 0T0 0S0 0BW0", "0F0 0S0 0BW0 0T0"), ["0: T of microbatch 0 is before its S"]),
    ],
)
def test_mistakes_are_named(schedule: Schedule, wants: list[str]) -> None:
    assert faults(schedule) == wants


def test_a_deadlock_names_every_waiting_rank() -> None:
    schedule = of("0F0 0BW0 0F1 0BW1", "0F1 0BW1 0F0 0BW0", microbatches=2)
    with pytest.raises(ScheduleError) as caught:
        check_schedule(schedule)
    message = str(caught.value)
    assert "rank 0: deadlock: 0BW0 waits for 0B0 of rank 1" in message
    assert "rank 1: deadlock: 0F1 waits for 0F1 of rank 0" in message
    assert "rank  0 | 0F0  [0BW0] 0F1   0BW1 |  <-- ERROR HERE" in message


def test_a_deadlock_of_messages_alone() -> None:
    """Both sides post in one order and everything is sent; only the receive comes after what waits for its fellow."""
    lists = [
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0RECV_B1 0BW1 0BW0",
        "0RECV_F0 0RECV_F1 0F0 0BW0 0SEND_B0 0F1 0BW1 0SEND_B1",
    ]
    check_schedule(of(*lists, microbatches=2))
    # Rank 1 sends B1 first and posts F0's receive only after F1, whose message stands second in the channel.
    lists = [
        "0F0 0SEND_F0 0RECV_B0 0BW0 0F1 0SEND_F1 0RECV_B1 0BW1",
        "0RECV_F0 0RECV_F1 0F1 0BW1 0SEND_B1 0F0 0BW0 0SEND_B0",
    ]
    problems = faults(of(*lists, microbatches=2))
    assert any("B channel from rank 1 to rank 0 is not in one order" in text for text in problems)
    lists[0] = "0F0 0SEND_F0 0RECV_B1 0RECV_B0 0BW0 0F1 0SEND_F1 0BW1"
    assert faults(of(*lists, microbatches=2)) == [
        "0: deadlock: 0BW0 waits for the message of 0SEND_B0 of rank 1",
        "1: deadlock: 0F1 waits for the message of 0SEND_F1 of rank 0",
    ]


def test_vocabulary_passes_wait_for_every_rank() -> None:
    check_schedule(of("0F0 0S0 0BW0 0T0", "0F0 0S0 0T0 0BW0"))
    assert faults(of("0F0 0BW0 0S0 0T0", "0F0 0S0 0T0 0BW0")) == [
        "0: deadlock: 0BW0 waits for 0B0 of rank 1",
        "1: deadlock: 0T0 waits for S of microbatch 0 on every rank",
    ]


def test_every_problem_is_in_one_error_and_long_lists_are_cut() -> None:
    schedule = one_f_one_b(4, 8)
    with pytest.raises(ScheduleError) as caught:
        check_schedule(schedule.with_ranks([[], *schedule.ranks[1:3], []]))
    message = str(caught.value)
    assert message.startswith("1f1b: 32 problems:\n  rank 0: 0F0 is missing\n")
    assert "... and 20 more" in message


@pytest.mark.parametrize("breaks", [lambda actions: actions[:-1], lambda actions: actions[1:], lambda actions: ()])
def test_the_excerpt_marks_one_rank(breaks: Callable[[tuple[Action, ...]], tuple[Action, ...]]) -> None:
    schedule = one_f_one_b(8, 4)
    lists = [breaks(actions) if rank == 5 else actions for rank, actions in enumerate(schedule.ranks)]
    with pytest.raises(ScheduleError) as caught:
        check_schedule(schedule.with_ranks(lists))
    marked = [line for line in str(caught.value).splitlines() if line.endswith("<-- ERROR HERE")]
    assert len(marked) == 1
    assert marked[0].startswith("  rank  5 |")
    assert "rank  3 |" in str(caught.value)
    assert "rank  2 |" not in str(caught.value)


def test_the_memory_limit_is_that_of_the_simulator() -> None:
    for seed in range(30):
        schedule = random_schedule(seed)
        costs = random_costs(schedule.placement, seed)
        peak = max(price(schedule, costs).peak_activation)
        check_schedule(schedule, costs=costs, memory_limit=peak)
        with pytest.raises(InfeasibleError, match="exceeds the memory limit"):
            check_schedule(schedule, costs=costs, memory_limit=peak * 0.999)


def test_a_limit_without_costs_is_in_microbatches() -> None:
    check_schedule(one_f_one_b(4, 8), memory_limit=4)
    with pytest.raises(
        ScheduleError, match=r"rank 0: 0F3 exceeds the memory limit; the rank needs 4 .* the limit is 3"
    ):
        check_schedule(one_f_one_b(4, 8), memory_limit=3)


def test_fifths_of_an_activation_do_not_exceed_their_sum() -> None:
    """0.2 added fifteen times is 3.0000000000000004."""
    text = " ".join(f"{c}F{m}" for c in range(5) for m in range(3)) + " "
    text += " ".join(f"{c}BW{m}" for c in (4, 3, 2, 1, 0) for m in range(3))
    schedule = of(text, microbatches=3, chunks=5)
    assert price(schedule, Uniform()).peak_activation[0] > 3
    check_schedule(schedule, memory_limit=3)


def test_offloaded_memory_counts_as_long_as_the_copy_runs() -> None:
    schedule = of("0F0 0OFFLOAD0 0F1 0OFFLOAD1 0F2 0BW2 0RELOAD1 0BW1 0RELOAD0 0BW0", microbatches=3)
    check_schedule(schedule, costs=Uniform(offload=0), memory_limit=1)
    with pytest.raises(ScheduleError, match="needs 3 of activation memory, the limit is 2"):
        check_schedule(schedule, costs=Uniform(offload=10), memory_limit=2)


@pytest.mark.parametrize(
    ("text", "in_order"),
    [
        ("0F0 0F1 0BW0 0BW1", True),
        ("0F1 0F0 0BW0 0BW1", True),
        ("0F0 0F1 0BW1 0BW0", False),
        ("0F0 0F1 0B0 0B1 0W0 0W1", True),
        ("0F0 0F1 0B0 0B1 0W1 0W0", False),
        ("0F0 0F1 0B1 0B0 0W0 0W1", False),
        ("0F0 0F1 0B0 0BW1 0W0", False),
        ("0F0 0F1 0B0 0B1 0W0:0/2 0W1:0/2 0W0:1/2 0W1:1/2", True),
        ("0F0 0F1 0B0 0B1 0W0:0/2 0W1:1/2 0W0:1/2 0W1:0/2", False),
        ("0F0 0F1 0B0 0B1 0W0:0/3 0W1:0/4 0W0:1/3 0W1:1/4 0W0:2/3 0W1:2/4 0W1:3/4", True),
        ("0F0 0F1 0B0 0B1 0W0:0/3 0W1:0/2 0W0:1/3 0W0:2/3 0W1:1/2", False),
    ],
)
def test_order_of_accumulation(text: str, in_order: bool) -> None:
    schedule = of(text, microbatches=2)
    check_schedule(schedule)
    assert accumulates_in_order(schedule) is in_order


def test_chunks_accumulate_apart() -> None:
    assert accumulates_in_order(of("0F0 1F0 0F1 1F1 1BW0 1BW1 0BW0 0BW1", microbatches=2, chunks=2))


@pytest.mark.parametrize("seed", range(120))
def test_checker_and_simulator_agree_on_what_deadlocks(seed: int) -> None:
    """Two replays, written apart: with messages in another order, both go through or both stop."""
    rng = random.Random(seed)
    lists = [list(actions) for actions in add_communication(random_schedule(seed), lookahead=0).ranks]
    for _ in range(2):
        actions = rng.choice(lists)
        posts = [position for position, action in enumerate(actions) if action.kind.startswith("RECV")]
        if posts:
            first = rng.choice(posts)
            second = min(len(actions) - 1, first + rng.randint(1, 6))
            actions.insert(second, actions.pop(first))
    changed = random_schedule(seed).with_ranks(lists)
    try:
        simulate(changed, Uniform())
    except ScheduleError:
        assert find_problems(changed)
    else:
        # The simulator lets pass what nobody waits for: a receive after its use.
        assert all("deadlock" not in text for text in faults(changed))


def test_a_typing_mistake_in_a_file_does_not_fill_the_memory() -> None:
    text = one_f_one_b(2, 2).to_text().replace("microbatches: 2", "microbatches: 20000000000")
    assert faults(parse_schedule(text))[0] == "0: 4 actions are too few for 20000000000 pairs of chunk and microbatch"


def test_large_schedules_are_checked_in_seconds() -> None:
    schedule = one_f_one_b(64, 1600)
    begin = time.process_time()
    check_schedule(schedule, memory_limit=64)
    assert time.process_time() - begin < 8
