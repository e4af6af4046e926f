"""Real models trained while every copy runs at the worst moment that the engine's waits allow.

The simulator (`megamem/testing/streams.py`) fills memory that nobody may rely on with NaN and raises where two uses of
the same memory are not ordered. Gradients must be those of stock Megatron, bit by bit, whatever the order of copies:
fractions between 0 and 1, which differ by rounding, are compared with the same run on a device whose copies are done at
once. Each (configuration, seed) also takes one of two numbers of microbatches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]
SWAP: Fields = {"policy": "memo", "keep_last_layers": 0, "host_memory": "8MiB"}  # the simulator writes to all of it
CONFIGS: dict[str, Fields] = {
    "memo 1": SWAP,
    "memo 0.5": {**SWAP, "swap_fraction": 0.5},
    "ordered 0.5": {"policy": "ordered", "swap_fraction": 0.5, "keep_last_layers": 0, "host_memory": "8MiB"},
    "sparse residuals": {**SWAP, "residual_every": 2},
    "sparse residuals, half": {**SWAP, "swap_fraction": 0.5, "residual_every": 3},
    "little room": {**SWAP, "host_memory": "200KiB"},
    "last layer kept": {"policy": "memo", "keep_last_layers": 1, "host_memory": "8MiB"},
}
EXPERTS: dict[str, Fields] = {
    "experts swapped": {**SWAP, "experts": "swap"},
    "experts swapped, half": {**SWAP, "swap_fraction": 0.5, "experts": "swap"},
}
STEPS = 3
POLICIES = ("latest", "random", "earliest")
SMALL: Fields = {"sequence": 8, "microbatch": 1, "hidden": 16, "heads": 2, "vocab": 16, "activation": "swiglu"}
LAYOUTS: dict[str, tuple[int, Fields, float]] = {  # ranks, fields, seconds
    "one rank": (1, {**SMALL, "layers": 4}, 6),
    "experts": (1, {**SMALL, "layers": 2, "experts": 4, "bias": False}, 4),
    "pp2": (2, {**SMALL, "layers": 6, "pp": 2}, 6),
    "pp2 vpp2": (2, {**SMALL, "layers": 4, "pp": 2, "vpp": 2}, 6),
}


def storm(fields: Fields, configs: dict[str, Fields], seconds: float) -> dict[str, Any]:
    """Train under as many seeds as there is time for (at least one round of everything)."""
    import torch

    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.parity import train
    from megamem.testing.streams import SimulatedDevice

    case = GptCase(**fields)
    init_parallel(case)
    expected: dict[tuple[str, int], Any] = {}
    faults: list[str] = []
    runs = copies = seed = 0
    end = time.monotonic() + seconds
    while True:
        go_on = torch.tensor(float(time.monotonic() < end or seed < len(POLICIES)))
        torch.distributed.all_reduce(go_on, op=torch.distributed.ReduceOp.MIN)
        if not go_on:
            return {"faults": faults, "runs": runs, "copies": copies}
        policy, num_microbatches = POLICIES[seed % len(POLICIES)], (4, 6)[seed // len(POLICIES) % 2]
        for name, config in configs.items():
            key = name, num_microbatches
            if key not in expected:
                stock = train(case, num_microbatches=num_microbatches, steps=STEPS)
                expected[key] = train(case, config, num_microbatches=num_microbatches, steps=STEPS)
                if "half" not in name and "0.5" not in name:
                    faults += [f"{name}, no simulator: {line}" for line in expected[key].differences(stock)]
            device = SimulatedDevice(seed, policy)  # type: ignore[arg-type]
            trained = train(case, config, device=device, num_microbatches=num_microbatches, steps=STEPS)
            faults += [f"{name}, {policy}, seed {seed}: {line}" for line in trained.differences(expected[key])]
            device.drain()
            device.check_quiescent()
            runs, copies = runs + 1, copies + device.num_copies
        seed += 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_do_not_depend_on_when_copies_run(dist: Dist, layout: str) -> None:
    nranks, fields, seconds = LAYOUTS[layout]
    configs = EXPERTS if "experts" in fields else CONFIGS
    for rank, found in enumerate(dist(nranks)(storm, fields, configs, seconds, timeout=120)):
        assert found["faults"] == [], f"rank {rank}"
        assert found["runs"] >= len(POLICIES) * len(configs)
        assert found["copies"] > 100 * len(configs)


def unordered(what: str) -> str:
    """Train with one of the waits taken out."""
    from megamem.runtime.activations.parcels import Courier
    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.parity import train
    from megamem.testing.streams import SimulatedDevice, SimulatedStream

    case = GptCase(**LAYOUTS["one rank"][1])
    init_parallel(case)
    stock = train(case)
    device = SimulatedDevice(0, "latest", detect=what != "values")
    real = SimulatedStream.wait

    def deaf(stream: Any, event: Any) -> None:
        if stream is not device.compute or event.stream is device.compute:
            real(stream, event)

    with pytest.MonkeyPatch.context() as patch:
        if what in ("compute is deaf", "values"):
            patch.setattr(SimulatedStream, "wait", deaf)
        elif what == "a parcel is forgotten":
            patch.setattr(Courier, "_vacate", lambda courier, cargo: None)
        try:
            found = train(case, SWAP, device=device).differences(stock)
            device.drain()
            device.check_quiescent()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return f"wrong: {found[:3]}" if found else ""


@pytest.mark.parametrize(
    ("what", "symptom"),
    [("nothing", ""), ("compute is deaf", "Race"), ("values", "wrong"), ("a parcel is forgotten", "never given back")],
)
def test_the_simulator_notices_a_missing_wait_in_a_real_model(dist: Dist, what: str, symptom: str) -> None:
    (found,) = dist(1)(unordered, what)
    assert symptom in found and bool(symptom) == bool(found)
