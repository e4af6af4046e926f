"""Megatron-Core's dense MLP one tile of its tokens at a time: `mlp.tiles`.

`linear_fc1` makes f (SwiGLU: 2f) numbers a token, the activation function f more, and under sequence parallelism the
gathered input is as large as all ranks' shards. In tiles these exist for a tile at a time; `megamem.runtime.tiles` says
how, and that no matrix product is done twice for it. What remains between the passes is linear_fc1's output: in device
memory, or, with the activation engine, where its policy says, tile by tile as it is made.

Beyond `mlp_chunks_for_training`, which Megatron-Core has since 0.18: that calls the MLP once for each chunk and joins
the outputs, so autograd saves of all chunks what it saved of the whole (linear_fc1's output, the activation function's
output), and adds up the chunks' weight gradients in the dtype of the weight.

**Tiles.** Of a rank's own tokens, so that under sequence parallelism each tile is gathered and scattered by itself.
auto: as many as make linear_fc1's output, and the gathered input, no larger for a tile than the MLP's input, but at
least 1024 rows of the matrix products in each.

**Weight gradients.** Under Megatron's DDP each tile adds to `main_grad`, with and without gradient_accumulation_fusion;
else they are summed in fp32. Hooks on a parameter run once a microbatch, as ever. Schedules that compute weight
gradients apart (W) have those of a tiled MLP in B: put off, they would need what the tiles are there to give back.

Bitwise equal to stock Megatron with one tile. With more, a matrix product over fewer rows may sum in another order, and
weight gradients are rounded once per tile.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.nn import Module, Parameter

from megamem.config import Mlp
from megamem.errors import UnsupportedError
from megamem.integrations import compat
from megamem.integrations.capability import Capability
from megamem.ir.tiles import automatic_tiles
from megamem.kernels.linear_cross_entropy.autograd import mark_added
from megamem.patches import GROUPS
from megamem.patches.registry import Patch
from megamem.runtime.pipeline.weights import WeightQueue
from megamem.runtime.session import AbstractTiles
from megamem.runtime.tiles.graph import run_in_tiles
from megamem.runtime.tiles.parts import AbstractTiled, AbstractTileStore, GradientSum, ResidentTiles

PATH = "mlp"  # in a layer
_FLAG = "grad_added_to_main_grad"


@final
class _DenseMlp(AbstractTiled):
    """Megatron's MLP, as the tiles want to see it."""

    def __init__(
        self, module: Any, forward: Callable[..., Any], kwargs: dict[str, Any], queue: WeightQueue | None
    ) -> None:
        self.module, self.forward, self.kwargs, self.queue = module, forward, kwargs, queue
        self.first, self.last = module.linear_fc1, module.linear_fc2

    def __call__(self, tokens: Tensor) -> Any:
        return self.forward(self.module, tokens, **self.kwargs)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with compat.balanced_ranges(), contextlib.nullcontext() if self.queue is None else self.queue.paused():
            yield

    def parameters(self) -> Sequence[Parameter]:
        return list(self.module.parameters())


class MainGradSum(GradientSum):
    """Adds to `main_grad` where Megatron's DDP is at work, and tells it so.

    Linear layers set `grad_added_to_main_grad` where they have added a gradient themselves. It stays set from one
    microbatch to the next, so it is taken down before each tile, and put back for a parameter that got nothing: the
    bias of linear_fc2, which the MLP hands out to be added later.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        super().__init__(parameters)
        self._flags = [
            getattr(parameter, _FLAG, None) if _has_main_grad(parameter) else None for parameter in parameters
        ]
        self._added: set[int] = set()

    def begin_tile(self) -> None:
        for parameter, flag in zip(self.parameters, self._flags, strict=True):
            if flag is not None:
                setattr(parameter, _FLAG, False)

    def add(self, index: int, gradient: Tensor) -> None:
        parameter: Any = self.parameters[index]
        if self._flags[index] is None:
            super().add(index, gradient)
            return
        self._added.add(index)
        if not getattr(parameter, _FLAG):
            parameter.main_grad.add_(gradient)

    def result(self, index: int) -> Tensor | None:
        parameter, flag = self.parameters[index], self._flags[index]
        if flag is None:
            return super().result(index)
        if index in self._added:
            return mark_added(parameter)
        setattr(parameter, _FLAG, flag)
        return None


def _has_main_grad(parameter: Any) -> bool:
    return getattr(parameter, "main_grad", None) is not None and hasattr(parameter, _FLAG)


@dataclass(frozen=True, kw_only=True)
class TiledMlpReport:
    """Calls of dense MLPs in tiles on this rank, evaluation and replays included, and the tiles of the last one."""

    num_calls: int
    num_tiles: int

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much), ready to print."""
        return [("MLP calls in tiles", f"{self.num_calls}, the last one in {self.num_tiles}")]


