"""The vocabulary passes of one rank without Megatron, on a CPU and on a GPU, while their collectives are slow.

Collectives run beside the computation: on threads, and on streams where there is a GPU. Who does not wait for one reads
what is not there yet, and who gives memory back too early has it overwritten; so each is held up, before and after.
One rank alone does what many do, its collectives included (gloo or NCCL, with one member).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain
from typing import Any
from unittest import mock

import pytest

torch = pytest.importorskip("torch", reason="pip install 'megamem[train]'")
F = torch.nn.functional

from megamem.ir.schedule import Action  # noqa: E402
from megamem.ir.vocabulary import VocabShard  # noqa: E402
from megamem.kernels.linear_cross_entropy import LossOptions, linear_cross_entropy_reference  # noqa: E402
from megamem.runtime.pipeline import lanes  # noqa: E402
from megamem.runtime.vocabulary.connections import Connections  # noqa: E402
from megamem.runtime.vocabulary.layout import AbstractEnds, AbstractShards, Layout  # noqa: E402
from megamem.runtime.vocabulary.passes import SharedVocabulary  # noqa: E402

WORDS, BATCH, LENGTH, SIZE, STEPS = 97, 2, 8, 16, 3
# Two microbatches are between S and T at a time.
ORDER = "IF0 F0 S0 IF1 F1 S1 T0 B0 IB0 IF2 F2 S2 T1 B1 IB1 T2 B2 IB2"


class OneRank:
    """A tensor-parallel group of one."""

    def size(self) -> int:
        return 1


class Rows(AbstractShards):
    """The whole of both weights, which are one if `tied`."""

    def __init__(self, device: Any, tied: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        first, last = (torch.nn.Parameter(torch.randn(WORDS, SIZE, generator=generator).to(device)) for _ in range(2))
        self.words = VocabShard(first_row=0, start=0, stop=WORDS)
        self.weights = (first, first if tied else last)

    def input_weight(self) -> Any:
        return self.weights[0]

    def output_weight(self) -> Any:
        return self.weights[1]


class Trainer(AbstractEnds):
    """Random tokens and labels; the loss is weighted differently for each token."""

    def __init__(self, device: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = STEPS, BATCH, LENGTH
        self.inputs, self.targets = (torch.randint(WORDS, shape, generator=generator).to(device) for _ in range(2))
        self.factors = torch.rand(shape, generator=generator).to(device)
        self.seen: dict[int, Any] = {}

    def tokens(self, microbatch: int) -> Any:
        return self.inputs[microbatch]

    def labels(self, microbatch: int) -> Any:
        return self.targets[microbatch], self.factors[microbatch]

    def losses(self, microbatch: int, losses: Any) -> None:
        self.seen[microbatch] = losses


def slow(monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    """Hold up every collective, on its own stream or thread."""

    def hold() -> None:
        if device.type == "cuda":
            torch.cuda._sleep(20_000_000)  # some 10 ms
        else:
            time.sleep(0.01)

    for name in ("broadcast", "reduce", "gather"):
        original = getattr(lanes.Communicator, name)

        def held(self: Any, *args: Any, original: Any = original) -> Any:
            hold()
            result = original(self, *args)
            hold()
            return result

        monkeypatch.setattr(lanes.Communicator, name, held)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def connections(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Connections]]:
    kind = request.param
    device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    opened = Connections([0], 0, [0], 0, device, torch.distributed.HashStore(), 0, lambda: None)
    yield device, opened
    opened.close()


def passes_of(device: Any, opened: Connections, shards: Rows, trainer: Trainer, **options: Any) -> SharedVocabulary:
    """The passes of a training step."""
    layout = Layout(
        num_ranks=1, rank=0, first=0, last=0, tensor_group=OneRank(), sequence_parallel=False,
        scatters_embedding=False, tokens=(BATCH, LENGTH), hidden=(LENGTH, BATCH, SIZE), dtype=torch.float32,
        device=device,
    )  # fmt: skip
    options = {"barriers": 1, "keeps_logits": False, "order": range(STEPS), **options}
    loss = LossOptions(vocab_size=WORDS)
    return SharedVocabulary(layout, shards, trainer, opened, loss, chunk=20, trains=True, checks=True, **options)


def run(passes: SharedVocabulary, kind: Any, microbatch: int) -> None:
    """A pass, as the loop runs it."""
    action = Action(kind, 0, microbatch)
    passes.expect(action)
    passes.receive(action)
    passes.run(action)


def train(device: Any, opened: Connections, tied: bool, **options: Any) -> tuple[list[Any], list[Any]]:
    """Losses by microbatch, and the gradients of both weights; a matrix stands for the layers in between."""
    shards, trainer = Rows(device, tied), Trainer(device)
    passes = passes_of(device, opened, shards, trainer, **options)
    layers = torch.eye(SIZE, device=device) * 0.5
    embeddings: dict[int, Any] = {}
    hiddens: dict[int, Any] = {}
    for text in ORDER.split():
        kind, microbatch = text.rstrip("012"), int(text[-1])
        if kind == "F":
            embeddings[microbatch] = passes.take("F", microbatch).clone().requires_grad_()
            hiddens[microbatch] = embeddings[microbatch].transpose(0, 1) @ layers
            passes.give("F", microbatch, hiddens[microbatch])
        elif kind == "B":
            hiddens.pop(microbatch).backward(passes.take("B", microbatch))
            passes.give("B", microbatch, embeddings.pop(microbatch).grad)
        else:
            run(passes, kind, microbatch)
        torch.full((1 << 12,), float("nan"), device=device)  # into memory that was given back
    passes.finish()
    return [trainer.seen[index] for index in range(STEPS)], [weight.grad for weight in shards.weights]


def expected(device: Any, tied: bool) -> tuple[list[Any], list[Any]]:
    """The same by autograd, from the definition in fp64."""
    trainer = Trainer(device)
    first, last = (weight.detach().double().requires_grad_() for weight in Rows(device, tied).weights)
    last = first if tied else last
    losses = []
    for index in range(STEPS):
        hidden = F.embedding(trainer.inputs[index], first) * 0.5
        loss = linear_cross_entropy_reference(hidden, last, trainer.targets[index], LossOptions(vocab_size=WORDS)).loss
        (loss * trainer.factors[index]).sum().backward()
        losses.append(loss.detach())
    return losses, [first.grad, last.grad]


@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.parametrize(("tied", "keeps_logits"), [(False, False), (True, True)], ids=["", "tied, logits kept"])
def test_nobody_reads_what_a_slow_collective_has_not_brought(
    connections: tuple[Any, Connections], monkeypatch: pytest.MonkeyPatch, barriers: int, tied: bool, keeps_logits: bool
) -> None:
    device, opened = connections
    options = {"barriers": barriers, "keeps_logits": keeps_logits}
    at_once = train(device, opened, tied, **options)
    slow(monkeypatch, device)
    later = train(device, opened, tied, **options)
    for quick, held, right in zip(*map(chain.from_iterable, (at_once, later, expected(device, tied))), strict=True):
        assert torch.equal(quick, held)  # the same order of sums, whoever waits for whom
        assert (quick.double() - right).abs().max() < 3e-6 * right.abs().max()


def test_tokens_of_other_ranks_are_spread_over_the_rows(connections: tuple[Any, Connections]) -> None:
    """They add zeros; all of them in one row would be added one after the other."""
    device, opened = connections
    shards, trainer = Rows(device, False), Trainer(device)
    shards.words = VocabShard(first_row=0, start=0, stop=10)
    own = shards.weights[0].detach()[:10].clone().requires_grad_()
    shards.weights = (own, shards.weights[1])
    trainer.inputs.fill_(50)  # no word of this rank
    passes = passes_of(device, opened, shards, trainer, order=range(1))
    run(passes, "IF", 0)
    assert not passes.take("F", 0).any()
    passes.give("B", 0, torch.ones(BATCH, LENGTH, SIZE, device=device))
    original, seen = torch.Tensor.index_put_, []

    def index_put_(self: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
        seen.append(indices[0])
        return original(self, indices, values, accumulate)

    with mock.patch.object(torch.Tensor, "index_put_", index_put_):
        run(passes, "IB", 0)
    passes.finish()
    (places,) = seen
    assert places.bincount(minlength=10).max() == 2  # 16 tokens over 10 rows
    assert not own.grad.any()
