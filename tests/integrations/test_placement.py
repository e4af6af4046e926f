"""V placement of real GPT models: what each chunk holds, and that training is bitwise that of stock pipelines."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]

LLAMA: Fields = {"layers": 8, "hidden": 16, "activation": "swiglu", "norm": "RMSNorm", "bias": False, "kv_groups": 2}
MOE: Fields = {
    "layers": 4,
    "experts": 4,
    "config": {"moe_layer_freq": [0, 1, 0, 1], "moe_token_dispatcher_type": "allgather"},
}
GPT: Fields = {"layers": 8, "hidden": 16, "position": "learned_absolute", "tied": True}


def _case(fields: Fields) -> Any:
    """Megatron's groups anew, for a rank that runs several layouts in one call."""
    import torch
    from megatron.core import parallel_state

    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.parity import seed_everything

    parallel_state.destroy_model_parallel()
    dtype = getattr(torch, fields.get("dtype", "float32"))
    case = GptCase(**{**fields, "dtype": dtype})
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
    """What `build_gpt` and `train_steps` need for a layout: the maker of layer specs and the schedule, or None."""
    from megamem.integrations.local_spec import local_layer_spec
    from megamem.integrations.placement import v_placed

    if kind != "v":
        yield None, None
        return
    with v_placed() as placement:

        def make_spec(config: Any, chunk: int) -> Any:
            with placement.as_stage(chunk):
                return local_layer_spec(config, vp_stage=chunk)

        yield make_spec, functools.partial(f_then_b, placement)


def _laid_out(kind: str, fields: Fields) -> Fields:
    """`fields` for a layout; `v_layout` is a pipeline layout for the V alone."""
    fields = {**fields, "vpp": None if kind == "1f1b" else 2}
    layout = fields.pop("v_layout", None)
    if kind == "v" and layout is not None:
        fields["config"] = {**fields.get("config", {}), "pipeline_model_parallel_layout": layout}
    return fields


# -- what is built -----------------------------------------------------------------------------------------------------


def chunk_map(fields: Fields, is_uneven: bool) -> list[Any]:
    from megamem.testing.models import build_gpt, unwrap

    case = _case(_laid_out("v", fields))
    with _pipeline("v") as (spec, _):
        chunks = [unwrap(chunk) for chunk in build_gpt(case, spec=spec if is_uneven else None)]
    return [
        (
            [layer.layer_number for layer in chunk.decoder.layers],
            chunk.pre_process,
            chunk.post_process,
            chunk.decoder.final_layernorm is not None,
        )
        for chunk in chunks
    ]


def _first(*layers: int) -> Any:
    return [*layers], True, False, False


def _middle(*layers: int) -> Any:
    return [*layers], False, False, False


def _last(*layers: int) -> Any:
    return [*layers], False, True, True


UNEVEN = {"num_layers_in_first_pipeline_stage": 2}
MAPS: dict[str, tuple[int, Fields, list[Any]]] = {
    "2 ranks": (2, {}, [[_first(1, 2), _last(7, 8)], [_middle(3, 4), _middle(5, 6)]]),
    "4 ranks": (
        4, {}, [[_first(1), _last(8)], [_middle(2), _middle(7)], [_middle(3), _middle(6)], [_middle(4), _middle(5)]],
    ),
    "pipeline layout": (
        2, {"v_layout": "E|t|ttttt|ttL"}, [[_first(), _last(7, 8)], [_middle(1), _middle(2, 3, 4, 5, 6)]],
    ),
    "uneven": (2, {"config": UNEVEN}, [[_first(1), _last(6, 7, 8)], [_middle(2, 3, 4), _middle(5)]]),
}  # fmt: skip


@pytest.mark.parametrize(("ranks", "fields", "expected"), MAPS.values(), ids=MAPS)
def test_rank_r_holds_the_stages_r_and_2p_minus_1_minus_r(
    dist: Dist, ranks: int, fields: Fields, expected: list[Any]
) -> None:
    assert dist(ranks)(chunk_map, {**LLAMA, "pp": ranks, **fields}, bool(fields)) == expected


