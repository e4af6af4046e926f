"""The traps of running a layer's forward again: random numbers, other lengths, layers that are not token-wise.

As in `test_traps.py`, each fault is shown once its guard is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megamem.testing.trials import HALF, RECOMPUTE, RESIDUAL, SWAP, error_of, mutated, start_case

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]


# -- random numbers ----------------------------------------------------------------------------------------------------


def dropout(fields: dict[str, Any]) -> dict[str, Any]:
    import torch

    from megamem.integrations.megatron_layer import MegatronLayer
    from megamem.runtime.activations.replay import Replay
    from megamem.testing.parity import train

    case = start_case(dropout=0.2, layers=3, **fields)
    stock = train(case)
    found: dict[str, Any] = {
        name: train(case, config).differences(stock)
        for name, config in {"swap": SWAP, "recompute": RECOMPUTE, "residual": RESIDUAL}.items()
    }
    real_set, real_get, given = MegatronLayer.set_random_state, MegatronLayer.random_state, []

    def in_backward() -> bool:  # not while the layer is learned, or verification refuses it
        return torch._C._current_graph_task_id() != -1

    def never(layer: Any, state: Any) -> None:
        if not in_backward():
            real_set(layer, state)

    with mutated(MegatronLayer, "set_random_state", never):
        found["never set"] = train(case, RECOMPUTE).differences(stock)

    def remembering(layer: Any) -> Any:
        given.append(real_get(layer))
        return given[-1]

    def not_back(layer: Any, state: Any) -> None:
        if not in_backward() or state is not given[-1]:
            real_set(layer, state)

    with mutated(MegatronLayer, "random_state", remembering), mutated(MegatronLayer, "set_random_state", not_back):
        found["not restored"] = train(case, RECOMPUTE).differences(stock)
    skip = Replay._on_call

    def not_skipping(replay: Any, path: str, original: Any, args: Any, kwargs: Any) -> Any:
        states, replay._random_states = replay._random_states, [] if in_backward() else replay._random_states
        result = skip(replay, path, original, args, kwargs)
        replay._random_states = states
        return result

    with mutated(Replay, "_on_call", not_skipping):
        found["attention's numbers not skipped"] = train(case, RECOMPUTE).differences(stock)
    return found


LAYOUTS = {"one rank": (1, {}), "tp2": (2, {"tp": 2}), "tp2 sp": (2, {"tp": 2, "sp": True})}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_masks_come_again_and_the_random_stream_goes_on_as_in_stock(dist: Dist, layout: str) -> None:
    """Attention draws from the tensor-parallel stream or, under sequence parallelism, from the common one."""
    nranks, fields = LAYOUTS[layout]
    for found in dist(nranks)(dropout, fields):
        assert found["swap"] == found["recompute"] == found["residual"] == []
        assert len(found["never set"]) > 5
        assert "random state" in found["not restored"] and "losses" in found["not restored"]
        # Only under sequence parallelism do attention and the other dropouts of a layer share a stream.
        assert bool(found["attention's numbers not skipped"]) == ("sp" in fields)


# -- other tensors than when the layer was learned ---------------------------------------------------------------------


def _step(chunk: Any, case: Any, length: int, seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, case.vocab, (case.microbatch, length + 1), generator=generator)
    positions = torch.arange(length).expand(case.microbatch, -1)
    chunk(text[:, :-1].contiguous(), positions, None, labels=text[:, 1:].contiguous()).mean().backward()


def _evaluate(chunk: Any, case: Any, *, grad: bool) -> None:
    import torch

    chunk.eval()
    with torch.set_grad_enabled(grad):
        tokens = torch.ones(case.microbatch, case.sequence, dtype=torch.long)
        loss = chunk(tokens, torch.arange(case.sequence).expand(case.microbatch, -1), None, labels=tokens).mean()
    if grad:
        loss.backward()
    chunk.train()


LENGTHS = (16, 12, 16, 5, 3, 16, 12, 4)


def _wandering(
    case: Any, config: dict[str, Any], frozen: bool, lengths: tuple[int, ...] = LENGTHS
) -> tuple[dict[str, Any], Any]:
    """Gradients of microbatches of many lengths, evaluations with and without gradients, a weight frozen on the way."""
    import megamem
    from megamem.testing.models import build_gpt, global_names
    from megamem.testing.parity import seed_everything

    seed_everything()
    with megamem.enable({"activations": config}) as handle:
        (chunk,) = build_gpt(case)
        for seed, length in enumerate(lengths):
            _step(chunk, case, length, seed)
            _evaluate(chunk, case, grad=seed % 2 == 1)
            if frozen and seed == 3:
                chunk.decoder.layers[1].mlp.linear_fc1.weight.requires_grad_(False)
        gradients = {name: p.grad.clone() for name, p in global_names(chunk) if p.grad is not None}
        return gradients, handle.engine


def other_tensors(
    dropout: float, frozen: bool, configs: dict[str, Any], lengths: tuple[int, ...] = LENGTHS
) -> dict[str, Any]:
    from megamem.runtime.activations.signature import Signature
    from megamem.testing.parity import relative_error

    case = start_case(ddp=False, layers=3, dropout=dropout)
    stock, _ = _wandering(case, {"policy": "off"}, frozen, lengths)
    found: dict[str, Any] = {}
    for name, config in configs.items():
        gradients, engine = _wandering(case, config, frozen, lengths)
        assert gradients.keys() == stock.keys()
        found[name] = max(relative_error(gradients[key], stock[key]) for key in stock)
        found[name + ", unplanned"] = engine.stats.num_unplanned
        found[name + ", open"] = engine.courier.ledger.num_live
    with mutated(Signature, "matches", lambda signature, packed: True):
        found["unguarded"] = error_of(lambda: _wandering(case, configs["swap"], frozen, lengths))
    return found


def test_microbatches_of_any_length_and_evaluations_between_them_stay_right(dist: Dist) -> None:
    configs = {"swap": SWAP, "recompute": RECOMPUTE, "half": HALF}
    (found,) = dist(1)(other_tensors, 0.0, False, configs)
    assert (found["swap"], found["recompute"]) == (0, 0)
    assert found["half"] < 1e-5
    assert all(found[f"{name}, unplanned"] == found[f"{name}, open"] == 0 for name in configs)  # a signature a length


def test_a_microbatch_too_short_to_be_cut_is_stored_whole(dist: Dist) -> None:
    (found,) = dist(1)(other_tensors, 0.0, False, {"swap": SWAP, "half": HALF}, (16, 1, 2, 16))
    assert found["swap"] == 0
    assert found["half"] < 1e-5


@pytest.mark.parametrize(("dropout", "frozen"), [(0.2, False), (0.0, True)], ids=["dropout off", "weight frozen"])
def test_a_layer_that_saves_other_tensors_is_learned_anew(dist: Dist, dropout: float, frozen: bool) -> None:
    configs = {"swap": SWAP, "recompute": RECOMPUTE, "residual": RESIDUAL}
    (found,) = dist(1)(other_tensors, dropout, frozen, configs)
    assert (found["swap"], found["recompute"], found["residual"]) == (0, 0, 0)
    assert all(found[f"{name}, unplanned"] > 0 and found[f"{name}, open"] == 0 for name in configs)
    assert found["unguarded"]  # wrong tensors to the wrong places: an error at best


# -- layers that are not what they seem --------------------------------------------------------------------------------


def _mixing(chunks: list[Any]) -> None:
    """Make the MLP's norm of each layer look one token back, as a token shift or a convolution does."""
    for layer in chunks[0].module.decoder.layers:
        norm = layer.pre_mlp_layernorm
        norm.forward = lambda x, real=norm.forward: real(x) + 0.5 * real(x).roll(1, 0).tanh()


