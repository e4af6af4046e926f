"""The order of backward passes: learned in one step, right in every later one, harmless where it is wrong."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]
SWAP: Fields = {"policy": "memo", "keep_last_layers": 0, "host_memory": "8MiB"}
SMALL: Fields = {"sequence": 8, "microbatch": 1, "hidden": 16, "heads": 2, "vocab": 16}
LAYOUTS: dict[str, tuple[int, Fields]] = {
    "one rank": (1, {"layers": 3}),
    "1f1b": (2, {"layers": 4, "pp": 2}),
    "interleaved": (2, {"layers": 8, "pp": 2, "vpp": 2}),
    "interleaved by layers": (2, {"layers": 6, "pp": 2, "vpp": 3}),
}


class _Watch:
    """Notes, in order, the forwards and the beginnings of backward passes, and what was guessed at each beginning."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from megamem.runtime.activations.engine import ActivationEngine
        from megamem.runtime.activations.order import BackwardOrder

        self.events: list[tuple[str, int, bool, int | None]] = []  # (what, run, has something to fetch, guess)
        self.step_starts = [0]
        real_next, real_forward, real_end = (
            BackwardOrder.next_after,
            BackwardOrder.on_forward,
            ActivationEngine.end_step,
        )
        numbers: dict[Any, int] = {}  # holds the runs, so that no address comes twice

        def on_forward(order: Any, run: Any, previous: Any) -> None:
            self.events.append(("forward", numbers.setdefault(run, len(numbers)), False, None))
            real_forward(order, run, previous)

        def next_after(order: Any, run: Any) -> Any:
            guess = real_next(order, run)
            assert len(guess) <= 1
            self.events.append(("begin", numbers[run], bool(run.parcels), numbers[guess[0]] if guess else None))
            return guess

        def end_step(engine: Any) -> None:
            real_end(engine)
            self.step_starts.append(len(self.events))

        patch.setattr(BackwardOrder, "on_forward", on_forward)
        patch.setattr(BackwardOrder, "next_after", next_after)
        patch.setattr(ActivationEngine, "end_step", end_step)

    def verdicts(self, step: int) -> dict[str, int]:
        """How often the guess was right, wrong, or missing although the run that came next had been forwarded."""
        events = self.events[self.step_starts[step] : self.step_starts[step + 1]]
        counts = {"right": 0, "wrong": 0, "missing": 0, "not yet": 0, "not needed": 0}
        for place, (what, _, _, guess) in enumerate(events):
            if what != "begin":
                continue
            later = [(run, has_parcels) for name, run, has_parcels, _ in events[place + 1 :] if name == "begin"]
            actual = next((run for run, has_parcels in later if has_parcels), None)
            if guess is not None:
                counts["right" if guess == actual else "wrong"] += 1
            elif actual is None or actual != later[0][0]:  # when a layer with nothing to fetch begins is soon enough
                counts["not needed"] += 1
            else:
                has_run = any(name == "forward" and run == actual for name, run, _, _ in events[:place])
                counts["missing" if has_run else "not yet"] += 1
        return counts


def guesses(fields: Fields, config: Fields, microbatches: int, steps: int) -> list[dict[str, int]]:
    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.parity import train

    case = GptCase(**{**SMALL, **fields})
    init_parallel(case)
    with pytest.MonkeyPatch.context() as patch:
        watch = _Watch(patch)
        train(case, config, num_microbatches=microbatches, steps=steps)
    return [watch.verdicts(step) for step in range(steps)]


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_the_second_step_on_every_guess_is_right(dist: Dist, layout: str, kept: int) -> None:
    nranks, fields = LAYOUTS[layout]
    for rank, steps in enumerate(dist(nranks)(guesses, fields, {**SWAP, "keep_last_layers": kept}, 6, 3)):
        for counts in steps[1:]:
            assert counts["wrong"] == counts["missing"] == 0, f"rank {rank}: {steps}"
            assert counts["right"] > counts["not yet"], f"rank {rank}: {steps}"
        if "vpp" not in fields:  # with one chunk there is nothing to learn
            assert steps[0] == steps[1]


def changing(fields: Fields) -> dict[str, Any]:
    """Steps of 4, 8, 4 and 6 microbatches, an evaluation, and a step that breaks off, against stock Megatron."""
    import torch

    import megamem
    from megamem.testing.models import GptCase, build_gpt, init_parallel, train_steps
    from megamem.testing.parity import seed_everything

    case = GptCase(**{**SMALL, **fields})
    init_parallel(case)

    def run(config: Fields) -> tuple[list[float], dict[str, Any], int]:
        seed_everything()
        losses: list[float] = []
        with megamem.enable({"activations": config}) as handle:
            chunks = build_gpt(case)
            for number in (4, 8, 4, 6):
                more, gradients = train_steps(chunks, case, num_microbatches=number)
                losses += more
                with torch.no_grad():
                    train_steps(chunks, case, num_microbatches=4, forward_only=True)
            return losses, gradients, 0 if handle.engine is None else handle.engine.courier.arena.in_use

    losses, gradients, _ = run({"policy": "off"})
    new_losses, new_gradients, in_use = run(SWAP)
    same = losses == new_losses and all(torch.equal(gradients[name], new_gradients[name]) for name in gradients)
    return {"same": same, "in use": in_use}


@pytest.mark.parametrize("layout", ["1f1b", "interleaved"])
def test_a_number_of_microbatches_that_changes_costs_nothing_but_speed(dist: Dist, layout: str) -> None:
    nranks, fields = LAYOUTS[layout]
    assert dist(nranks)(changing, fields) == [{"same": True, "in use": 0}] * 2


def broken_off(fields: Fields) -> dict[str, Any]:
    """A step that ends with an exception in the middle, then one that does not."""
    import torch

    import megamem
    from megamem.testing.models import GptCase, build_gpt, init_parallel, train_steps
    from megamem.testing.parity import seed_everything

    case = GptCase(**{**SMALL, **fields})
    init_parallel(case)

    def run(config: Fields) -> tuple[list[float], dict[str, Any], list[int]]:
        seed_everything()
        with megamem.enable({"activations": config}) as handle:
            chunks = build_gpt(case)
            train_steps(chunks, case, num_microbatches=4)
            layer, calls = chunks[0].module.decoder.layers[1], [0]  # type: ignore[union-attr]

            def hook(*_: Any) -> None:
                calls[0] += 1
                if calls[0] == 3:
                    raise RuntimeError("out of data")

            removable = layer.register_forward_hook(hook)
            with pytest.raises(RuntimeError, match="out of data"):
                train_steps(chunks, case, num_microbatches=4)
            removable.remove()
            gc.collect()  # an exception and the frames that it went through hold one another
            engine = handle.engine
            if engine is not None:
                engine.courier.flush()  # lost parcels wait for the courier's next call
            held = [] if engine is None else [engine.courier.arena.in_use, engine.stats.retained.now]
            losses, gradients = train_steps(chunks, case, num_microbatches=4, steps=2)
            if engine is not None:
                held += [engine.courier.arena.in_use, engine.stats.retained.now, engine.courier.ledger.staging_nbytes]
            return losses, gradients, held

    losses, gradients, _ = run({"policy": "off"})
    new_losses, new_gradients, held = run(SWAP)
    same = losses == new_losses and all(torch.equal(gradients[name], new_gradients[name]) for name in gradients)
    return {"same": same, "held": held}


def test_a_step_that_breaks_off_leaves_nothing_behind(dist: Dist) -> None:
    (found,) = dist(1)(broken_off, {"layers": 3})
    assert found["same"]
    assert found["held"] == [0, 0, 0, 0, 0]
