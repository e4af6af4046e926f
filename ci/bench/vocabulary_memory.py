"""Device memory of the output layer with its loss, beside hidden states and weight. Traced; exact; runs on a CPU.

    python ci/bench/vocabulary_memory.py --out ci/bench/results/vocabulary_memory.cpu.json

One microbatch of 8192 tokens, h = 4096, V = 128256 (Llama 3), bf16, forward and backward. Every operator runs on meta
tensors, which have shapes and storages but no data, on the path that a GPU takes (Triton's row operations), and the
storages that are alive are counted (`megamem.testing.live.LiveStorages`). What an operator holds inside itself is not
seen; cuBLAS's workspace is such a thing.

    Megatron       F.linear and vocab_parallel_cross_entropy of Megatron-Core, its collectives left out (a group of one)
    torch          F.linear, F.cross_entropy of fp32 logits
    fused          vocabulary.fused_loss
    parallel       vocabulary.parallel: S and T of one rank in the middle of the pipeline; what runs beside the
                   computation is taken to have ended when T begins

`peak` is the most that is alive at once; `kept` what is alive between forward and backward pass, S and T; `largest` the
largest tensor, as a share of tokens x vocabulary. Megatron and torch return a weight gradient in bf16, which is in
their peak; the others add it to main_grad, as training with Megatron's DDP does, which is not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any
from unittest import mock

import common
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megamem.ir.schedule import Action
from megamem.ir.vocabulary import shard_vocabulary
from megamem.kernels.linear_cross_entropy import LossOptions, linear_cross_entropy
from megamem.runtime.vocabulary.layout import AbstractEnds, AbstractShards, Layout
from megamem.runtime.vocabulary.passes import SharedVocabulary
from megamem.testing.live import LargestStorage, LiveStorages

TOKENS, HIDDEN, VOCABULARY = 8192, 4096, 128256
TOY = (256, 64, 4000)
RANKS = (4, 8, 16)
LIMIT = 0.3 * 2**30  # bytes of the fused loss
DEVICE = torch.device("meta")


def operand(*shape: int) -> torch.nn.Parameter:
    """A parameter in bf16 with an fp32 main_grad, as Megatron's DDP makes them."""
    weight = torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device=DEVICE))
    weight.main_grad = torch.empty(shape, dtype=torch.float32, device=DEVICE)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    return weight


def traced(
    forward: Callable[[], Any], backward: Callable[[Any], None], ignored: list[Tensor], logits: int
) -> common.Json:
    """The figures of a forward and a backward pass."""
    with LiveStorages() as live, LargestStorage() as largest:
        live.ignore(ignored)
        made = forward()
        kept = live.live_bytes()
        backward(made)
        return {
            "peak_bytes": live.peak_bytes, "kept_bytes": kept,
            "largest": largest.elements / logits, "largest_is": largest.where,
        }  # fmt: skip


