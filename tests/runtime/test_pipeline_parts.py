"""The parts of the runtime alone: the order of messages of unknown shape, the queue of weight gradients, the notice."""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pip install 'megamem[train]'")

from megamem.errors import ScheduleError  # noqa: E402 - torch first, to skip without it
from megamem.ir.schedule import Channel, Placement  # noqa: E402
from megamem.runtime.pipeline.failure import FailureNotice  # noqa: E402
from megamem.runtime.pipeline.links import channels_of  # noqa: E402
from megamem.runtime.pipeline.mailbox import Format, Mailbox  # noqa: E402
from megamem.runtime.pipeline.weights import WeightQueue, WeightTask  # noqa: E402


class Pipe:
    """A transport in one process: the n-th receive on a channel gets the n-th send. Waiting out of turn is an error."""

    def __init__(self) -> None:
        self.lines: dict[Channel, tuple[deque[Any], deque[Any]]] = {}

    def send(self, channel: Channel, tensor: Any) -> Transfer:
        return self._post(channel, 0, tensor)

    def receive(self, channel: Channel, tensor: Any) -> Transfer:
        return self._post(channel, 1, tensor)

    def _post(self, channel: Channel, side: int, tensor: Any) -> Transfer:
        line = self.lines.setdefault(channel, (deque(), deque()))
        transfer = Transfer()
        line[side].append((tensor, transfer))
        while line[0] and line[1]:
            (sent, one), (buffer, other) = line[0].popleft(), line[1].popleft()
            buffer.copy_(sent)  # an error where the shapes do not fit
            one.done = other.done = True
        return transfer


class Transfer:
    """The handle of one transfer of a `Pipe`."""

    done = False

    def wait(self) -> None:
        assert self.done, "this would block for ever"

    def is_completed(self) -> bool:
        return self.done


PLACEMENT = Placement(shape="round-robin", num_ranks=2, num_chunks=2)
V = Placement(shape="v", num_ranks=2, num_chunks=2)


def mailboxes(placement: Placement, shape: tuple[int, ...] | None) -> list[Mailbox]:
    pipe = Pipe()
    formats: Any = dict.fromkeys("FB", Format(shape=shape, dtype=torch.float32, device=torch.device("cpu")))
    return [Mailbox(pipe, placement, rank, formats) for rank in range(placement.num_ranks)]


def test_channels_of_a_ring_and_of_a_v() -> None:
    ring = {Channel("F", 0, 1), Channel("F", 1, 0), Channel("B", 0, 1), Channel("B", 1, 0)}
    assert channels_of(PLACEMENT) == ring
    assert channels_of(V) == ring
    assert channels_of(Placement(shape="round-robin", num_ranks=3, num_chunks=1)) == {
        Channel("F", 0, 1), Channel("F", 1, 2), Channel("B", 1, 0), Channel("B", 2, 1),
    }  # fmt: skip


def test_messages_of_unknown_shape_are_received_in_the_channels_order_whoever_needs_them_first() -> None:
    sender, receiver = mailboxes(PLACEMENT, None)
    lengths = {(0, 0): 3, (0, 1): 5, (1, 0): 2}
    for chunk, microbatch in lengths:
        receiver.post("F", chunk, microbatch)
    for (chunk, microbatch), length in lengths.items():
        sender.send("F", chunk, microbatch, torch.full((length, 1, 4), float(length)))
    for chunk, microbatch in ((1, 0), (0, 0), (0, 1)):
        received = receiver.take("F", chunk, microbatch)
        assert received is not None and received.shape == (lengths[chunk, microbatch], 1, 4)
        assert (received == lengths[chunk, microbatch]).all()
    sender.finish()
    assert sender.held == receiver.held == []


def test_a_send_is_kept_until_its_gradient_is_back() -> None:
    sender, receiver = mailboxes(PLACEMENT, (2, 1, 4))
    output = torch.ones(2, 1, 4)
    sender.send("F", 0, 0, output)
    output.data = torch.empty(1)  # as Megatron's deallocate_output_tensor does
    assert [tensor.shape for tensor in sender.held] == [(2, 1, 4)]
    receiver.post("F", 0, 0)
    sender.post("B", 0, 0)
    assert receiver.take("F", 0, 0).sum() == 8
    receiver.send("B", 0, 0, torch.zeros(2, 1, 4))
    sender.take("B", 0, 0)
    assert sender.held == []


