"""V placement of real GPT models: what each chunk holds, and that training is bitwise that of stock pipelines."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]

LLAMA: Fields = {"layers": 8, "hidden": 16, "activation": "swiglu", "norm": "RMSNorm", "bias": False, "kv_groups": 2}
GPT: Fields = {"layers": 8, "hidden": 16, "position": "learned_absolute", "tied": True}


def _case(fields: Fields) -> Any:
    """Megatron's groups anew, for a rank that runs several layouts in one call."""
    from megatron.core import parallel_state

    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.parity import seed_everything

    parallel_state.destroy_model_parallel()
    case = GptCase(**fields)
    init_parallel(case)
    seed_everything()
    return case


def f_then_b(placement: Any, **call: Any) -> list[Any]:
    """The plainest schedule on a V: all forward passes, then all backward passes, with blocking messages."""
    import torch
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.utils import get_model_config

    placement.check_model(call["model"])
    config, length = get_model_config(call["model"][0]), call["seq_length"]
    if config.sequence_parallel:
        length //= config.tensor_model_parallel_size
    shape = (length, call["micro_batch_size"], config.hidden_size)
    ends = _Ends(placement, lambda: torch.empty(shape, dtype=config.pipeline_dtype, requires_grad=True))
    losses: list[Any] = []
    tokens = torch.zeros([], dtype=torch.int)
    inputs: dict[Any, Any] = {}
    outputs: dict[Any, Any] = {}
    order = [(chunk, index) for index in range(call["num_microbatches"]) for chunk in (0, 1)]
    for chunk, index in order:
        inputs[chunk, index] = ends.receive(chunk, -1, outputs.get((chunk - 1, index)))
        with placement.as_stage(chunk):
            outputs[chunk, index], counted = schedules.forward_step(
                call["forward_step_func"], call["data_iterator"][chunk], call["model"][chunk],
                call["num_microbatches"], inputs[chunk, index], losses, config, 1,
                current_microbatch=index, vp_stage=chunk, is_last_stage=placement.is_last(chunk),
            )  # fmt: skip
        tokens += counted
        ends.send(chunk, +1, outputs[chunk, index])
    gradients: dict[Any, Any] = {}
    for chunk, index in [] if call.get("forward_only") else sorted(order, key=lambda item: (item[1], -item[0])):
        gradient = ends.receive(chunk, +1, gradients.get((chunk + 1, index)))
        step = functools.partial(schedules.backward_step, inputs[chunk, index], outputs[chunk, index], gradient)
        gradients[chunk, index] = step(config) if not _has_model_type() else step(None, config)
        ends.send(chunk, -1, gradients[chunk, index])
    if config.finalize_model_grads_func is not None and not call.get("forward_only"):
        placement.hand_over_tokens(tokens)
        config.finalize_model_grads_func(call["model"], tokens if config.calculate_per_token_loss else None)
    return placement.hand_over_losses(losses)  # type: ignore[no-any-return]


def _has_model_type() -> bool:
    import inspect

    from megatron.core.pipeline_parallel import schedules

    return "model_type" in inspect.signature(schedules.backward_step).parameters


class _Ends:
    """Messages between stages of a V; within a rank they are handed over."""

    def __init__(self, placement: Any, empty: Callable[[], Any]) -> None:
        from megatron.core import parallel_state

        self._v, self._empty = placement, empty
        self._group = parallel_state.get_pipeline_model_parallel_group()

    def _peer(self, chunk: int, step: int) -> int | None:
        stage = self._v.stage(chunk) + step
        return self._v.placement.rank_of(stage) if 0 <= stage < self._v.placement.num_stages else None

    def receive(self, chunk: int, step: int, here: Any) -> Any:
        import torch.distributed as dist

        peer = self._peer(chunk, step)
        if peer is None:
            return None
        if peer == self._group.rank():
            return here.detach().requires_grad_()
        buffer = self._empty()
        dist.recv(buffer.data, dist.get_global_rank(self._group, peer), group=self._group)
        return buffer

    def send(self, chunk: int, step: int, tensor: Any) -> None:
        import torch.distributed as dist

        peer = self._peer(chunk, step)
        if peer not in (None, self._group.rank()):
            dist.send(tensor.detach(), dist.get_global_rank(self._group, peer), group=self._group)