def _fickle(chunks: list[Any]) -> None:
    """Make a layer compute something else when it runs again."""
    for layer in chunks[0].module.decoder.layers:
        norm, calls = layer.pre_mlp_layernorm, [0]
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.__setitem__(0, 0))

        def forward(x: Any, real: Any = norm.forward, calls: list[int] = calls) -> Any:
            calls[0] += 1
            return real(x) * (2.0 if calls[0] == 1 else 1.0)

        norm.forward = forward


def not_token_wise(kind: str) -> dict[str, Any]:
    from megamem.errors import UnsupportedError
    from megamem.runtime.activations import signature
    from megamem.testing.parity import train

    case, prepare = start_case(), _mixing if kind == "mixing" else _fickle
    stock = train(case, prepare=prepare)
    found: dict[str, Any] = {"swap": train(case, SWAP, prepare=prepare).differences(stock)}
    for name, config in {"half": HALF, "recompute": RECOMPUTE}.items():
        for verify in (True, False):
            where = name if verify else f"{name}, unverified"
            options = {**config, "verify": verify}
            try:
                found[where] = train(case, options, prepare=prepare).differences(stock)
            except UnsupportedError as error:
                found[where] = str(error)
    with mutated(signature._Learner, "_close", lambda self, one, other: True):
        unguarded = train(case, HALF if kind == "mixing" else RECOMPUTE, prepare=prepare)
        found["unguarded"] = unguarded.differences(stock)
    return found


def test_a_layer_that_mixes_tokens_is_replayed_whole_or_refused(dist: Dist) -> None:
    (found,) = dist(1)(not_token_wise, "mixing")
    assert found["swap"] == found["recompute"] == found["recompute, unverified"] == []
    assert found["half"].startswith("layer 1: a fraction of 0.5 is not possible")
    assert "it gives other values on a part of its tokens" in found["half"]
    assert found["half, unverified"] == found["half"]
    assert any("fc1" in line and float(line.rpartition(" ")[2]) > 1e-3 for line in found["unguarded"])


def test_a_layer_that_does_something_else_when_run_again_is_refused_unless_told_not_to_verify(dist: Dist) -> None:
    (found,) = dist(1)(not_token_wise, "fickle")
    assert found["swap"] == []
    for name in ("half", "recompute"):
        assert found[name].startswith("layer 1: running it again does not give back what it saved at mlp")
        assert "verify: false" in found[name]
    assert found["recompute, unverified"] == []  # what no replay brings is then stored whole
    assert found["unguarded"]
