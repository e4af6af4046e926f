"""What the one loop costs: a step of stock 1F1B, run by megamem's loop and by Megatron's own function. Runs on a CPU.

Two gloo ranks hold one pipeline stage each of a real GPT. Both functions run the same model on the same data, in turns
within one process; a step is timed from barrier to barrier, and the ratio is taken pair by pair. Stock steps run with
Megatron's linear function put back, so that they pay for nothing of megamem's.

1. `steps`: sizes at which a forward pass of a stage takes about as long as on a GPU (some 10 ms). Target: a ratio of at
   most 1.02. `interleaved` is the same with two chunks per rank.
2. `overhead`: layers so small that Python is all there is. `added_microseconds` is the difference per microbatch, in
   processor time of a rank, under the CPU rig, which charges every torch call several microseconds.
"""

from __future__ import annotations

import contextlib
import cProfile
import dataclasses
import pstats
import time
from collections.abc import Iterator
from typing import Any

import common

from megamem.testing.dist import RankPool

SCHEDULES = {"1f1b": {}, "interleaved": {"vpp": 2}}


@contextlib.contextmanager
def unpatched_linears() -> Iterator[None]:
    """Megatron's own autograd function of linear layers, while the block runs."""
    from megatron.core.tensor_parallel import layers

    patched = layers.LinearWithGradAccumulationAndAsyncCommunication
    layers.LinearWithGradAccumulationAndAsyncCommunication = patched.__mro__[1]
    try:
        yield
    finally:
        layers.LinearWithGradAccumulationAndAsyncCommunication = patched


def measure(schedule: str, fields: dict[str, Any], num_microbatches: int, rounds: int, profile: int) -> dict[str, Any]:
    """On every rank: seconds of each step, wall and processor, by contender."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    import megamem
    from megamem.testing.models import GptCase, batches, forward_step, init_parallel
    from megamem.testing.pipeline import PipelineCase, build_pipeline

    parallel_state.destroy_model_parallel()
    gpt = GptCase(pp=2, **fields)
    init_parallel(gpt)
    chunks = build_pipeline(PipelineCase(gpt=gpt))
    stock = get_forward_backward_func()
    data = batches(gpt, num_microbatches)

    def step(function: Any) -> None:
        for chunk in chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        function(
            forward_step_func=forward_step,
            data_iterator=[iter(data) for _ in chunks] if len(chunks) > 1 else iter(data),
            model=chunks,
            num_microbatches=num_microbatches,
            seq_length=gpt.sequence,
            micro_batch_size=gpt.microbatch,
            decoder_seq_length=gpt.sequence,
        )

    def timed(function: Any) -> common.Json:
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        step(function)
        cpu = time.process_time() - cpu
        dist.barrier()
        return {"wall": time.perf_counter() - wall, "cpu": cpu}

    def timed_stock() -> common.Json:
        with unpatched_linears():
            return timed(stock)

    with megamem.enable({"schedule": {"name": schedule}}):
        ours = get_forward_backward_func()
        for _ in range(2):  # connections, the plan, the allocator
            timed_stock()
            timed(ours)
        found = common.interleaved({"stock": timed_stock, "ours": lambda: timed(ours)}, rounds)
        if profile and dist.get_rank() == 0:
            profiler = cProfile.Profile()
        for _ in range(3 if profile else 0):
            if dist.get_rank() == 0:
                profiler.runcall(step, ours)
            else:
                step(ours)
        if profile and dist.get_rank() == 0:
            pstats.Stats(profiler).sort_stats("tottime").print_stats(profile)
    return {name: {key: [one[key] for one in each] for key in ("wall", "cpu")} for name, each in found.items()}


def summarise(by_rank: list[dict[str, Any]], num_microbatches: int) -> common.Json:
    """Rank 0's wall times and their ratio; the processor time that was added, mean of the ranks."""
    first = by_rank[0]
    ours, stock = (
        [sum(rank[name]["cpu"][index] for rank in by_rank) for index in range(len(first[name]["cpu"]))]
        for name in ("ours", "stock")
    )
    passes = len(by_rank) * num_microbatches
    return {
        "stock_ms": common.summary(1e3 * value for value in first["stock"]["wall"]),
        "ours_ms": common.summary(1e3 * value for value in first["ours"]["wall"]),
        "ratio": common.ratios(first["ours"]["wall"], first["stock"]["wall"]),
        "ratio_cpu_time": common.ratios(ours, stock),
        "added_microseconds": common.summary(1e6 * (a - b) / passes for a, b in zip(ours, stock, strict=True)),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A model, and how often it is measured."""

    fields: dict[str, Any]
    num_microbatches: int
    rounds: int


TOY = Size(fields={"layers": 4, "hidden": 16, "heads": 2, "sequence": 8, "microbatch": 1}, num_microbatches=4, rounds=2)
STEP = Size(
    fields={"layers": 4, "hidden": 256, "heads": 4, "sequence": 256, "microbatch": 1, "vocab": 512},
    num_microbatches=8,
    rounds=15,
)
SMALL = dataclasses.replace(TOY, num_microbatches=8, rounds=30)


def main() -> None:
    parser = common.argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, help="of each pair of steps; default 15 and 30")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N costliest functions of rank 0")
    arguments = parser.parse_args()
    results: common.Json = {}
    with RankPool(2, timeout=900) as pool:
        for part, size in (("steps", STEP), ("overhead", SMALL)):
            size = TOY if arguments.quick else size
            results[part] = {}
            for name, fields in SCHEDULES.items():
                rounds = arguments.rounds or size.rounds
                case = {**size.fields, **fields}
                by_rank = pool.run(measure, name, case, size.num_microbatches, rounds, arguments.profile)
                results[part][name] = summarise(by_rank, size.num_microbatches)
    for part, found in results.items():
        common.print_table(
            f"{part}: a step by our loop against Megatron's own",
            ("schedule", "stock ms", "ours ms", "ratio", "q1", "q3", "CPU ratio", "added us"),
            [
                (
                    name,
                    *(f"{one[key]['median']:.2f}" for key in ("stock_ms", "ours_ms")),
                    *(f"{one['ratio'][key]:.4f}" for key in ("median", "q1", "q3")),
                    f"{one['ratio_cpu_time']['median']:.4f}",
                    f"{one['added_microseconds']['median']:.0f}",
                )
                for name, one in found.items()
            ],
        )
    common.write(arguments.out, "pipeline_loop", arguments, results)


if __name__ == "__main__":
    main()
