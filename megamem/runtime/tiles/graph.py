"""A module's forward and backward pass one tile of its tokens at a time, so that its intermediates exist for one tile.

Source: the tiled MLP of the Mini-Sequence Transformer (arXiv 2407.15892, 3.1) and of ALST (arXiv 2506.13996, 3.1). Both
run the forward pass of the module again in its backward pass. We deviate: no matrix product is done twice unless
asked for. The autograd graph of each tile is built in the forward pass, and what it saves is put aside:

    linear_fc1 --> activation --> linear_fc2        tile by tile; f wide between the two
       |               |              |
     input          (anything)      input           what autograd saves there
       |               |              |
    a slice of      dropped: the activation is run again on linear_fc1's output, which a `TileStore` keeps in device
    the module's    memory, swaps to host memory, or gives up: then linear_fc1 runs again too
    own input

In the backward pass each tile gets back what it saved, its graph runs, and gradients of weights are added up over the
tiles by a `GradientSum`. Between the passes a tile's graph holds no tensor but the weights.

For the rest of the world the module is one operation: one node of the graph, which saves the module's input; gradients
arrive at each parameter once, so the hooks on parameters (data parallelism) run once. The nodes of the tiles would call
these hooks too if they reached the parameters: they do not, since `torch.autograd.grad` stops in front of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.nn import Module

from megamem.errors import ActivationError, UnsupportedError
from megamem.ir.tiles import spans
from megamem.runtime.activations.layer import first_tensor, watching, with_first_tensor
from megamem.runtime.tiles.parts import AbstractTiled, AbstractTileStore, GradientSum, ResidentTiles

FIRST, BETWEEN, LAST = "first", "between", "last"


class _Place:
    """How a saved tensor lies in the tensor that it is a view of."""

    __slots__ = ("shape", "skip", "strides")

    def __init__(self, tensor: Tensor, base: Tensor) -> None:
        self.shape, self.strides = tensor.shape, tensor.stride()
        self.skip = int(tensor.storage_offset()) - int(base.storage_offset())

    def of(self, base: Tensor) -> Tensor:
        return base.as_strided(self.shape, self.strides, int(base.storage_offset()) + self.skip)


class _Saved:
    """What the graph of a tile holds instead of a tensor."""

    __slots__ = ("place", "tensor")

    def __init__(self, tensor: Tensor | None, place: _Place | None) -> None:
        self.tensor = tensor  # None: away
        self.place = place  # of what is a view of the module's input, or of the last layer's

    def unpack(self) -> Tensor:
        """The tensor, which is back by the time when the graph runs."""
        assert self.tensor is not None
        return self.tensor


class _Recorder:
    """Watches the forward pass of a tile and takes its saved tensors apart. The graph refers to it: it is empty later,
    and knows nobody who knows the graph."""

    def __init__(self, weights: frozenset[int]) -> None:
        self.weights = weights
        self.of_input: list[_Saved] = []  # slices of the module's input
        self.extra: list[_Saved] = []  # what else the first layer saved
        self.between: list[_Saved] = []
        self.of_last: list[_Saved] = []  # views of the last layer's input
        self.first: Any = None  # what the first layer returned
        self.version = 0
        self._part = BETWEEN
        self._base: Tensor | None = None  # the input of the linear layer that is running

    def on_call(self, part: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._part, self._base = part, _argument(args, kwargs)
        try:
            result = original(*args, **kwargs)
        finally:
            self._part, self._base = BETWEEN, None
        if part == FIRST:
            self.first = result
            self.version = first_tensor(result)._version  # type: ignore[union-attr]
        return result

    def pack(self, tensor: Tensor) -> _Saved:
        address = tensor.untyped_storage().data_ptr()
        is_weight = address in self.weights
        place = None
        if self._base is not None and address == self._base.untyped_storage().data_ptr():
            place = _Place(tensor, self._base)
        comes_back = self._part == BETWEEN or place is not None
        saved = _Saved(None if comes_back and not is_weight else _without_graph(tensor), place)
        if self._part == BETWEEN:
            self.between.append(saved)  # weights too: they come by again, in their place
        elif place is not None:
            (self.of_input if self._part == FIRST else self.of_last).append(saved)
        elif self._part == FIRST and not is_weight:
            self.extra.append(saved)
        return saved

    def forget(self) -> None:
        self.of_input, self.extra, self.between, self.of_last, self.first = [], [], [], [], None


class _Sink:
    """Where the gradient of a tile's tokens goes."""

    __slots__ = ("gradient",)

    def __init__(self) -> None:
        self.gradient: Tensor | None = None


