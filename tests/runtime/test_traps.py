"""The traps of saved-tensor hooks, one test each: what megamem does, and the fault that shows once its guard is gone.

Each job trains a real model on one rank or two; a *mutation* takes one guard out of the engine for the length of a
`with` block. A guard whose removal changes nothing would be dead code, or its test blind.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version

from megamem.testing.trials import HALF, LLAMA, RECOMPUTE, SWAP, error_of, mutated, start_case

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]


def _stored(config: dict[str, Any], case: Any, **options: Any) -> int:
    """Bytes handed to the host in one step of one microbatch."""
    from megamem.testing.parity import train

    trained = train(case, config, num_microbatches=1, steps=1, **options)
    assert trained.engine is not None
    return trained.engine.courier.ledger.bytes_stored


# -- what is stored ----------------------------------------------------------------------------------------------------


def _distinct_bytes(chunks: list[Any], found: dict[str, int]) -> None:
    """Count, byte by byte, what stock layers save that is no parameter: the definition, for one microbatch."""
    import torch

    for layer in chunks[0].module.decoder.layers:
        own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        held: list[torch.Tensor] = []  # so that no address is used twice

        def forward(*args: Any, layer: Any = layer, own: set[int] = own, held: Any = held, **kwargs: Any) -> Any:
            cells: set[int] = set()

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                if tensor.untyped_storage().data_ptr() not in own and tensor.dim() > 0:
                    held.append(tensor)
                    index = torch.arange(tensor.storage_offset(), tensor.untyped_storage().nbytes() // tensor.itemsize)
                    places = index.as_strided(tensor.shape, tensor.stride()).unique()
                    cells.update((places * tensor.itemsize + tensor.untyped_storage().data_ptr()).tolist())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                result = type(layer).forward(layer, *args, **kwargs)
            found["bytes"] = found.get("bytes", 0) + 4 * len(cells)
            return result

        layer.forward = forward


def weights_and_shared_memory() -> dict[str, int]:
    from itertools import count

    from megamem.integrations.megatron_layer import MegatronLayer
    from megamem.runtime.activations import signature
    from megamem.testing.parity import train

    case = start_case()
    found: dict[str, int] = {}
    train(case, num_microbatches=1, steps=1, prepare=lambda chunks: _distinct_bytes(chunks, found))
    stored = {"definition": found["bytes"], "guarded": _stored(SWAP, case)}
    with mutated(MegatronLayer, "parameter_storages", lambda self: frozenset()):
        stored["with weights"] = _stored(SWAP, case)
    real, numbers = signature.own_region, count(1)

    def distinct(tensor: Any, parameters: frozenset[int]) -> Any:
        from dataclasses import replace

        region = real(tensor, parameters)
        return region and replace(region, storage=next(numbers))

    with mutated(signature, "own_region", distinct):
        stored["every time"] = _stored(SWAP, case)
    stored["one layer's weights"] = 4 * (32 * (32 + 32) + 32 * 32 + 32 * 128 + 64 * 32)  # qkv, projection, fc1, fc2
    return stored


def test_weights_are_never_stored_and_shared_memory_is_stored_once(dist: Dist) -> None:
    (stored,) = dist(1)(weights_and_shared_memory)
    assert stored["guarded"] == stored["definition"]
    assert stored["with weights"] >= stored["guarded"] + 2 * stored["one layer's weights"]
    assert stored["every time"] > stored["guarded"]


def _odd_norm(kind: str) -> Callable[[list[Any]], None]:
    """Make every second norm save, besides its input, a tensor that must stay where it is."""
    import torch

    def prepare(chunks: list[Any]) -> None:
        for layer in chunks[0].module.decoder.layers:
            norm = layer.pre_mlp_layernorm
            real = norm.forward

            def expanded(x: torch.Tensor, real: Any = real) -> torch.Tensor:
                return real(x) * x.mean(-1, keepdim=True).expand_as(x)

            def scalar(x: torch.Tensor, real: Any = real, weight: Any = norm.weight) -> torch.Tensor:
                return real(x) * weight.mean()

            norm.forward = expanded if kind == "expanded" else scalar

    return prepare


def odd_tensors(kind: str) -> dict[str, Any]:
    from megamem.runtime.activations import signature
    from megamem.runtime.activations.geometry import Region
    from megamem.testing.parity import train

    case = start_case()
    prepare = _odd_norm(kind)
    stock = train(case, prepare=prepare)
    found: dict[str, Any] = {}
    for name, config in {"swap": SWAP, "recompute": RECOMPUTE, "half": HALF}.items():
        found[name] = train(case, config, prepare=prepare).differences(stock)
    found["bytes"] = _stored(SWAP, case, prepare=prepare)

    def unguarded(tensor: Any, parameters: Any) -> Any:
        storage = tensor.untyped_storage().data_ptr()
        if storage in parameters:
            return None
        return Region(storage, tensor.dtype, tensor.storage_offset(), ((tensor.numel(), 1),))

    with mutated(signature, "own_region", unguarded):
        found["unguarded"] = error_of(lambda: found.update(bytes_unguarded=_stored(SWAP, case, prepare=prepare)))
    return found


def test_an_expanded_tensor_stays_as_it_is(dist: Dist) -> None:
    (found,) = dist(1)(odd_tensors, "expanded")
    assert found["swap"] == found["recompute"] == []
    assert all(float(line.rpartition(" ")[2]) < 1e-5 for line in found["half"] if ": " in line), found["half"]
    assert "out of bounds" in found["unguarded"]


def test_a_tensor_without_dimensions_stays_as_it_is(dist: Dist) -> None:
    (found,) = dist(1)(odd_tensors, "scalar")
    assert found["swap"] == found["recompute"] == []
    assert found["unguarded"] == ""
    assert found["bytes_unguarded"] == found["bytes"] + 2 * 4  # one number in each of two layers


def received_input() -> dict[str, Any]:
    from dataclasses import replace

    from megamem.runtime.activations import engine
    from megamem.testing.parity import train

    case = start_case(pp=2, layers=4)
    stock, guarded = train(case), train(case, SWAP)
    assert guarded.engine is not None
    found: dict[str, Any] = {"differences": guarded.differences(stock)}
    real = engine.make_recipe

    def move(signature: Any, rule: Any, layer: Any, situation: Any) -> Any:
        return real(signature, rule, layer, replace(situation, input_is_held=False))

    with mutated(engine, "make_recipe", move):
        unguarded = train(case, SWAP)
    assert unguarded.engine is not None
    stored = [trained.engine.courier.ledger.bytes_stored for trained in (guarded, unguarded)]  # type: ignore[union-attr]
    return found | {"saved": stored[1] - stored[0]}


def test_an_input_that_the_pipeline_holds_is_not_moved(dist: Dist) -> None:
    first, second = dist(2)(received_input)
    assert first["differences"] == second["differences"] == []
    assert first["saved"] == 0  # what the embedding made is nobody else's
    assert second["saved"] == 2 * 2 * 16 * 2 * 32 * 4  # steps, microbatches, [s, b, h] in fp32


def emptied_storage(guarded: bool) -> dict[str, Any]:
    from megatron.core.tensor_parallel import random as megatron_random

    from megamem.runtime.activations import signature
    from megamem.testing.parity import train

    # Without Transformer Engine Megatron's class needs `fp8=None` to keep off names that it failed to import, and
    # `TransformerLayer` does not pass it: give it that default. All else is Megatron's own code.
    with mutated(megatron_random.CheckpointWithoutOutput.__init__, "__defaults__", (None,)):
        config = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
        case, plain = start_case(config=config), _case_again()
        stock = train(case)
        if guarded:
            found: dict[str, Any] = {"upstream": stock.differences(train(plain))}
            for name, options in {"swap": SWAP, "recompute": RECOMPUTE, "base": {**SWAP, "swap_fraction": 0}}.items():
                found[name] = train(case, options).differences(stock)
            return found
        real = signature.own_region

        def unguarded(tensor: Any, parameters: frozenset[int]) -> Any:
            if tensor.untyped_storage().nbytes() == 0:
                return signature.region_of(tensor)
            return real(tensor, parameters)

        with mutated(signature, "own_region", unguarded):
            if differences := train(case, SWAP).differences(stock):
                raise AssertionError(f"wrong gradients: {differences}")
        return {}


def _case_again() -> Any:
    from megamem.testing.models import GptCase

    return GptCase(**LLAMA)


def test_storage_that_megatron_emptied_is_left_to_megatron(dist: Dist) -> None:
    from megamem.testing.dist import RankError

    if Version(version("megatron-core")) < Version("0.16"):  # there it loses gradients under any saved-tensor hooks
        with pytest.raises(RankError, match="recompute_modules layernorm lose gradients"):
            dist(1)(emptied_storage, True)
        return
    assert dist(1)(emptied_storage, True) == [{"upstream": [], "swap": [], "recompute": [], "base": []}]
    with pytest.raises(RankError):  # memory that is not there is read: a segmentation fault, an error or nonsense
        dist(1)(emptied_storage, False)


# -- in-place changes and repeated backward passes ---------------------------------------------------------------------


def _spoil_input(chunks: list[Any]) -> None:
    """After the second layer has run, change its input in place."""
    import torch

    def hook(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            with torch.no_grad():
                kwargs["hidden_states"].mul_(2)

    chunks[0].module.decoder.layers[1].register_forward_hook(hook, with_kwargs=True)


def in_place(config: dict[str, Any] | None) -> dict[str, Any]:
    from megamem.runtime.activations.capture import Handle
    from megamem.runtime.activations.run import LayerRun
    from megamem.testing.parity import train

    case = start_case(layers=3)
    found: dict[str, Any] = {"error": error_of(lambda: train(case, config, prepare=_spoil_input))}
    if config is None:
        return found
    clean = train(case)

    def spoiled() -> None:
        got = train(case, config, prepare=_spoil_input, steps=1, num_microbatches=1)
        found["wrong gradients"] = got.differences(train(case, steps=1, num_microbatches=1))

    unchecked = mutated(LayerRun, "version_check", lambda run, tensors, names: lambda: None)
    with unchecked, mutated(Handle, "check_version", lambda handle: None):
        found["unguarded"] = error_of(spoiled)
    found["after"] = train(case).differences(clean)
    return found


@pytest.mark.parametrize("config", [SWAP, RECOMPUTE], ids=["swapped", "kept"])
def test_a_tensor_changed_in_place_is_refused_by_name(dist: Dist, config: dict[str, Any]) -> None:
    assert "modified by an inplace operation" in dist(1)(in_place, None)[0]["error"]  # torch's own check, without hooks
    (found,) = dist(1)(in_place, config)
    assert found["error"].startswith("ActivationError: ")
    assert ("layer_input" in found["error"] and "layer 2" in found["error"]) or "shape [16, 2, 32]" in found["error"]
    assert "changed in place" in found["error"]
    assert found["unguarded"] == ""  # torch says nothing while hooks are installed ...
    assert found["wrong gradients"]  # ... and the gradients are wrong
    assert found["after"] == []  # a failed step leaves nothing behind


def _loss(case: Any) -> tuple[Any, Any]:
    from megamem.testing.models import batches, build_gpt

    (chunk,) = build_gpt(case)
    (batch,) = batches(case, 1)
    # Not Megatron's own loss: its backward pass writes over what it saved, and so runs only once anyway.
    return chunk, chunk(batch.tokens, batch.positions, batch.mask).square().mean()


def twice(config: dict[str, Any]) -> dict[str, Any]:
    import megamem
    from megamem.testing.models import global_names

    case = start_case(ddp=False)
    found: dict[str, Any] = {}
    with megamem.enable({"activations": config}) as handle:
        _, loss = _loss(case)
        loss.backward(retain_graph=True)
        found["error"] = error_of(loss.backward)
        found["once"] = error_of(lambda: _loss(case)[1].backward(retain_graph=True))
        chunk, first = _loss(case)
        first.backward()
        once = {name: p.grad.clone() for name, p in global_names(chunk) if p.grad is not None}
        from megamem.runtime.activations.capture import Handle

        def unpack(handle: Any) -> Any:
            if handle.source is None:
                return handle.tensor
            if handle.entry.memory is None:
                handle.source.materialize()
            memory = handle.entry.memory
            return memory if handle.geometry is None else handle.geometry.view(memory)

        with mutated(Handle, "unpack", unpack):
            chunk, loss = _loss(case)
            loss.backward(retain_graph=True)
            loss.backward()
        found["ratio"] = {
            round(float((p.grad / once[name]).nanmean()), 3) for name, p in global_names(chunk) if p.grad is not None
        }
        assert handle.engine is not None
        found["open"] = handle.engine.courier.ledger.num_live
    return found


@pytest.mark.parametrize("config", [SWAP, RECOMPUTE, HALF], ids=["swap", "recompute", "half"])
def test_a_second_backward_pass_is_refused_and_leaves_nothing_open(dist: Dist, config: dict[str, Any]) -> None:
    (found,) = dist(1)(twice, config)
    assert found["error"].startswith("ActivationError: backward runs a second time")
    assert "retain_graph" in found["error"]
    assert found["once"] == ""  # to keep a graph and not use it again is harmless
    assert found["open"] == 0
    assert found["ratio"] == {2.0}  # without the guard: right, but every activation held twice over, unaccounted


def dropped(config: dict[str, Any], times: int) -> dict[str, Any]:
    import megamem
    from megamem.runtime.activations.capture import Handle
    from megamem.runtime.activations.parcels import Parcel

    case = start_case(ddp=False)
    found: dict[str, Any] = {}
    with megamem.enable({"activations": {**config, "host_memory": "16MiB"}}) as handle:
        _loss(case)
        engine = handle.engine
        assert engine is not None

        def many() -> list[int]:
            in_use = []
            for _ in range(times):
                _loss(case)
                engine.courier.flush()
                in_use.append(engine.courier.arena.in_use + engine.stats.retained.now)
            return in_use

        gc.collect()
        gc.disable()  # ranks collect garbage at moments of their own, and must fill their arenas alike
        try:
            found["in use"] = many()
        finally:
            gc.enable()
        gc.collect()
        engine.courier.flush()
        found["after"] = (engine.courier.arena.in_use, engine.courier.ledger.num_live, engine.stats.retained.now)
        with mutated(Parcel, "__del__", lambda parcel: None), mutated(Handle, "keep", lambda handle: None):
            many()
            gc.collect()
            engine.courier.flush()
            found["unguarded"] = engine.courier.arena.in_use + engine.stats.retained.now
    return found


@pytest.mark.parametrize("config", [SWAP, RECOMPUTE, HALF], ids=["swap", "recompute", "half"])
def test_a_graph_dropped_without_a_backward_pass_returns_what_it_holds(dist: Dist, config: dict[str, Any]) -> None:
    (found,) = dist(1)(dropped, config, 20)
    assert found["after"] == (0, 0, 0)
    assert found["unguarded"] > 0
    assert set(found["in use"]) == {0}, "only the garbage collector returns it"


# -- other people's hooks ----------------------------------------------------------------------------------------------


def outer_hooks() -> dict[str, Any]:
    import torch

    import megamem
    from megamem.runtime.activations import engine

    case = start_case(ddp=False)
    found: dict[str, Any] = {}
    with megamem.enable({"activations": SWAP}):
        with torch.autograd.graph.save_on_cpu():
            found["error"] = error_of(lambda: _loss(case))
        seen: list[tuple[int, ...]] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(tensor.shape))
            return tensor

        outer = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with mutated(engine, "_refuse_outer_hooks", lambda layer: None), outer:
            _loss(case)[1].backward()
    found["inside"] = (16, 2, 2 * 64) in seen  # output of the gated fc1
    with outer:
        _loss(case)
    found["stock"] = (16, 2, 2 * 64) in seen or any(shape[-1] == 64 for shape in seen if len(shape) > 1)
    return found


def test_saved_tensor_hooks_around_a_layer_are_refused(dist: Dist) -> None:
    (found,) = dist(1)(outer_hooks)
    assert found["error"].startswith("UnsupportedError: layer 1 runs inside somebody else's saved-tensor hooks")
    assert not found["inside"]  # together, the outer pair never sees a layer's tensors
    assert found["stock"]
