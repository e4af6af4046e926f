"""Modules in tiles: the same gradients, no product twice, nothing but what is stored between the passes."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pip install 'megamem[train]'")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import Linear, Module, Parameter  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from megamem.errors import ActivationError, UnsupportedError  # noqa: E402
from megamem.ir.tiles import spans  # noqa: E402
from megamem.runtime.tiles.graph import run_in_tiles  # noqa: E402
from megamem.runtime.tiles.parts import AbstractTiled, AbstractTileStore, ResidentTiles  # noqa: E402
from megamem.testing.live import LiveStorages  # noqa: E402

TOKENS, BATCH, HIDDEN, FFN = 24, 2, 8, 32


class Mlp(Module):
    """As Megatron's: (output, bias of the last layer, to be added by the caller)."""

    def __init__(self, kind: str, dtype: Any = torch.float64) -> None:
        super().__init__()
        self.kind = kind
        self.first = Linear(HIDDEN, 2 * FFN if kind == "swiglu" else FFN, bias=kind != "swiglu", dtype=dtype)
        self.last = Linear(FFN, HIDDEN, bias=False, dtype=dtype)
        self.bias = Parameter(torch.randn(HIDDEN, dtype=dtype))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        between = self.first(hidden)
        if self.kind == "swiglu":
            gate, up = between.chunk(2, dim=-1)
            between = F.silu(gate) * up
        elif self.kind == "relu, in place":
            between = F.relu_(between)
        else:
            between = F.gelu(between)
        if self.kind == "over all tokens":
            between = between - between.mean(dim=0, keepdim=True)
        if self.kind == "drops a token":
            between = between[1:]
        return self.last(between), self.bias


class Tiled(AbstractTiled):
    def __init__(self, module: Mlp) -> None:
        self.module, self.first, self.last = module, module.first, module.last
        self.calls = 0

    def __call__(self, tokens: Tensor) -> Any:
        self.calls += 1
        return self.module.forward(tokens)

    def running(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def parameters(self) -> Sequence[Parameter]:
        return list(self.module.parameters())


class Partly(AbstractTileStore):
    """Stores the first `share` of the tokens, for as long as there is room."""

    def __init__(self, share: float, room: int = 1 << 30) -> None:
        self.share, self.room = share, room
        self.tiles = ResidentTiles()
        self.stored: list[int] = []
        self.recomputed = 0

    def stored_tokens(self, tokens: int) -> int:
        return int(self.share * tokens)

    def put(self, tile: int, tensors: Sequence[Tensor]) -> bool:
        if len(self.stored) == self.room:
            return False
        self.stored.append(tile)
        return self.tiles.put(tile, tensors)

    def take(self, tile: int) -> list[Tensor]:
        return self.tiles.take(tile)

    def on_recomputed(self, nbytes: int) -> None:
        self.recomputed += nbytes


def run(module: Mlp, hidden: Tensor, tiles: int | None, store: AbstractTileStore | None = None) -> dict[str, Any]:
    """Output and all gradients; `tiles` None: by autograd alone."""
    hidden = hidden.detach().requires_grad_(hidden.requires_grad)
    module.zero_grad(set_to_none=True)
    result = module(hidden) if tiles is None else run_in_tiles(Tiled(module), hidden, tiles, store or ResidentTiles())
    output, bias = result
    assert bias is module.bias
    (output + bias).backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape))
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"output": output.detach(), "hidden": hidden.grad, **gradients}


def make(kind: str, dtype: Any = torch.float64) -> tuple[Mlp, Tensor]:
    torch.manual_seed(0)
    return Mlp(kind, dtype), torch.randn(TOKENS, BATCH, HIDDEN, dtype=dtype, requires_grad=True)


