"""V placement of real GPT models: what each chunk holds, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from megamem.testing.trials import error_of

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
    """Megatron's groups anew, for a rank that runs several cases in one call."""
    from megatron.core import parallel_state

    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.parity import seed_everything

    parallel_state.destroy_model_parallel()
    case = GptCase(**{"pp": 2, "vpp": 2, **fields})
    init_parallel(case)
    seed_everything()
    return case


def _v_placed() -> Any:
    """megamem with a schedule that is made for a V."""
    import megamem

    return megamem.enable({"schedule": {"name": "v-half"}})


# -- what is built -----------------------------------------------------------------------------------------------------


def chunk_map(fields: Fields, is_uneven: bool) -> list[Any]:
    """Layer numbers, first stage, last stage and final norm of each chunk; uneven ones need their spec be told."""
    from megamem.integrations.local_spec import local_layer_spec
    from megamem.testing.models import build_gpt, unwrap

    case = _case(fields)
    with _v_placed() as handle:

        def make_spec(config: Any, chunk: int | None) -> Any:
            with handle.building(chunk):
                return local_layer_spec(config, vp_stage=chunk)

        chunks = [unwrap(chunk) for chunk in build_gpt(case, spec=make_spec if is_uneven else None)]
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


UNEVEN = {"config": {"num_layers_in_first_pipeline_stage": 2}}
ACCOUNTED = {"config": {f"account_for_{end}_in_pipeline_split": True for end in ("embedding", "loss")}, "layers": 6}
LAYOUT = {"config": {"pipeline_model_parallel_layout": "E|t|ttttt|ttL"}}
MAPS: dict[str, tuple[int, Fields, list[Any]]] = {
    "2 ranks": (2, {}, [[_first(1, 2), _last(7, 8)], [_middle(3, 4), _middle(5, 6)]]),
    "4 ranks": (
        4, {}, [[_first(1), _last(8)], [_middle(2), _middle(7)], [_middle(3), _middle(6)], [_middle(4), _middle(5)]],
    ),
    "pipeline layout": (
        2, LAYOUT, [[_first(), _last(7, 8)], [_middle(1), _middle(2, 3, 4, 5, 6)]],
    ),
    "4 chunks": (
        2,
        {"vpp": 4},
        [[_first(1), _middle(4), _middle(5), _last(8)], [_middle(2), _middle(3), _middle(6), _middle(7)]],
    ),
    "uneven": (2, UNEVEN, [[_first(1), _last(6, 7, 8)], [_middle(2, 3, 4), _middle(5)]]),
    "accounted": (2, ACCOUNTED, [[_first(1), _last(6)], [_middle(2, 3), _middle(4, 5)]]),
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

    case = _case(GPT)
    with _v_placed():
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


# -- what is refused ---------------------------------------------------------------------------------------------------


def refusals() -> dict[str, str]:
    """What is said for each model that cannot be placed; and that nothing of an attempt stays behind."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.bert.bert_model import BertModel

    from megamem.integrations.local_spec import local_layer_spec
    from megamem.testing.models import build_config, build_gpt

    case = _case({**LLAMA, "ddp": False})
    unplaced = build_gpt(case)

    def changed(chunk: int | None = 1, **changes: Any) -> Callable[[], object]:
        return lambda: construct(dataclasses.replace(case, **changes), chunk)

    with _v_placed() as handle:
        placement, config = handle.schedule.placement, build_config(case)
        predicting = dataclasses.replace(case, config={"mtp_num_layers": 1})
        stray = local_layer_spec(config, vp_stage=0)
        stray.layer_specs.pop()

        def mismatched() -> None:
            with handle.building(0):
                construct(case, 1)

        found = {
            "no vp_stage": changed(None),
            "third chunk": changed(2),
            "mismatch": mismatched,
            "layers": lambda: construct(dataclasses.replace(case, layers=9), 0, spec=stray),
            "chunks": changed(0, vpp=None),
            "no prediction": changed(config={"mtp_num_layers": 1}),
            "misplaced prediction": lambda: construct(predicting, 0, mtp_block_spec=stray),
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
        errors = {name: error_of(call) for name, call in found.items()}
        assert construct(case, 1).decoder.layers[0].layer_number == 5 + 2 * (1 - torch.distributed.get_rank())
    errors["rank"] = str(parallel_state.get_pipeline_model_parallel_rank())
    _case({**LLAMA, "vpp": None})
    errors["layout"] = error_of(_v_placed)
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
    "misplaced prediction": "does not have the model's multi-token prediction, but its mtp_block_spec is not None",
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
    assert "has the model's multi-token prediction, but its mtp_block_spec is None" in results[0]["no prediction"]
    assert (
        "is stage 3, layers [4] (with experts: [4]), but was built with layers [4] (with experts: [])"
        in (results[0]["experts"])
    )
    assert "or with multi-token prediction, was built before its chunk 0" in results[0]["tied"]
    assert results[1]["tied"] == ""  # the last stage is on rank 0
