"""Real models trained while every copy runs at the worst moment that the engine's waits allow.

The simulator (`megamem/testing/streams.py`) fills memory that nobody may rely on with NaN and raises where two uses of
the same memory are not ordered. Gradients must be those of stock Megatron, bit by bit, whatever the order of copies:
fractions between 0 and 1, which differ by rounding, and compressed swap are compared with the same run on a device
whose copies are done at once.
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
    "memo, half": {**SWAP, "swap_fraction": 0.5},
    "ordered, half": {"policy": "ordered", "swap_fraction": 0.5, "keep_last_layers": 0, "host_memory": "8MiB"},
    "sparse residuals": {**SWAP, "residual_every": 2},
    "sparse residuals, half": {**SWAP, "swap_fraction": 0.5, "residual_every": 3},
    "little room": {**SWAP, "host_memory": "40KiB"},
    "fp8": {**SWAP, "compress": "fp8"},
    "fp8, half": {**SWAP, "compress": "fp8", "swap_fraction": 0.5, "residual_every": 2},
}
EXPERTS: dict[str, Fields] = {
    "experts swapped": {**SWAP, "experts": "swap"},
    "experts swapped, half": {**SWAP, "swap_fraction": 0.5, "experts": "swap"},
}
STEPS = 2
MICROBATCHES = 4
POLICIES = ("latest", "random", "earliest")
SMALL: Fields = {"sequence": 8, "microbatch": 1, "hidden": 16, "heads": 2, "vocab": 16, "activation": "swiglu"}
LAYOUTS: dict[str, tuple[int, Fields, float]] = {  # ranks, fields, seconds
    "one rank": (1, {**SMALL, "layers": 3}, 6),
    "experts": (1, {**SMALL, "layers": 2, "experts": 4, "bias": False}, 4),
    "pp2": (2, {**SMALL, "layers": 4, "pp": 2}, 6),
    "pp2 vpp2": (2, {**SMALL, "layers": 4, "pp": 2, "vpp": 2}, 6),
}


class _Trainer:
    """One model under one switch-on, trained again and again from the same parameters on one device after the other.

    So that layers are learned once, and time goes into interleavings.
    """

    def __init__(self, case: Any, handle: Any) -> None:
        from megamem.testing.models import build_gpt

        self.case, self.handle = case, handle
        self.chunks = build_gpt(case)
        self.start = [parameter.detach().clone() for chunk in self.chunks for parameter in chunk.parameters()]

    def train(self, num_microbatches: int, device: Any = None) -> tuple[list[float], dict[str, Any]]:
        """Losses and the last step's gradients, with all copies on `device`."""
        import torch

        from megamem.runtime.activations.host_arena import HostArena
        from megamem.runtime.activations.parcels import Courier
        from megamem.testing.models import train_steps

        engine = self.handle.engine
        if device is not None:
            couriers = {name: getattr(engine, name) for name in ("courier", "expert_courier")}
            engine.device = device
            for name, old in couriers.items():
                if old is not None:
                    setattr(engine, name, Courier(device, HostArena(device, old.arena.capacity)))
        with torch.no_grad():
            parameters = (parameter for chunk in self.chunks for parameter in chunk.parameters())
            for parameter, value in zip(parameters, self.start, strict=True):
                parameter.copy_(value)
        return train_steps(self.chunks, self.case, num_microbatches=num_microbatches, steps=STEPS)


def _faults(got: Any, expected: Any) -> list[str]:
    import torch

    faults = [] if got[0] == expected[0] else ["losses"]
    return faults + [name for name, gradient in expected[1].items() if not torch.equal(got[1][name], gradient)]


def _goes_on(until: float) -> bool:
    """Whether all ranks have time left."""
    import torch

    left = torch.tensor(float(time.monotonic() < until))
    torch.distributed.all_reduce(left, op=torch.distributed.ReduceOp.MIN)
    return bool(left)


def storm(fields: Fields, configs: dict[str, Fields], seconds: float) -> dict[str, Any]:
    """Train under as many seeds as there is time for: at least one of each policy."""
    import megamem
    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.streams import SimulatedDevice

    case = GptCase(**fields)
    init_parallel(case)
    with megamem.enable({}) as handle:
        stock = _Trainer(case, handle).train(MICROBATCHES)
    faults: list[str] = []
    runs = copies = 0
    for name, config in configs.items():
        until, seed = time.monotonic() + seconds / len(configs), 0
        with megamem.enable({"activations": config}) as handle:
            trainer = _Trainer(case, handle)
            expected = trainer.train(MICROBATCHES)
            if "half" not in name and "fp8" not in name:
                faults += [f"{name}, no simulator: {fault}" for fault in _faults(expected, stock)]
            while _goes_on(until) or seed < len(POLICIES):
                policy = POLICIES[seed % len(POLICIES)]
                device = SimulatedDevice(seed, policy)  # type: ignore[arg-type]
                found = _faults(trainer.train(MICROBATCHES, device), expected)
                faults += [f"{name}, {policy}, seed {seed}: {fault}" for fault in found]
                device.drain()
                device.check_quiescent()
                runs, copies, seed = runs + 1, copies + device.num_copies, seed + 1
    return {"faults": faults, "runs": runs, "copies": copies}


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