def check_equal(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-13) -> None:
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        got = found[name]
        assert (got is None) == (right is None), name
        if right is not None:
            assert float((got - right).norm() / right.norm()) < tolerance, name


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("tiles", [1, 2, 5, 24, 99])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_gradients_are_those_of_the_module(kind: str, tiles: int, share: float) -> None:
    module, hidden = make(kind)
    store = Partly(share)
    check_equal(run(module, hidden, tiles, store), run(module, hidden, None))
    assert store.stored == [*range(len(store.stored))]
    assert bool(store.stored) == (share > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tile_is_bitwise_equal(dtype: Any) -> None:
    for kind in ("gelu", "swiglu"):
        module, hidden = make(kind, dtype)
        expected = run(module, hidden, None)
        for name, got in run(module, hidden, 1).items():
            assert torch.equal(got, expected[name]), (kind, name)


def test_what_finds_no_room_is_made_again() -> None:
    module, hidden = make("swiglu")
    store = Partly(1.0, room=2)
    check_equal(run(module, hidden, 6, store), run(module, hidden, None))
    assert store.stored == [0, 1]
    one = TOKENS // 6 * BATCH * FFN * 8
    assert store.recomputed == 6 * one + 4 * 2 * one  # six times the activation's output, four times the first layer's


@pytest.mark.parametrize("frozen", ["hidden", "first", "last", "weights"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    module, hidden = make("gelu")
    hidden.requires_grad_(frozen != "hidden")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not (name.startswith(frozen) or (frozen == "weights" and name != "bias")))
    check_equal(run(module, hidden, 4), run(module, hidden, None))


def test_hooks_on_parameters_run_once() -> None:
    """As Megatron's DDP has them, on the node that accumulates."""
    module, hidden = make("gelu")
    calls: list[str] = []
    nodes = []
    for name, parameter in module.named_parameters():
        node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        node.register_hook(lambda *_, name=name: calls.append(name))  # type: ignore[union-attr]
        nodes.append(node)
    run(module, hidden, 6)
    assert sorted(calls) == sorted(name for name, _ in module.named_parameters())


@pytest.mark.parametrize(("share", "again"), [(1.0, 0), (0.5, 0.5), (0.0, 1)])
def test_no_product_is_computed_twice_unless_asked_for(share: float, again: float) -> None:
    module, hidden = make("swiglu")
    counts = []
    for tiles in (None, 6):
        with FlopCounterMode(display=False) as counter:
            run(module, hidden, tiles, Partly(share))
        counts.append(counter.get_total_flops())
    first = 2 * TOKENS * BATCH * HIDDEN * 2 * FFN
    assert counts[1] - counts[0] == again * first


def held(tiles: int | None, share: float) -> tuple[int, int, int]:
    """Bytes alive between the passes, and at most in each, besides input, output, weights and their gradients."""
    module, hidden = make("swiglu")
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradient = torch.ones(TOKENS, BATCH, HIDDEN, dtype=hidden.dtype)
    with LiveStorages() as live:
        result = module(hidden) if tiles is None else run_in_tiles(Tiled(module), hidden, tiles, Partly(share))
        output = result[0]
        del result
        between = live.live_bytes() - output.nbytes
        forward = live.peak_bytes - output.nbytes
        live.reset_peak()
        output.backward(gradient)
        return between, forward, live.peak_bytes - output.nbytes


def test_the_peak_falls_with_the_tiles() -> None:
    one = TOKENS * BATCH * FFN * 8  # a tensor as wide as the activation's output
    weights = 3 * HIDDEN * FFN * 8
    between, forward, backward = held(None, 1.0)
    assert between >= 4 * one  # first layer's output, silu(gate), the product; the gate is a view
    for share in (1.0, 0.0):
        stored, ahead, back = held(8, share)
        assert stored == share * 2 * one  # first layer's output
        assert ahead <= stored + 5 * one / 8 + 2 * HIDDEN * BATCH * TOKENS * 8
        assert back <= stored + 10 * one / 8 + 3 * HIDDEN * BATCH * TOKENS * 8 + 3 * weights
        assert ahead < forward and back < backward


def test_a_graph_that_is_dropped_lets_go_at_once() -> None:
    """Not by the cyclic collector, which comes at different moments on different ranks."""
    module, hidden = make("gelu")
    gc.disable()
    try:
        store = Partly(1.0)
        known = weakref.ref(store)
        output, _ = run_in_tiles(Tiled(module), hidden, 4, store)
        del store
        assert known() is not None
        del output
        assert known() is None
    finally:
        gc.enable()


def test_a_second_backward_pass_is_refused() -> None:
    module, hidden = make("gelu")
    output, _ = run_in_tiles(Tiled(module), hidden, 4, ResidentTiles())
    output.sum().backward(retain_graph=True)
    with pytest.raises(ActivationError, match="retain_graph"):
        output.sum().backward()


@pytest.mark.parametrize(("kind", "reason"), [("relu, in place", "in place"), ("drops a token", "token by token")])
def test_modules_that_do_not_work_in_tiles_are_refused(kind: str, reason: str) -> None:
    module, hidden = make(kind)
    with pytest.raises(UnsupportedError, match=reason):
        run_in_tiles(Tiled(module), hidden, 4, ResidentTiles())


def test_a_module_that_calls_no_linear_layer_is_refused() -> None:
    module, hidden = make("gelu")
    tiled = Tiled(module)
    tiled.first = Linear(1, 1)
    with pytest.raises(UnsupportedError, match="first linear layer"):
        run_in_tiles(tiled, hidden, 4, ResidentTiles())


def test_without_gradients_nothing_is_stored() -> None:
    module, hidden = make("gelu")
    store = Partly(1.0)
    with torch.no_grad(), LiveStorages() as live:
        output, bias = run_in_tiles(Tiled(module), hidden, 6, store)
    assert bias is module.bias and not output.requires_grad and store.stored == []
    assert float((output - module(hidden)[0]).detach().abs().max()) < 1e-13
    assert live.peak_bytes <= 2 * output.nbytes + 3 * TOKENS * BATCH * FFN * 8 / 6


def test_a_replay_stores_nothing_and_saves_the_same() -> None:
    module, hidden = make("gelu")
    saved: dict[bool, list[Any]] = {}
    for is_replay in (False, True):
        packed: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda _: None):
            output, _ = run_in_tiles(Tiled(module), hidden, 6, None if is_replay else ResidentTiles())
        assert output.requires_grad
        saved[is_replay] = packed
    assert len(saved[True]) == 1 and len(saved[False]) == 6 + 1  # the first layer's output by tile, and the input
    assert torch.equal(saved[True][0], saved[False][-1])


def test_an_input_with_gaps() -> None:
    module, hidden = make("gelu")
    wide = torch.randn(BATCH, TOKENS, HIDDEN, dtype=hidden.dtype).transpose(0, 1).requires_grad_()
    check_equal(run(module, wide, 5), run(module, wide, None))


def test_weight_gradients_are_summed_in_fp32() -> None:
    """Of many tiles that cancel: in bf16 the small sum would be lost among its large parts."""
    module, hidden = make("gelu", torch.bfloat16)
    exact, _ = make("gelu", torch.float64)
    exact.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    expected = run(exact, hidden.detach().double().requires_grad_(), None)
    errors = {}
    for tiles in (None, TOKENS):
        found = run(module, hidden, tiles)
        errors[tiles] = {
            name: float((found[name].double() - right).norm() / right.norm()) for name, right in expected.items()
        }
    for name in ("first.weight", "last.weight"):
        assert errors[TOKENS][name] < 1.5 * errors[None][name]


def test_cuts_cover_the_tokens_and_respect_what_is_stored() -> None:
    for tokens in (1, 2, 7, 16, 100):
        for tiles in (1, 2, 3, 7, 100, 1000):
            longest = -(-tokens // tiles)
            for stored in range(tokens + 1):
                found = spans(tokens, tiles, stored)
                assert [token for start, stop in found for token in range(start, stop)] == [*range(tokens)]
                assert all(stop - start <= longest for start, stop in found)
                assert all(stop <= stored or start >= stored for start, stop in found)
                assert len(found) <= min(tiles, tokens) + 1