def whole(shape: tuple[int, int, int]) -> dict[str, common.Json]:
    """Those that have the whole output layer on one rank."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    tokens, size, vocabulary = shape
    labels = torch.empty(tokens, dtype=torch.int64, device=DEVICE)

    def megatron(hidden: Tensor, weight: Tensor) -> Tensor:
        loss: Tensor = vocab_parallel_cross_entropy(F.linear(hidden, weight).unsqueeze(1), labels.unsqueeze(1)).mean()
        return loss

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        options = LossOptions(vocab_size=vocabulary)
        return linear_cross_entropy(hidden, weight, labels, options, into_main_grad=True, backend="triton").loss.mean()

    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "torch": lambda hidden, weight: F.cross_entropy(F.linear(hidden, weight).float(), labels),
        "Megatron": megatron,
        "fused": fused,
    }
    found = {}
    for name, loss in losses.items():
        weight: Any = operand(vocabulary, size)
        hidden = torch.empty(tokens, size, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        with mock.patch.object(dist, "all_reduce", lambda *args, **kwargs: None):
            found[name] = traced(
                lambda loss=loss, hidden=hidden, weight=weight: loss(hidden, weight),  # type: ignore[misc]
                lambda value: value.backward(),
                [hidden, weight, weight.main_grad, labels],
                tokens * vocabulary,
            )
    return found


class OneRank:
    """In place of `Connections`: what other ranks send is there at once, and their part of a sum is nothing."""

    size = 1

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def lane(self, kind: str) -> OneRank:
        return self

    def group(self, kind: str) -> OneRank:
        return self

    def post(self, function: Callable[[], Any]) -> Any:
        with torch.no_grad():
            value = function()
        return mock.Mock(wait=lambda: value)

    def broadcast(self, kind: Any, tensor: Any, source: int | None = None) -> Any:
        return mock.Mock(wait=lambda: tensor)

    def reduce(self, *arguments: Any) -> Any:
        tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
        return mock.Mock(wait=lambda: tensor)

    def gather(self, part: Tensor) -> Tensor:
        return part.new_empty(self.ranks, *part.shape)

    def drop_finished(self) -> None:
        pass


class Rows(AbstractShards):
    def __init__(self, vocabulary: int, size: int, ranks: int) -> None:
        self.words = shard_vocabulary(vocabulary, ranks)[1]
        self.weight = operand(self.words.num_words, size)

    def input_weight(self) -> torch.nn.Parameter:
        return self.weight

    output_weight = input_weight


def shared(shape: tuple[int, int, int], ranks: int, barriers: Any, keeps_logits: bool) -> common.Json:
    """S and T of a rank in the middle of the pipeline."""
    tokens, size, vocabulary = shape
    rows, tensor_group = Rows(vocabulary, size, ranks), mock.Mock(size=lambda: 1)
    layout = Layout(
        num_ranks=ranks, rank=1, first=0, last=ranks - 1, tensor_group=tensor_group, sequence_parallel=False,
        scatters_embedding=False, tokens=(1, tokens), hidden=(tokens, 1, size), dtype=torch.bfloat16, device=DEVICE,
    )  # fmt: skip
    passes = SharedVocabulary(
        layout, rows, mock.create_autospec(AbstractEnds), OneRank(ranks), LossOptions(vocab_size=vocabulary),  # type: ignore[arg-type]
        barriers=barriers, chunk=None, keeps_logits=keeps_logits, order=[0], trains=True, checks=False,
    )  # fmt: skip

    def run(kind: Any) -> None:
        action = Action(kind, 0, 0)
        passes.expect(action)
        passes.receive(action)
        passes.run(action)

    return traced(
        lambda: run("S"),
        lambda _: run("T"),
        [rows.weight, rows.weight.main_grad],  # type: ignore[attr-defined]
        tokens * vocabulary,
    )


def measure(shape: tuple[int, int, int]) -> common.Json:
    """Every row."""
    rows: common.Json = {}
    with mock.patch("megamem.kernels.linear_cross_entropy.backends.takes_triton", lambda backend, device: True):
        for name, figures in whole(shape).items():
            rows[name] = figures
        for ranks in RANKS:
            for barriers in (1, 2):
                for keeps in (False, True):
                    name = f"parallel, {ranks} ranks, {barriers} barrier{'s' * (barriers > 1)}{', logits kept' * keeps}"
                    rows[name] = shared(shape, ranks, barriers, keeps)
    return rows


def targets(rows: common.Json, is_real: bool) -> list[common.Json]:
    """What was asked for where no logits are kept."""
    ours = {name: row for name, row in rows.items() if name == "fused" or name.startswith("parallel")}
    made_again = {name: row for name, row in ours.items() if "kept" not in name}
    quarter = {name: row["largest"] for name, row in made_again.items() if row["largest"] >= 0.25}
    found = [{"what": "no tensor of a quarter of tokens x vocabulary", "met": not quarter, "exceptions": quarter}]
    if is_real:
        over = {name: row["peak_bytes"] for name, row in made_again.items() if row["peak_bytes"] > LIMIT}
        found.append({"what": "at most 0.3 GiB", "met": not over, "exceptions": over})
    return found


def main() -> None:
    parser = common.argument_parser(__doc__ or "")
    args: argparse.Namespace = parser.parse_args()
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    parallel_state.initialize_model_parallel()
    shape = TOY if args.quick else (TOKENS, HIDDEN, VOCABULARY)
    rows = measure(shape)
    common.print_table(
        f"{shape[0]} tokens, hidden {shape[1]}, vocabulary {shape[2]}, bf16: MiB",
        ("", "peak", "kept", "largest / (tokens x vocabulary)"),
        (
            (name, common.mib(row["peak_bytes"]), common.mib(row["kept_bytes"]), f"{row['largest']:.3f}")
            for name, row in rows.items()
        ),
    )
    judged = targets(rows, not args.quick)
    for target in judged:
        print(f"  {'met' if target['met'] else 'MISSED'}: {target['what']}")
    results = {"tokens": shape[0], "hidden": shape[1], "vocabulary": shape[2], "rows": rows, "targets": judged}
    common.write(args.out, "vocabulary_memory", args, results)


if __name__ == "__main__":
    main()
