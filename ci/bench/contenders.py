"""The ways to train a stack of layers that `gpu_layer.py` compares, each as a context that yields how to run a layer.

A contender's `open(bench)` sets it up and yields `Running`: how one layer is called, what ends a step, and what it
counted. Everyone runs the same layers, on the same attention kernel, from the same input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from recipe import SelectiveOffload
from rig import LayerStack
from torch import Tensor

import megamem

RunLayer = Callable[[int, Tensor], Tensor]


class NotRunError(Exception):
    """A contender that cannot take part, and why."""


@dataclass
class Bench:
    """One cell: a stack, a length, and what the machine was measured to do."""

    stack: LayerStack
    tokens: int
    device: str
    host_nbytes: int
    memory: Any  # device for the engine whose pinned memory is shared by all contenders; None on a CPU
    link: float  # bytes a second to host memory
    unit_nbytes: int  # s*b*h elements as this rank holds them
    saved_nbytes: int  # what one layer saves, without what everyone keeps
    pinned_nbytes: int  # what save_on_cpu would pin for one layer, every tensor rounded up to a power of two
    layer_seconds: float = 0.0  # forward pass of one layer, from the first contender that was timed
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def base_nbytes(self) -> int:
        """Layer input and attention output with its log-sum-exp, of one layer."""
        shape = self.stack.shape
        width = shape.q * self.stack.dtype.itemsize + 4 * shape.heads
        return self.unit_nbytes + self.tokens * width

    @property
    def anchors_nbytes(self) -> int:
        """Outputs of the linear layers that `ordered` stores, of one layer."""
        shape, itemsize = self.stack.shape, self.stack.dtype.itemsize
        gates = 2 if shape.kind == "llama" else 1
        wide = (shape.q + 2 * shape.kv + gates * shape.ffn) * itemsize
        return self.tokens * wide + self.unit_nbytes

    def fraction(self, others: int, share_of_link: float) -> float:
        """MEMO's alpha: what a copy can take along while the next layer runs forward, and what host memory holds."""
        by_link = (self.layer_seconds * self.link * share_of_link - self.base_nbytes) / others
        by_host = (self.host_nbytes * 0.95 / len(self.stack.layers) - self.base_nbytes) / others
        return max(0.0, min(1.0, by_link, by_host))


@dataclass
class Running:
    """A contender that is set up."""

    layer: RunLayer
    end_step: Callable[[], None] = lambda: None
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    counters: Callable[[], dict[str, float]] = dict
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """`exact`: gradients must equal those of resident bit for bit (on a deterministic attention kernel)."""

    name: str
    open: Callable[[Bench], contextlib.AbstractContextManager[Running]]
    exact: bool = False
    profiled: bool = False  # whether stalls can be measured


def _plain(bench: Bench) -> RunLayer:
    return lambda index, hidden: bench.stack.call(index, hidden, bench.tokens)


@contextlib.contextmanager
def _resident(bench: Bench) -> Iterator[Running]:
    yield Running(_plain(bench))


@contextlib.contextmanager
def _recompute(bench: Bench) -> Iterator[Running]:
    from megatron.core.tensor_parallel import checkpoint

    plain = _plain(bench)
    yield Running(lambda index, hidden: checkpoint(lambda x: plain(index, x), False, hidden))


@contextlib.contextmanager
def _torch_recompute(bench: Bench) -> Iterator[Running]:
    from torch.utils.checkpoint import checkpoint

    plain = _plain(bench)
    yield Running(lambda index, hidden: checkpoint(plain, index, hidden, use_reentrant=False, preserve_rng_state=False))


@contextlib.contextmanager
def _save_on_cpu(bench: Bench) -> Iterator[Running]:
    need = bench.pinned_nbytes * len(bench.stack.layers)
    if need > bench.host_nbytes:
        raise NotRunError(f"it would pin {need / 2**30:.0f} GiB (powers of two) of {bench.host_nbytes / 2**30:.0f}")
    yield Running(_plain(bench), around=lambda: torch.autograd.graph.save_on_cpu(pin_memory=True))
    empty = getattr(torch._C, "_host_emptyCache", None)
    if empty is not None and bench.device == "cuda":
        empty()


@contextlib.contextmanager
def _recipe(bench: Bench) -> Iterator[Running]:
    device = next(iter(bench.stack.layers[0].parameters())).device
    recipe, plain = SelectiveOffload(device), _plain(bench)

    def run(index: int, hidden: Tensor) -> Tensor:
        return recipe.layer(lambda x: plain(index, x), hidden)

    yield Running(run, recipe.end_step, counters=lambda: {"bytes_stored": recipe.offloader.bytes_stored})
    recipe.offloader.free.clear()
    empty = getattr(torch._C, "_host_emptyCache", None)
    if empty is not None and bench.device == "cuda":
        empty()