def test_where_a_v_turns_there_is_no_message() -> None:
    _, turn = mailboxes(V, (2, 1, 4))
    assert turn.way("F", 0) == "here" and turn.way("B", 1) == "here" and turn.way("F", 1) == "away"
    made = torch.ones(2, 1, 4, requires_grad=True) * 2
    turn.hand_over("F", 0, 3, made)
    taken = turn.take("F", 1, 3)
    assert taken is not None and taken.data_ptr() == made.data_ptr() and not taken.requires_grad


def test_there_is_nothing_before_the_first_stage_and_behind_the_last() -> None:
    first, last = mailboxes(PLACEMENT, (2, 1, 4))
    assert first.take("F", 0, 0) is None and last.take("B", 1, 0) is None
    assert first.way("B", 0) == last.way("F", 1) == "nowhere"
    with pytest.raises(ScheduleError, match="1SEND_F0: there is no stage to send to"):
        last.send("F", 1, 0, torch.ones(1))
    with pytest.raises(ScheduleError, match="0RECV_F0: there is no stage to receive from"):
        first.post("F", 0, 0)


def fill(queue: WeightQueue, key: tuple[int, int], parameters: list[Any], log: list[str]) -> None:
    queue.collect(*key)
    tasks = queue.current
    assert tasks is not None
    queue.stop()
    for index, parameter in enumerate(parameters):

        def gradient(index: int = index, parameter: Any = parameter) -> Any:
            log.append(f"compute {index}")
            return torch.full_like(parameter, 2.0**index)

        queue.put(tasks, WeightTask(parameter=parameter, gradient=gradient, kept=(torch.ones(3),)))


def test_weight_gradients_come_layer_by_layer_through_their_parameters_hooks() -> None:
    queue, log = WeightQueue(), []
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for index, parameter in enumerate(parameters):
        parameter.register_post_accumulate_grad_hook(lambda _, index=index: log.append(f"accumulated {index}"))
    fill(queue, (0, 1), parameters, log)
    assert queue.waiting == [(0, 1)] and len(queue.held) == 3
    queue.run(0, 1)
    assert log == [f"{what} {index}" for index in range(3) for what in ("compute", "accumulated")]
    assert [float(parameter.grad[0]) for parameter in parameters] == [1.0, 2.0, 4.0]
    assert queue.waiting == [] and queue.held == []


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_divide_the_layers_and_are_the_whole(parts: int) -> None:
    queue, log = WeightQueue(), []
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    fill(queue, (0, 0), parameters, log)
    done = []
    for part in range(parts):
        queue.run(0, 0, part, parts)
        done.append(len(log))
    assert log == [f"compute {index}" for index in range(4)]
    assert max(b - a for a, b in itertools.pairwise([0, *done])) <= -(-4 // parts)
    assert queue.waiting == []


def test_a_parameter_that_is_used_twice_is_accumulated_once() -> None:
    queue, log = WeightQueue(), []
    shared, other = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    shared.register_post_accumulate_grad_hook(lambda _: log.append("accumulated"))
    fill(queue, (0, 0), [shared, other, shared], log)
    queue.run(0, 0)
    assert log == ["compute 0", "compute 2", "accumulated", "compute 1"]
    assert float(shared.grad[0]) == 5.0


def test_weight_gradients_of_a_failed_step_are_forgotten() -> None:
    queue = WeightQueue()
    fill(queue, (0, 0), [torch.nn.Parameter(torch.zeros(2))], [])
    queue.clear()
    assert queue.waiting == [] and queue.held == [] and queue.current is None


def test_the_first_failure_is_the_one_that_everybody_hears_of() -> None:
    store = torch.distributed.HashStore()
    woken: list[int] = []
    ranks = [FailureNotice(store, lambda rank=rank: woken.append(rank)) for rank in range(2)]
    assert ranks[0].begin() is None and ranks[1].begin() is None
    assert ranks[0].publish("rank 0 failed") == "rank 0 failed"
    assert ranks[1].publish("rank 1 lost its connection") == "rank 0 failed"
    ranks[0].end()
    ranks[0].next_epoch()
    assert ranks[0].begin() is None  # it has raised, and goes on
    late = FailureNotice(store, lambda: None)
    assert late.begin() == "rank 0 failed"  # it had not begun that step
    for notice in (*ranks, late):
        notice.close()


def test_the_thread_finds_a_failure_that_no_connection_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from megamem.runtime.pipeline import failure

    monkeypatch.setattr(failure, "_INTERVAL_S", 0.01)
    store, woken = torch.distributed.HashStore(), threading.Event()
    watching, failing = FailureNotice(store, woken.set), FailureNotice(store, lambda: None)
    watching.begin()
    failing.publish("rank 1 failed in 0B2")
    assert woken.wait(5)
    assert watching.found == "rank 1 failed in 0B2"
    watching.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "megamem-failure-notice"]