@final
class TiledMlp(Capability, AbstractTiles):
    """Runs the dense MLPs of a process in tiles.

    rebuilds:  whether fp8.saved_activations is on
    queue:     of a schedule that computes weight gradients apart; it does not get those of the tiles
    shelf:     where the layer that is running keeps what tiles keep; None where no activation engine looks after it
    """

    SECTION: ClassVar[str] = "mlp"
    OPTION: ClassVar[str] = "mlp.tiles"
    NOT_LIVE: ClassVar[str] = (
        "mlp.tiles is on, a step has run, and no dense MLP was called. Are all layers of the model MoE layers, or its "
        "MLPs of a class with a forward of its own? Set mlp.tiles: off to go on without"
    )

    def __init__(self, options: Mlp, *, rebuilds: bool = False) -> None:
        self.options, self.rebuilds = options, rebuilds
        self.queue: WeightQueue | None = None
        self.shelf: Callable[[str], AbstractTileStore | None] = lambda path: None
        self.num_calls = self.num_tiles = 0
        self._checked: weakref.WeakSet[Module] = weakref.WeakSet()
        self._num_found: int | None = None
        self._is_replaying = False

    def patches(self) -> Sequence[Patch]:
        return [patch.bound(self) for patch in GROUPS["mlp.forward"]]

    def expected(self) -> str:
        return "the activation function runs twice, no matrix product; gradients are stock's to rounding"

    def takes(self, module: Any) -> bool:
        """Whether a module is an MLP that runs in tiles: dense, and with Megatron's own forward pass."""
        is_mlp = isinstance(module, MLP) and type(module).forward is MLP.forward
        return is_mlp and not getattr(module.linear_fc1, "is_expert", False)

    def modules(self, chunks: Sequence[Module]) -> set[int]:
        """Ids of the MLPs that run in tiles, and of all modules in them."""
        mlps = [module for chunk in chunks for module in chunk.modules() if self.takes(module)]
        return {id(module) for mlp in mlps for module in mlp.modules()}

    def problems(self, chunks: Sequence[Module]) -> list[str]:
        found = [module for chunk in chunks for module in chunk.modules() if self.takes(module)]
        self._num_found = len(found)
        return sorted({problem for module in found for problem in self._problems(module)})

    def run_mlp(
        self, module: Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not self.takes(module) or len(args) > 1 or kwargs.get("per_token_scale") is not None or hidden is None:
            return forward(module, *args, **kwargs)
        if module not in self._checked:
            if problems := [*self._problems(module)]:
                raise UnsupportedError(f"{self.OPTION}: " + "; ".join(problems))
            self._checked.add(module)
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        store = None if self._is_replaying else self.shelf(PATH) or ResidentTiles()
        tiles = num_tiles(module, hidden) if self.options.tiles == "auto" else int(self.options.tiles)
        self.num_calls, self.num_tiles = self.num_calls + 1, tiles
        return run_in_tiles(_DenseMlp(module, forward, rest, self.queue), hidden, tiles, store, MainGradSum)

    def around_layer(self, layer: Module, *, is_replay: bool) -> AbstractContextManager[None] | None:
        return self._replaying() if is_replay else None

    @contextlib.contextmanager
    def _replaying(self) -> Iterator[None]:
        """While a layer is replayed, whose result goes through no backward pass."""
        before, self._is_replaying = self._is_replaying, True
        try:
            yield
        finally:
            self._is_replaying = before

    def _problems(self, module: Module) -> Iterator[str]:
        if self.rebuilds:
            yield (
                "fp8.saved_activations makes outputs of activation functions again too, and holds those of all tiles "
                "until it does; switch one of them off (activations.compress swaps in 8 bits what a tile keeps)"
            )
        yield from _problems(module)

    def is_live(self) -> bool | None:
        return True if self.num_calls else None if self._num_found == 0 else False

    def report(self) -> TiledMlpReport:
        return TiledMlpReport(num_calls=self.num_calls, num_tiles=self.num_tiles)


def num_tiles(module: Any, hidden: Tensor) -> int:
    """How many tiles `auto` makes of the tokens of an MLP's input [s, b, h]."""
    gathered = int(module.config.tensor_model_parallel_size) if module.config.sequence_parallel else 1
    width: int = max(parameter.shape[0] for parameter in module.linear_fc1.parameters() if parameter.dim() > 1)
    rows = hidden.shape[0] * hidden.shape[1] * gathered
    return automatic_tiles(rows, width=width, hidden=hidden.shape[-1], gathered=gathered)


def _problems(module: Any) -> list[str]:
    """Why an MLP does not run in tiles."""
    config = module.config
    found = []
    if compat.uses_low_precision(config):
        found.append("FP8 and FP4 scales belong to all tokens of a tensor; switch low precision off")
    if compat.uses_cuda_graphs(config):
        found.append("CUDA graphs replay a layer without calling Python; set cuda_graph_impl to none")
    if getattr(config, "tp_comm_overlap", False):
        found.append("tp_comm_overlap has communication buffers for all tokens at once; switch it off")
    if getattr(config, "delay_wgrad_compute", False):
        found.append(
            "delay_wgrad_compute puts weight gradients off, and with them what the tiles give back; switch it off"
        )
    if getattr(config, "overlap_moe_expert_parallel_comm", False):
        found.append("overlap_moe_expert_parallel_comm runs the parts of a layer on its own schedule; switch it off")
    if getattr(config, "cpu_offloading", False):
        found.append("Megatron's cpu_offloading stores what layers save; switch it off")
    if getattr(config, "mlp_chunks_for_training", 1) > 1:
        found.append("mlp_chunks_for_training does the same; leave it at 1")
    if any(hasattr(parameter, "__fsdp_param__") for parameter in module.parameters()):
        found.append("Megatron-FSDP frees weights after each module's backward pass; use DDP")
    if any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in module.modules()):
        found.append("dropout inside the MLP would draw other random numbers when the activation function runs again")
    return found