def _engine(options: Callable[[Bench], dict[str, Any]]) -> Callable[[Bench], Any]:
    """megamem under these activation options."""

    @contextlib.contextmanager
    def opened(bench: Bench) -> Iterator[Running]:
        settings = options(bench)
        block = {"activations": {**settings, "host_memory": bench.host_nbytes}}
        with megamem.enable(block, device=bench.memory) as handle:
            yield Running(
                _plain(bench),
                lambda: handle.engine.end_step() if handle.engine is not None else None,
                counters=lambda: _counters(handle),
                settings=settings,
            )

    return opened


def _counters(handle: Any) -> dict[str, float]:
    engine = handle.engine
    if engine is None:
        return {}
    ledger, stats = engine.courier.ledger, engine.stats
    return {
        "bytes_stored": ledger.bytes_stored,
        "bytes_fetched": ledger.bytes_fetched,
        "bytes_forwarded": ledger.bytes_forwarded,
        "replayed_tokens": stats.replayed_tokens,
        "without_room": stats.num_without_room,
        "unplanned": stats.num_unplanned,
    }


def _memo(fraction: float | None) -> Callable[[Bench], dict[str, Any]]:
    """`None`: MEMO's own formula, with all of the link."""

    def options(bench: Bench) -> dict[str, Any]:
        alpha = fraction
        if alpha is None:
            alpha = bench.fraction(max(bench.saved_nbytes - bench.base_nbytes, 1), 1.0)
        return {"policy": "memo", "swap_fraction": round(alpha, 3), "keep_last_layers": 0}

    return options


def _ordered(bench: Bench) -> dict[str, Any]:
    """A tenth of the link is left free, so that a copy which the plan calls hidden is hidden."""
    beta = bench.fraction(bench.anchors_nbytes, 0.9)
    return {"policy": "ordered", "swap_fraction": round(beta, 3), "keep_last_layers": 0}


def _keep(bench: Bench) -> dict[str, Any]:
    row = {"layers": f"1-{len(bench.stack.layers)}", "layer_input": "keep", "attention_output": "keep", "saved": "keep"}
    return {"policy": "memo", "swap_fraction": 1.0, "keep_last_layers": 0, "table": [row]}


@contextlib.contextmanager
def _fine_grained(_bench: Bench) -> Iterator[Running]:
    if find_spec("transformer_engine") is None:
        raise NotRunError("needs Transformer Engine, which is not installed")
    raise NotRunError("Transformer Engine is here, but this benchmark could not be written against it yet")
    yield


# Those that matter most first: time may run out.
CONTENDERS = (
    Contender("resident", _resident, exact=True),
    Contender("full recompute", _recompute),
    Contender("memo 0", _engine(_memo(0.0)), profiled=True),
    Contender("ordered", _engine(_ordered), profiled=True),
    Contender("memo uniform", _engine(_memo(None)), profiled=True),
    Contender("public recipe", _recipe),
    Contender("recompute", _engine(lambda _: {"policy": "recompute"}), profiled=True),
    Contender("keep", _engine(_keep), exact=True, profiled=True),
    Contender("memo 1", _engine(_memo(1.0)), exact=True, profiled=True),
    Contender("torch checkpoint", _torch_recompute),
    Contender("save_on_cpu", _save_on_cpu, exact=True),
    Contender("Megatron fine-grained offload", _fine_grained),
)
MEANING = {
    "resident": "everything stays in device memory: plain autograd",
    "full recompute": "Megatron's tensor_parallel.checkpoint around each layer",
    "torch checkpoint": "torch.utils.checkpoint, non-reentrant, around each layer",
    "save_on_cpu": "torch.autograd.graph.save_on_cpu(pin_memory=True) around all layers; it moves the weights too",
    "public recipe": "attention output and layer input offloaded, the rest recomputed; plain PyTorch (recipe.py)",
    "memo 0": "megamem, the same tensors as the public recipe",
    "memo 1": "megamem, everything swapped, nothing recomputed",
    "memo uniform": "megamem, MEMO's rule with alpha by MEMO's formula from the measured link and layer time",
    "ordered": "megamem, outputs of linear layers by a fraction of 0.9 of the measured link; the rest rebuilt",
    "recompute": "megamem, layer input and attention output stay in device memory, the rest rebuilt",
    "keep": "megamem switched on with everything kept: its own cost",
    "Megatron fine-grained offload": "Megatron's fine_grained_activation_offloading",
}
