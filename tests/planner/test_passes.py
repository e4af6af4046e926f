"""What the passes put in and take out, and that nothing else changes."""

import pytest
from random_schedules import one_f_one_b, random_schedule, schedule_of

from megamem.errors import ScheduleError
from megamem.ir.schedule import Action, Schedule, order_text
from megamem.ir.workload import Uniform
from megamem.planner.schedules.checker import check_schedule
from megamem.planner.schedules.passes import (
    Channel,
    add_communication,
    forward_only,
    merge_backward,
    receive_buffers,
    strip_communication,
)
from megamem.planner.schedules.simulator import price


def of(*texts: str, microbatches: int, chunks: int = 1, shape: str = "round-robin") -> Schedule:
    """A schedule from the text of its ranks."""
    return schedule_of(
        [tuple(map(Action.parse, text.split())) for text in texts], microbatches, chunks=chunks, shape=shape
    )


def texts(schedule: Schedule) -> list[str]:
    return [order_text(actions) for actions in schedule.ranks]


def test_the_messages_of_two_ranks() -> None:
    schedule = of("0F0 0F1 0B0 0W0 0BW1", "0F0 0B0 0F1 0W0 0BW1", microbatches=2)
    assert texts(add_communication(schedule, lookahead=0)) == [
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0W0 0RECV_B1 0BW1",
        "0RECV_F0 0F0 0B0 0SEND_B0 0RECV_F1 0F1 0W0 0BW1 0SEND_B1",
    ]
    assert texts(add_communication(schedule)) == [
        "0F0 0SEND_F0 0RECV_B0 0F1 0SEND_F1 0B0 0RECV_B1 0W0 0BW1",
        "0RECV_F0 0F0 0RECV_F1 0B0 0SEND_B0 0F1 0W0 0BW1 0SEND_B1",
    ]


def test_a_receiver_with_another_order_posts_in_the_order_of_the_sender() -> None:
    schedule = of("0F0 0F1 0BW1 0BW0", "0F1 0BW1 0F0 0BW0", microbatches=2)
    assert texts(add_communication(schedule, lookahead=0))[1] == (
        "0RECV_F0 0RECV_F1 0F1 0BW1 0SEND_B1 0F0 0BW0 0SEND_B0"
    )
    assert receive_buffers(add_communication(schedule, lookahead=0))[1] == {Channel("F", 0, 1): 2}


def test_no_messages_inside_a_rank() -> None:
    """The turning point and both ends of a V are on one rank."""
    schedule = of("0F0 1F0 1BW0 0BW0", microbatches=1, chunks=2, shape="v")
    assert add_communication(schedule) == schedule
    assert receive_buffers(schedule) == ({},)


def test_sends_stand_before_an_offload_that_follows() -> None:
    schedule = of("0F0 0OFFLOAD0 0RELOAD0 0BW0", "0F0 0BW0", microbatches=1)
    assert texts(add_communication(schedule, lookahead=0))[0] == ("0F0 0SEND_F0 0OFFLOAD0 0RELOAD0 0RECV_B0 0BW0")


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("lookahead", [0, 1, 5])
def test_random_schedules_stay_valid_and_lose_no_time(seed: int, lookahead: int) -> None:
    schedule = random_schedule(seed)
    posted = add_communication(schedule, lookahead)
    check_schedule(posted)
    assert strip_communication(posted) == schedule
    assert add_communication(posted, lookahead) == posted
    free = Uniform(comm=0)
    assert price(posted, free).peak_activation == price(schedule, free).peak_activation
    if lookahead == 0:
        assert all(count >= 1 for channels in receive_buffers(posted) for count in channels.values())
    if lookahead == 5:
        # Whatever is posted early enough arrives as if it had never been posted at all.
        everything = add_communication(schedule, lookahead=10_000)
        costs = Uniform(comm=0.7)
        assert price(everything, costs).makespan == pytest.approx(price(schedule, costs).makespan)


def test_lookahead_costs_buffers() -> None:
    schedule = one_f_one_b(4, 8)
    counts = [sum(receive_buffers(add_communication(schedule, ahead))[1].values()) for ahead in (0, 1, 100)]
    assert counts == [2, 4, 16]


def test_impossible_messages_are_named() -> None:
    with pytest.raises(ScheduleError, match="0F1 is made 1 times and needed 0 times"):
        add_communication(of("0F0 0F1", "0F0", microbatches=2))
    with pytest.raises(ScheduleError, match="0F1 is made 0 times and needed 1 times"):
        add_communication(of("0F0", "0F0 0F1", microbatches=2))
    with pytest.raises(ScheduleError, match="lookahead is -1"):
        add_communication(one_f_one_b(2, 2), lookahead=-1)
    with pytest.raises(ScheduleError, match="rank 1 runs 0F0 before the receive"):
        receive_buffers(of("0F0 0SEND_F0", "0F0 0RECV_F0", microbatches=1))


def test_forward_only_keeps_the_forwards_and_can_be_posted_again() -> None:
    schedule = forward_only(add_communication(random_schedule(3)))
    assert {action.kind for _, action in schedule} == {"F"}
    price(add_communication(schedule), Uniform())
    assert texts(add_communication(forward_only(one_f_one_b(2, 2)), lookahead=0)) == [
        "0F0 0SEND_F0 0F1 0SEND_F1",
        "0RECV_F0 0F0 0RECV_F1 0F1",
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("0F0 0F1 0B0 0W0 0B1 0W1", "0F0 0F1 0BW0 0BW1"),
        ("0F0 0F1 0B0 0B1 0W0 0W1", "0F0 0F1 0B0 0B1 0W0 0W1"),
        ("0F0 0F1 0B0 0B1 0W1 0W0", "0F0 0F1 0B0 0BW1 0W0"),
        ("0F0 0F1 0B0 0W0:1/2 0W0:0/2 0B1 0W1:0/2 0W1:1/2", "0F0 0F1 0BW0 0BW1"),
        ("0F0 0B0 0W0:0/2 0F1 0W0:1/2 0BW1", "0F0 0B0 0W0:0/2 0F1 0W0:1/2 0BW1"),
        ("0F0 0F1 0B0 0B1 0W0:0/2 0W0:1/2 0W1", "0F0 0F1 0B0 0B1 0W0:0/2 0W0:1/2 0W1"),
    ],
)
def test_merge_backward(before: str, after: str) -> None:
    merged = merge_backward(of(before, microbatches=2))
    check_schedule(merged)
    assert texts(merged) == [after]