def construct(case: Any, chunk: int | None, **arguments: Any) -> Any:
    """A chunk as a user's script builds it, with Megatron's initial weights."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    from megamem.integrations.local_spec import local_layer_spec
    from megamem.testing.models import build_config

    config = build_config(case)
    ring = {"ignore_virtual": False, "vp_stage": chunk or 0}
    return GPTModel(
        config,
        arguments.pop("spec", None) or local_layer_spec(config, vp_stage=chunk or 0),
        vocab_size=case.vocab,
        max_sequence_length=case.sequence,
        pre_process=parallel_state.is_pipeline_first_stage(**ring),
        post_process=parallel_state.is_pipeline_last_stage(**ring),
        share_embeddings_and_output_weights=case.tied,
        vp_stage=chunk,
        **arguments,
    )


def tied_copies() -> tuple[bool, bool, list[list[tuple[bool, bool]]]]:
    """Two models in one process: whether their two copies are equal, the models differ, and what marks them."""
    import torch

    from megamem.integrations.placement import v_placed

    case = _case({**GPT, "pp": 2, "vpp": 2})
    with v_placed():
        models = [[construct(case, chunk) for chunk in (0, 1)] for _ in range(2)]
    weights = [[chunk.shared_embedding_or_output_weight() for chunk in model] for model in models]
    if weights[0][0] is None:
        return True, True, []
    marks = [[(hasattr(one, "shared"), one.shared_embedding) for one in pair] for pair in weights]
    return (
        all(torch.equal(*pair) and pair[0].any() for pair in weights),
        not torch.equal(weights[0][0], weights[1][0]),
        marks,
    )


def test_copies_of_a_tied_weight_start_equal_and_are_marked_as_stock_marks_them(dist: Dist) -> None:
    pair = [(False, True), (True, True)]  # `shared` is not counted in the gradient's norm
    assert dist(2)(tied_copies) == [(True, True, [pair, pair]), (True, True, [])]


# -- what is computed --------------------------------------------------------------------------------------------------


def _train(kind: str, fields: Fields, adam: bool) -> Any:
    """Losses, and every number that must be equal, by name: parameters after two steps, and the last gradients.

    Under the distributed optimizer a gradient is final only in the rank's own shard, so parameters must do.
    """
    from megamem.testing.models import build_gpt, build_optimizer, train_steps

    case = _case(_laid_out(kind, fields))
    with _pipeline(kind) as (spec, schedule):
        chunks = build_gpt(case, spec=spec)
        optimizer = build_optimizer(chunks, case, clip_grad=0.0) if adam else None
        losses, _ = train_steps(chunks, case, num_microbatches=4, steps=2, optimizer=optimizer, schedule=schedule)
    return losses, _numbers(chunks, gradients=not case.distributed_optimizer)


def _numbers(chunks: list[Any], *, gradients: bool) -> list[tuple[str, Any]]:
    from megamem.testing.models import global_names

    found = []
    for chunk in chunks:
        for name, parameter in global_names(chunk):
            found.append((name, parameter.data.clone()))
            if gradients:
                found.append((f"gradient of {name}", parameter.main_grad.clone()))  # type: ignore[attr-defined]
    return found


def train_all(kinds: tuple[str, ...], fields: Fields, adam: bool = False) -> dict[str, Any]:
    return {kind: _train(kind, fields, adam) for kind in kinds}


def _merged(ranks: list[list[tuple[str, Any]]]) -> dict[str, Any]:
    """The numbers of the whole model; where several ranks, or chunks, hold copies, they must be equal."""
    import torch

    whole: dict[str, Any] = {}
    for name, value in (item for rank in ranks for item in rank):
        assert torch.equal(whole.setdefault(name, value), value), f"copies of {name} differ"
    return whole


def _differences(ranks: list[list[tuple[str, Any]]], expected: dict[str, Any]) -> list[str]:
    import torch

    found = _merged(ranks)
    assert set(found) == set(expected)
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def _check_equal(results: list[Any], tensor_parallel: int = 1) -> None:
    """Parts of tensor-parallel ranks are compared rank by rank of the tensor-parallel group."""
    losses = results[-1]["1f1b"][0]
    assert len(losses) == 8
    assert results[-1]["v"][0] == losses
    for index in range(tensor_parallel):
        ranks = results[index::tensor_parallel]
        stock = _merged([rank["1f1b"][1] for rank in ranks])
        assert _differences([rank["v"][1] for rank in ranks], stock) == []


TWO: dict[str, Fields] = {
    "llama": LLAMA,
    "tied": GPT,
    "experts": {**LLAMA, **MOE},
    "layout": {**GPT, "v_layout": "E|t|ttttt|ttL"},
    "bf16": {**GPT, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("fields", TWO.values(), ids=TWO)
def test_losses_and_gradients_are_bitwise_those_of_1f1b(dist: Dist, fields: Fields) -> None:
    results = dist(2)(train_all, ("v", "1f1b"), {**fields, "pp": 2})
    assert results[0]["v"][0] == []
    _check_equal(results)


SPREAD: dict[str, Fields] = {
    "four-stages": {**GPT, "pp": 4},
    "data-parallel": {**GPT, "pp": 2, "dtype": "bfloat16", "distributed_optimizer": True},
    "tensor-parallel": {**LLAMA, "pp": 2, "tp": 2, "sp": True, "tied": True},
}


@pytest.mark.parametrize("fields", SPREAD.values(), ids=SPREAD)
def test_on_four_ranks_too(dist: Dist, fields: Fields) -> None:
    results = dist(4)(train_all, ("v", "1f1b"), fields, "distributed_optimizer" in fields)
    _check_equal(results, fields.get("tp", 1))


# -- checkpoints -------------------------------------------------------------------------------------------------------

LAYOUTS = ("1f1b", "interleaved", "v")


def _checkpointing() -> Any:
    """What the example job does with Megatron's distributed checkpoints."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from pretrain import checkpoint

    return checkpoint