class _Tile:
    """One tile of one call: its graph, and where each tensor that the graph saved comes back from."""

    def __init__(self, index: int, start: int, stop: int) -> None:
        self.index, self.start, self.stop = index, start, stop
        self.edge: GradientEdge | None = None
        self.is_stored = False
        self.sink = _Sink()

    def forward(self, call: _Call, hidden: Tensor) -> Any:
        """Run the tile [start, stop) of `hidden`, build its graph, and put away what the graph saves."""
        tokens = hidden[self.start : self.stop]
        recorder = _Recorder(call.weights)
        with (
            torch.enable_grad(),
            saved_tensors_hooks(recorder.pack, _Saved.unpack),
            watching(call.parts, recorder.on_call),
            call.module.running(),
        ):
            if call.needs_input_grad:
                tokens = _Entrance.apply(call.anchor, tokens, self.sink)  # type: ignore[no-untyped-call]
            result = call.module(tokens)
        output = first_tensor(result)
        if output is None or recorder.first is None:
            raise UnsupportedError("an MLP that does not call its first linear layer cannot run in tiles")
        if output.requires_grad:
            self.edge = get_gradient_edge(output)
            self._seal(call, recorder)
        recorder.forget()
        return with_first_tensor(result, output.detach())

    def _seal(self, call: _Call, recorder: _Recorder) -> None:
        tensor = first_tensor(recorder.first)
        assert tensor is not None
        if tensor._version != recorder.version:
            raise UnsupportedError(
                "the activation function of an MLP changes the output of its first linear layer in place, and a tile "
                "has to keep that; set mlp.tiles: off"
            )
        self.frame = with_first_tensor(recorder.first, tensor.new_empty(0))
        self.requires_grad = tensor.requires_grad
        self.of_input, self.extra = recorder.of_input, recorder.extra
        self.between, self.of_last = recorder.between, recorder.of_last
        if self.stop <= call.stored:
            extra: list[Any] = [saved.tensor for saved in self.extra]
            self.is_stored = call.store.put(self.index, [tensor.detach(), *extra])
        for saved in self.extra:
            saved.tensor = None

    def backward(self, call: _Call, hidden: Tensor, grad_output: Tensor, sums: GradientSum) -> Tensor | None:
        """Bring back what the graph saved and run it. The gradient of the tile's tokens; those of parameters are added
        to `sums`."""
        assert self.edge is not None
        self._restore(call, hidden[self.start : self.stop])
        sums.begin_tile()
        sources: list[Tensor] = [parameter for parameter in sums.parameters if parameter.requires_grad]
        if call.needs_input_grad:
            sources.append(call.anchor)
        edge, self.edge = self.edge, None
        gradients = torch.autograd.grad([edge], sources, [grad_output[self.start : self.stop]], allow_unused=True)
        found = dict(zip(map(id, sources), gradients, strict=True))
        for index, parameter in enumerate(sums.parameters):
            gradient = found.get(id(parameter))
            if gradient is not None:
                sums.add(index, gradient)
        return self.sink.gradient

    def _restore(self, call: _Call, tokens: Tensor) -> None:
        again = _Again(self, call)
        again.run(tokens)
        for saved in self.of_input:
            assert saved.place is not None
            saved.tensor = saved.place.of(tokens)
        for saved in self.of_last:
            assert saved.place is not None and again.last is not None
            saved.tensor = saved.place.of(again.last)
        for saved_ones, tensors in ((self.extra, again.extra), (self.between, again.between)):
            if len(saved_ones) != len(tensors):
                raise ActivationError(
                    f"an MLP in tiles saved {len(saved_ones)} tensors in its forward pass, and {len(tensors)} when "
                    "its activation function ran again"
                )
            for saved, tensor in zip(saved_ones, tensors, strict=True):
                saved.tensor = tensor
        # From here on only the graph holds them, and lets go of each as soon as it can.
        self.of_input, self.extra, self.between, self.of_last = [], [], [], []
        call.store.on_recomputed(again.recomputed_nbytes)


