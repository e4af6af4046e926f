"""Small random problems, the published ones, and the least peak by trying all offsets."""

import random
from pathlib import Path

import pytest

from megamem.ir.allocation import Buffer, Problem, read_problem

SHARED = Path(__file__).parents[4] / "shared" / "data"
INSTANCES = ("A", "C", "E", "F", "H", "K")
TRACES = ("gpt7b_512k_tp8_recomp", "llama7b_4k", "llama70b_tp8pp4vpp5_r0")


def random_problem(
    seed: int, *, most: int = 7, horizon: int = 8, largest: int = 5, unit: int = 1, least: int = 1
) -> Problem:
    """`least` to `most` buffers of 1 .. `largest` units within `horizon` instants."""
    rng = random.Random(seed)
    buffers = []
    for index in range(rng.randint(least, most)):
        lower = rng.randrange(horizon - 1)
        upper = rng.randint(lower + 1, horizon)
        buffers.append(Buffer(id=f"b{index}", lower=lower, upper=upper, size=unit * rng.randint(1, largest)))
    return Problem(buffers=tuple(buffers))


def tight_problem(
    seed: int, *, capacity: int = 8, steps: int = 6, unit: int = 1, largest: int = 4, dying: float = 0.4
) -> Problem:
    """`capacity` units are live at every instant: some buffers die, and others of the same total are born, so that
    fragmentation may make the least peak higher than that."""
    rng = random.Random(seed)
    buffers: list[Buffer] = []
    live: list[tuple[int, int]] = []
    for step in range(steps + 1):
        dead = [item for item in live if step == steps or rng.random() < dying]
        for birth, size in dead:
            live.remove((birth, size))
            buffers.append(Buffer(id=f"b{len(buffers)}", lower=birth, upper=step, size=unit * size))
        free = capacity - sum(size for _, size in live)
        while free > 0 and step < steps:
            size = rng.randint(1, min(free, largest))
            live.append((step, size))
            free -= size
    return Problem(buffers=tuple(buffers))


FRAGMENTED = ({"seed": 265, "capacity": 8, "steps": 8}, {"seed": 212, "capacity": 10, "steps": 8})
"""Arguments of `fragmented_problem`: by `least_peak`, these need one unit more than are ever live at once."""


def fragmented_problem(seed: int, capacity: int, steps: int, *, unit: int = 1) -> Problem:
    """A tight problem of the seeds above: thirteen buffers."""
    return tight_problem(seed, capacity=capacity, steps=steps, largest=5, dying=0.25, unit=unit)


def layered_problem(layers: int, *, seed: int = 3, tagged: bool = False) -> Problem:
    """A forward and a backward pass over equal layers: what is saved lives from one to the other, the rest briefly."""
    rng = random.Random(seed)
    transients = [(begin := rng.randrange(8), begin + rng.randint(1, 3), 512 * rng.randint(1, 9)) for _ in range(10)]
    buffers = []
    for layer in range(layers):
        for name, start in (("forward", 12 * layer), ("backward", 12 * (2 * layers - layer - 1) + 5)):
            group = f"layer {layer} {name}" if tagged else ""
            for index, (lower, upper, size) in enumerate(transients):
                size = size if name == "forward" else 2 * size
                ident = f"{name} {layer}.{index}"
                buffers.append(Buffer(id=ident, lower=start + lower, upper=start + upper, size=size, group=group))
        saved = Buffer(id=f"saved {layer}", lower=12 * layer + 11, upper=12 * (2 * layers - layer) + 1, size=4096)
        buffers.append(saved)
    return Problem(buffers=tuple(buffers))


def least_peak(problem: Problem) -> int:
    """By depth-first search over all offsets, not only canonical ones; for sizes of a few units."""
    buffers = problem.buffers

    def fits(index: int, offsets: list[int], capacity: int) -> bool:
        if index == len(buffers):
            return True
        for offset in range(capacity - buffers[index].size + 1):
            clear = all(
                not buffers[index].overlaps(buffers[other])
                or offsets[other] >= offset + buffers[index].size
                or offset >= offsets[other] + buffers[other].size
                for other in range(index)
            )
            if clear and fits(index + 1, [*offsets, offset], capacity):
                return True
        return False

    instants = {buffer.lower for buffer in buffers}
    capacity = max(sum(b.size for b in buffers if b.lower <= instant < b.upper) for instant in instants)
    while not fits(0, [], capacity):
        capacity += 1
    return capacity


def published(name: str) -> Problem:
    """One of MiniMalloc's challenging instances; skips the test where it is not at hand."""
    return _shared(SHARED / "minimalloc" / f"{name}.1048576.csv")


def trace(name: str) -> Problem:
    """The trace of one iteration of a Megatron model; skips the test where it is not at hand."""
    return _shared(SHARED / "traces" / f"{name}.csv.gz")


def _shared(path: Path) -> Problem:
    if not path.exists():
        pytest.skip(f"{path.name} of the shared data is not here")
    return read_problem(path)