def _state(chunks: list[Any], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    from megamem.testing.models import unwrap

    metadata = _checkpointing()._metadata()
    state: dict[str, Any] = {
        f"model{index}": unwrap(chunk).sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)
    }
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def _train_on(kind: str, fields: Fields, *, load: str | None = None, save: str = "") -> Any:
    """Resume from `load`, or train two steps and save them; then train another. The parameters by name."""
    from megatron.core import dist_checkpointing

    from megamem.testing.models import build_gpt, build_optimizer, train_steps, unwrap

    case = _case(_laid_out(kind, fields))
    with _pipeline(kind) as (spec, schedule):
        chunks = build_gpt(case, spec=spec)
        optimizer = build_optimizer(chunks, case, clip_grad=0.0)
        if load is not None:
            _blank(chunks)
            _checkpointing()._allocate(optimizer)
            loaded = dist_checkpointing.load(_state(chunks, optimizer, is_loading=True), load)
            for index, chunk in enumerate(chunks):
                unwrap(chunk).load_state_dict(loaded[f"model{index}"])
            _checkpointing()._load_optimizer(optimizer, loaded["optimizer"])
        else:
            train_steps(chunks, case, num_microbatches=4, steps=2, optimizer=optimizer, schedule=schedule)
            Path(save).mkdir(exist_ok=True)
            dist_checkpointing.save(_state(chunks, optimizer, is_loading=False), save)
        train_steps(chunks, case, num_microbatches=4, steps=1, optimizer=optimizer, schedule=schedule)
    return _numbers(chunks, gradients=False)


def _blank(chunks: list[Any]) -> None:
    import torch

    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(7)


def save_all(fields: Fields, folder: str) -> dict[str, Any]:
    return {kind: _train_on(kind, fields, save=f"{folder}/{kind}") for kind in LAYOUTS}


def resume_all(fields: Fields, folder: str) -> dict[str, Any]:
    ways = [(source, kind) for source in LAYOUTS for kind in LAYOUTS if "v" in (source, kind)]
    return {f"{source} -> {kind}": _train_on(kind, fields, load=f"{folder}/{source}") for source, kind in ways}