class _Enough(BaseException):
    """The last layer's input has come by. Not an Exception: no handler may swallow it."""


class _Again:
    """The part of a tile's forward pass that runs once more: what lies before the last linear layer. The first one is
    not run, where its output is stored."""

    def __init__(self, tile: _Tile, call: _Call) -> None:
        self.tile, self.call = tile, call
        self.stored = call.store.take(tile.index) if tile.is_stored else None
        self.extra: list[Tensor] = self.stored[1:] if self.stored is not None else []
        self.between: list[Tensor] = []
        self.last: Tensor | None = None
        self.recomputed_nbytes = 0
        self._part = BETWEEN
        self._input = 0

    def run(self, tokens: Tensor) -> None:
        """Run it on the tile's tokens."""
        tokens = tokens.detach().requires_grad_(self.call.needs_input_grad)
        self._input = tokens.untyped_storage().data_ptr()
        with (
            contextlib.suppress(_Enough),
            torch.enable_grad(),
            saved_tensors_hooks(self._pack, _never),
            watching(self.call.parts, self._on_call),
            self.call.module.running(),
        ):
            self.call.module(tokens)
        self.stored = None

    def _on_call(self, part: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if part == LAST:
            self.last = _argument(args, kwargs).detach()
            self.recomputed_nbytes += self.last.nbytes
            raise _Enough
        if self.stored is not None:
            tensor = self.stored[0].detach().requires_grad_(self.tile.requires_grad)
            return with_first_tensor(self.tile.frame, tensor)
        self._part = FIRST
        try:
            result = original(*args, **kwargs)
        finally:
            self._part = BETWEEN
        output = first_tensor(result)
        assert output is not None
        self.recomputed_nbytes += output.nbytes
        return with_first_tensor(result, output.detach().requires_grad_(output.requires_grad))

    def _pack(self, tensor: Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        if self._part == BETWEEN:
            self.between.append(_without_graph(tensor))
        elif address != self._input and address not in self.call.weights:
            self.extra.append(_without_graph(tensor))


class _Entrance(torch.autograd.Function):
    """Where a tile's tokens enter its graph: their gradient goes to a sink, and no leaf of the graph holds them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tokens: Tensor, sink: _Sink) -> Tensor:
        ctx.sink = sink
        ctx.empty = anchor.shape
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        [gradient] = gradients
        ctx.sink.gradient = gradient
        return gradient.new_empty(ctx.empty), None, None


class _Call:
    """One call of a module in tiles, from its forward to its backward pass."""

    def __init__(self, module: AbstractTiled, tiles: int, store: AbstractTileStore, sums: type[GradientSum]) -> None:
        self.module, self.num_tiles, self.store, self.sums = module, tiles, store, sums
        self.parameters = module.parameters()
        self.weights = frozenset(parameter.untyped_storage().data_ptr() for parameter in self.parameters)
        self.parts: Mapping[str, Module] = {FIRST: module.first, LAST: module.last}
        self.tiles: list[_Tile] = []
        self.rest: tuple[Any, ...] | None = None  # what the module returns behind its output
        self.needs_input_grad = False
        self.stored = 0  # tokens

    def forward(self, hidden: Tensor, needs_input_grad: bool) -> Tensor:
        """The module's output, with a graph for each tile."""
        self.needs_input_grad = needs_input_grad
        self.anchor = torch.empty(0, dtype=hidden.dtype, device=hidden.device, requires_grad=True)
        tokens = hidden.shape[0]
        self.stored = self.store.stored_tokens(tokens)
        output: Tensor | None = None
        for index, (start, stop) in enumerate(spans(tokens, self.num_tiles, self.stored)):
            tile = _Tile(index, start, stop)
            output = self.fill(output, tile.forward(self, hidden), tokens, start, stop)
            self.tiles.append(tile)
        assert output is not None
        return output

    def backward(self, hidden: Tensor, grad_output: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of the input, and of the parameters that need one."""
        if not self.tiles:
            raise ActivationError(
                "backward runs a second time through an MLP that runs in tiles (retain_graph=True); its intermediates "
                "are given back once only. Run one backward pass per forward pass, or set mlp.tiles: off"
            )
        grad_hidden = torch.empty_like(hidden) if self.needs_input_grad else None
        sums = self.sums(self.parameters)
        while self.tiles:
            tile = self.tiles.pop()
            gradient = tile.backward(self, hidden, grad_output, sums)
            if grad_hidden is not None and gradient is not None:
                grad_hidden[tile.start : tile.stop].copy_(gradient)
        return [grad_hidden, *(sums.result(i) if needed else None for i, needed in enumerate(needs))]

    def fill(self, output: Tensor | None, result: Any, tokens: int, start: int, stop: int) -> Tensor:
        """Write a tile's output into that of the whole module, which the first tile makes."""
        part = first_tensor(result)
        assert part is not None
        if part.shape[0] != stop - start:
            raise UnsupportedError(
                f"an MLP returned {part.shape[0]} tokens for {stop - start}; only one that works token by token runs "
                "in tiles"
            )
        if output is None:
            output = part.new_empty((tokens, *part.shape[1:]))
        output[start:stop].copy_(part)
        self.rest = None if isinstance(result, Tensor) else result[1:]
        return output


class _InTiles(torch.autograd.Function):
    """The module as one operation."""

    @staticmethod
    def forward(ctx: Any, call: _Call, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.call = call
        return call.forward(hidden.detach(), ctx.needs_input_grad[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (hidden,) = ctx.saved_tensors
        assert hidden.is_contiguous()
        return None, *ctx.call.backward(hidden, grad_output, ctx.needs_input_grad[2:])


def run_in_tiles(
    module: AbstractTiled,
    hidden: Tensor,
    tiles: int,
    store: AbstractTileStore | None,
    sums: type[GradientSum] = GradientSum,
) -> Any:
    """What `module(hidden)` returns, computed in `tiles` tiles of the tokens of `hidden` [s, b, h].

    `store` keeps what the backward pass needs; None where the result will not go through a backward pass, though it
    may require grad (a layer's replay). The number of tiles is a wish: see `spans`.

    Raises UnsupportedError where the module does not work token by token.
    """
    hidden = hidden.contiguous()
    call = _Call(module, tiles, store or ResidentTiles(), sums)
    if torch.is_grad_enabled() and store is not None:
        output: Tensor = _InTiles.apply(call, hidden, *call.parameters)  # type: ignore[no-untyped-call]
    else:
        output = _OneWay.apply(call, hidden, *call.parameters)  # type: ignore[no-untyped-call]
    return output if call.rest is None else (output, *call.rest)


class _OneWay(torch.autograd.Function):
    """The same without graphs of tiles: evaluation, and replays, which look at what is saved and go no way back."""

    @staticmethod
    def forward(ctx: Any, call: _Call, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        output: Tensor | None = None
        tokens = hidden.shape[0]
        for start, stop in spans(tokens, call.num_tiles, tokens):
            with call.module.running():
                result = call.module(hidden[start:stop])
            output = call.fill(output, result, tokens, start, stop)
        assert output is not None
        return output

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise AssertionError("this graph has no backward pass")


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a linear layer is called with."""
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


def _without_graph(tensor: Tensor) -> Tensor:
    """The tensor without the operator that made it; a parameter stays what it is: Megatron reads its `main_grad`."""
    return tensor if tensor.is_leaf else tensor.detach()


def _never(_: object) -> Tensor:
    raise AssertionError("this graph has no backward pass")