@contextlib.contextmanager
def _pipeline(kind: str) -> Any:
    """The schedule to give to `train_steps` for a layout: None is Megatron's own."""
    from megamem.integrations.placement import v_placed

    if kind != "v":
        yield None
        return
    with v_placed() as placement:
        yield functools.partial(f_then_b, placement)


def _layout(kind: str, pp: int) -> Fields:
    return {"pp": pp, "vpp": None if kind == "1f1b" else 2}


# -- what is built -----------------------------------------------------------------------------------------------------


def chunk_map(fields: Fields) -> list[Any]:
    from megamem.integrations.placement import v_placed
    from megamem.testing.models import build_gpt, unwrap

    case = _case(fields)
    with v_placed():
        chunks = [unwrap(chunk) for chunk in build_gpt(case)]
    return [
        (
            [layer.layer_number for layer in chunk.decoder.layers],
            chunk.pre_process,
            chunk.post_process,
            chunk.decoder.final_layernorm is not None,
        )
        for chunk in chunks
    ]


def test_rank_r_holds_the_stages_r_and_2p_minus_1_minus_r(dist: Dist) -> None:
    assert dist(2)(chunk_map, {**LLAMA, **_layout("v", 2)}) == [
        [([1, 2], True, False, False), ([7, 8], False, True, True)],
        [([3, 4], False, False, False), ([5, 6], False, False, False)],
    ]


# -- what is computed --------------------------------------------------------------------------------------------------


def _train(kind: str, fields: Fields, steps: int = 2, adam: bool = False) -> Any:
    from megamem.testing.models import build_gpt, build_optimizer, global_names, train_steps

    case = _case({**fields, **_layout(kind, fields["pp"])})
    with _pipeline(kind) as schedule:
        chunks = build_gpt(case)
        optimizer = build_optimizer(chunks, case, clip_grad=0.0) if adam else None
        losses, gradients = train_steps(
            chunks, case, num_microbatches=4, steps=steps, optimizer=optimizer, schedule=schedule
        )
    names = [(name, parameter.data.clone()) for chunk in chunks for name, parameter in global_names(chunk)]
    return losses, gradients, names


def train_all(kinds: tuple[str, ...], fields: Fields, adam: bool = False) -> dict[str, Any]:
    return {kind: _train(kind, fields, adam=adam) for kind in kinds}


def _merged(results: list[Any], kind: str) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
    """Losses of the last rank, gradients and parameters of all ranks; copies of one parameter must be equal."""
    import torch

    losses = results[-1][kind][0]
    gradients: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    for result in results:
        gradients |= result[kind][1]
        for name, value in result[kind][2]:
            assert torch.equal(parameters.setdefault(name, value), value), f"{kind}: copies of {name} differ"
    return losses, gradients, parameters


def _check_equal(results: list[Any], kind: str, stock: str) -> None:
    import torch

    ours, theirs = _merged(results, kind), _merged(results, stock)
    assert len(theirs[0]) == 8 and ours[0] == theirs[0]
    for found, expected in zip(ours[1:], theirs[1:], strict=True):
        assert set(found) == set(expected)
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("fields", [LLAMA, GPT], ids=["llama", "tied"])
def test_losses_and_gradients_are_bitwise_those_of_1f1b(dist: Dist, fields: Fields) -> None:
    results = dist(2)(train_all, ("v", "1f1b"), {**fields, "pp": 2})
    assert all(result["v"][0] == [] for result in results[:-1])
    _check_equal(results, "v", "1f1b")