# Mind the sizes under the distributed optimizer: where a tied weight's bucket needs padding before it, Megatron-Core
# itself saves a wrong state ("param range exceeds unpadded buffer"), under 1F1B as well.
CHECKPOINTED: dict[str, tuple[int, Fields]] = {
    "tied": (2, {**GPT, "layers": 4, "v_layout": "E|t|tt|tL"}),
    "experts": (2, {**LLAMA, **MOE}),
    "distributed-optimizer": (
        4, {**LLAMA, "layers": 4, "tied": True, "dtype": "bfloat16", "distributed_optimizer": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("ranks", "fields"), CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_checkpoints_load_across_placements_in_every_direction(
    dist: Dist, ranks: int, fields: Fields, tmp_path: Path
) -> None:
    """Weights and Adam's state: whoever saved, and whoever resumes, the next step is that of an unbroken run."""
    fields = {**fields, "pp": 2}
    saved = dist(ranks)(save_all, fields, str(tmp_path))
    unbroken = _merged([result["1f1b"] for result in saved])
    resumed = dist(ranks)(resume_all, fields, str(tmp_path))
    for results in (saved, resumed):
        assert [way for way in results[0] if _differences([result[way] for result in results], unbroken)] == []


# -- the step's ends ---------------------------------------------------------------------------------------------------


def per_token(data: Any, model: Any) -> tuple[Any, Callable[[Any], Any]]:
    """As trainers with `calculate_per_token_loss`: the sum of the losses, and how many tokens it is of."""
    batch = next(data)
    output = model(batch.tokens, batch.positions, batch.mask, labels=batch.labels)

    def loss(losses: Any) -> Any:
        import torch

        total, count = losses.float().sum(), torch.tensor(losses.numel() - 3, dtype=torch.int)
        return total, count, {"loss": (total.detach().clone(), count.clone()), "names": ["a"]}

    return output, loss


def per_token_step(kind: str, fields: Fields, forward_only: bool) -> Any:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megamem.testing.models import batches, build_gpt

    case = _case(_laid_out(kind, fields))
    with _pipeline(kind) as (spec, schedule):
        chunks = build_gpt(case, spec=spec, config_overrides={"calculate_per_token_loss": True})
        data = batches(case, 4)
        losses = (schedule or get_forward_backward_func())(
            forward_step_func=per_token,
            data_iterator=[iter(data) for _ in chunks],
            model=chunks,
            num_microbatches=4,
            seq_length=case.sequence,
            micro_batch_size=case.microbatch,
            forward_only=forward_only,
        )
    return losses, [] if forward_only else _numbers(chunks, gradients=True)


def both_ends(fields: Fields) -> Any:
    return {
        (kind, forward_only): per_token_step(kind, fields, forward_only)
        for kind in ("v", "1f1b")
        for forward_only in (False, True)
    }


def test_losses_and_token_counts_end_where_trainers_look_for_them(dist: Dist) -> None:
    results = dist(2)(both_ends, {**GPT, "pp": 2})
    for forward_only in (False, True):
        losses = results[1]["1f1b", forward_only][0]
        assert len(losses) == 4 and results[1]["v", forward_only][0] == losses
        assert results[0]["v", forward_only][0] == results[0]["1f1b", forward_only][0] == []
    stock = _merged([result["1f1b", False][1] for result in results])
    assert _differences([result["v", False][1] for result in results], stock) == []


class _Recording:
    """An optimizer that remembers the gradient norms."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.norms: list[float] = []

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self) -> None:
        self.norms.append(float(self._optimizer.step()[1]))


def norms(fields: Fields) -> list[list[float]]:
    from megamem.testing.models import build_gpt, build_optimizer, train_steps

    found = []
    for kind in ("v", "1f1b"):
        case = _case(_laid_out(kind, fields))
        with _pipeline(kind) as (spec, schedule):
            chunks = build_gpt(case, spec=spec)
            optimizer = _Recording(build_optimizer(chunks, case, clip_grad=0.1))
            train_steps(chunks, case, num_microbatches=2, steps=2, optimizer=optimizer, schedule=schedule)
        found.append(optimizer.norms)
    return found


def test_the_gradient_norm_counts_a_tied_weight_once(dist: Dist) -> None:
    """Equal up to rounding: other ranks hold the squares that are summed."""
    for ours, stock in dist(2)(norms, {**GPT, "pp": 2}):
        assert min(stock) > 0.1  # clipped
        assert ours == pytest.approx(stock, rel=1e-5)


# -- what is refused ---------------------------------------------------------------------------------------------------


def _error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals() -> dict[str, str]:
    """What is said for each model that cannot be placed; and that nothing of an attempt stays behind."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.bert.bert_model import BertModel

    from megamem.integrations.local_spec import local_layer_spec
    from megamem.integrations.placement import v_placed
    from megamem.testing.models import build_config, build_gpt

    fields = {**LLAMA, "pp": 2, "vpp": 2, "ddp": False}
    case = _case(fields)
    unplaced = build_gpt(case)

    def changed(chunk: int | None = 1, **changes: Any) -> Callable[[], object]:
        return lambda: construct(dataclasses.replace(case, **changes), chunk)

    with v_placed() as placement:
        config = build_config(case)
        stray = local_layer_spec(config, vp_stage=0)
        stray.layer_specs.pop()

        def mismatched() -> None:
            with placement.building(0):
                construct(case, 1)

        found = {
            "no vp_stage": changed(None),
            "third chunk": changed(2),
            "mismatch": mismatched,
            "layers": lambda: construct(dataclasses.replace(case, layers=9), 0, spec=stray),
            "chunks": changed(0, vpp=None),
            "mtp": changed(config={"mtp_num_layers": 1}),
            "kinds": changed(config={"heterogeneous_block_specs": True}),
            "experts": changed(**MOE),
            "spec": lambda: construct(case, 0, spec=stray),
            "tied": changed(tied=True),
            "bert": lambda: BertModel(config, 0, stray, case.vocab, case.sequence),
            "unplaced": lambda: placement.check_model(unplaced),
            "one chunk": lambda: placement.check_model([construct(case, 0)]),
            "group": lambda: torch.distributed.get_rank(construct(case, 0).pg_collection.pp),
            "in a step": lambda: _fail(placement),
        }
        errors = {name: _error_of(call) for name, call in found.items()}
        assert construct(case, 1).decoder.layers[0].layer_number == 5 + 2 * (1 - torch.distributed.get_rank())
    errors["rank"] = str(parallel_state.get_pipeline_model_parallel_rank())
    _case({**fields, "vpp": None})
    errors["layout"] = _error_of(lambda: v_placed().__enter__())
    return errors


def _fail(placement: Any) -> None:
    with placement.as_stage(1):
        raise ValueError("in a step")


REFUSALS = {
    "no vp_stage": "pass vp_stage=chunk to GPTModel",
    "third chunk": "there is no chunk 2",
    "mismatch": "vp_stage=1 is built inside `handle.building(0)`",
    "layers": "9 layers do not divide into 4 stages (2 ranks x 2 chunks); the nearest number is 8",
    "chunks": "virtual_pipeline_model_parallel_size must be 2 in the model's configuration, not None",
    "mtp": "set mtp_num_layers to None",
    "kinds": "kinds of layers by heterogeneous_block_specs cannot be checked",
    "spec": "was built with layers [",
    "bert": "V placement is for GPTModel; BertModel",
    "unplaced": "and got an unplaced one, an unplaced one; build the model after megamem.enable",
    "one chunk": "and got 0; build",
    "group": "ValueError",
    "in a step": "in a step",
    "layout": "initialise Megatron with virtual_pipeline_model_parallel_size=2, not None",
}


def test_what_cannot_be_placed_is_refused_and_leaves_nothing_behind(dist: Dist) -> None:
    results = dist(2)(refusals)
    for rank, errors in enumerate(results):
        assert {name: text for name, text in REFUSALS.items() if text not in errors[name]} == {}, errors
        assert errors["rank"] == str(rank)
    assert (
        "is stage 3, layers [4] (with experts: [4]), but was built with layers [4] (with experts: [])"
        in (results[0]["experts"])
    )
    assert "chunk 1 of a model with tied embeddings was built before its chunk 0" in results[0]["tied"]
    assert results[1]["tied"] == ""  # the last stage is on rank 0
