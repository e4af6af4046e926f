"""Training under V placement: bitwise that of stock pipelines, and checkpoints that load across placements."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest

from megamem.ir.schedule import Action, Placement
from megamem.planner.schedules.forward_order import forward_order

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]

STOCK = ("1f1b", "interleaved")
SCHEDULES = ("zb-v", "v-half", "v-min", "1f1b-v", "dualpipe-v")

LLAMA: Fields = {"layers": 8, "hidden": 16, "activation": "swiglu", "norm": "RMSNorm", "bias": False, "kv_groups": 2}
MOE: Fields = {
    "layers": 4,
    "experts": 4,
    "config": {"moe_layer_freq": [0, 1, 0, 1], "moe_token_dispatcher_type": "allgather"},
}
PREDICTION: Fields = {"layers": 4, "config": {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.3}}
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


@contextlib.contextmanager
def _pipeline(kind: str) -> Any:
    """The schedule `kind` while the block runs: what a chunk's specs are made inside; None under Megatron's own."""
    import megamem

    if kind in STOCK:
        yield None
        return
    section = {"name": "file", "file": kind} if _is_file(kind) else {"name": kind}
    with megamem.enable({"schedule": section}) as handle:
        yield handle.building


def _is_file(kind: str) -> bool:
    return kind.endswith(".txt")


def _laid_out(kind: str, fields: Fields) -> Fields:
    """`fields` for a schedule; `v_layout` is a pipeline layout for the V alone. Schedules from files have 4 chunks."""
    fields = {**fields, "vpp": None if kind == "1f1b" else 4 if _is_file(kind) else 2}
    layout = fields.pop("v_layout", None)
    if kind not in STOCK and layout is not None:
        fields["config"] = {**fields.get("config", {}), "pipeline_model_parallel_layout": layout}
    return fields


# -- what is computed --------------------------------------------------------------------------------------------------


def _train(kind: str, fields: Fields, adam: bool) -> Any:
    """Losses, and every number that must be equal, by name: parameters after two steps, and the last gradients.

    Under the distributed optimizer a gradient is final only in the rank's own shard, so parameters must do.
    """
    from megamem.testing.models import build_gpt, build_optimizer, train_steps

    case = _case(_laid_out(kind, fields))
    with _pipeline(kind) as building:
        chunks = build_gpt(case, building=building)
        optimizer = build_optimizer(chunks, case, clip_grad=0.0) if adam else None
        losses, _ = train_steps(chunks, case, num_microbatches=2 * case.pp, steps=2, optimizer=optimizer)
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


def _check_equal(results: list[Any], num_stages: int) -> None:
    """Every schedule as 1F1B; with several ranks to a stage, pipeline by pipeline."""
    width = len(results) // num_stages
    for pipeline in (results[index::width] for index in range(width)):
        stock, whole = pipeline[-1]["1f1b"][0], _merged([rank["1f1b"][1] for rank in pipeline])
        assert len(stock) > 0
        for kind in pipeline[0]:
            assert [rank[kind][0] for rank in pipeline] == [*[[]] * (num_stages - 1), stock], kind
            assert _differences([rank[kind][1] for rank in pipeline], whole) == [], kind


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_schedule_on_a_v_is_bitwise_1f1b(dist: Dist, ranks: int) -> None:
    """Losses, gradients and parameters of two steps, with tied weights."""
    _check_equal(dist(ranks)(train_all, (*SCHEDULES, "1f1b"), {**LLAMA, "pp": ranks, "tied": True}), ranks)


def test_a_v_is_repeated_where_there_are_four_chunks(dist: Dist, tmp_path: Path) -> None:
    """All forward passes, then all backward passes, which take the mirrored chunks in the same order."""
    placement = Placement(shape="v", num_ranks=2, num_chunks=4)
    forward = forward_order(placement, 4)
    ranks = [[*actions, *(Action("BW", 3 - a.chunk, a.microbatch) for a in actions)] for actions in forward.ranks]
    path = tmp_path / "w.txt"
    path.write_text(forward.with_ranks(ranks).to_text(), encoding="utf-8")
    _check_equal(dist(2)(train_all, (str(path), "1f1b"), {**LLAMA, "pp": 2, "tied": True}), 2)


MODELS: dict[str, tuple[int, Fields]] = {
    "untied": (2, LLAMA),
    "positions": (2, GPT),
    "experts": (2, {**LLAMA, **MOE}),
    "layout": (2, {**GPT, "v_layout": "E|t|ttttt|ttL"}),
    "bf16": (2, {**GPT, "dtype": "bfloat16"}),
    "data-parallel": (4, {**GPT, "dtype": "bfloat16", "distributed_optimizer": True}),
    "expert-parallel": (4, {**LLAMA, **MOE, "ep": 2}),
    "tensor-parallel": (4, {**LLAMA, "tp": 2, "sp": True, "tied": True}),
    "multi-token prediction": (2, {**LLAMA, **PREDICTION}),
    "multi-token prediction, tied": (
        4,
        {**LLAMA, **PREDICTION, "tied": True, "dtype": "bfloat16", "distributed_optimizer": True},
    ),
}


@pytest.mark.parametrize(("ranks", "fields"), MODELS.values(), ids=MODELS)
def test_every_model_on_a_v_is_bitwise_1f1b(dist: Dist, ranks: int, fields: Fields) -> None:
    results = dist(ranks)(train_all, ("v-half", "1f1b"), {**fields, "pp": 2}, "distributed_optimizer" in fields)
    _check_equal(results, 2)


# -- checkpoints -------------------------------------------------------------------------------------------------------

LAYOUTS = (*STOCK, "v-half")


def _train_on(kind: str, fields: Fields, *, load: str | None = None, save: str = "") -> Any:
    """Resume from `load`, or train two steps and save them; then train another. The parameters by name."""
    from megamem.testing.models import build_gpt, build_optimizer, train_steps

    case = _case(_laid_out(kind, fields))
    with _pipeline(kind) as building:
        chunks = build_gpt(case, building=building)
        optimizer = build_optimizer(chunks, case, clip_grad=0.0)
        if load is not None:
            checkpoints.load(chunks, optimizer, load)
        else:
            train_steps(chunks, case, num_microbatches=4, steps=2, optimizer=optimizer)
            checkpoints.save(chunks, optimizer, save)
        train_steps(chunks, case, num_microbatches=4, steps=1, optimizer=optimizer)
    return _numbers(chunks, gradients=False)


def save_all(fields: Fields, folder: str) -> dict[str, Any]:
    return {kind: _train_on(kind, fields, save=f"{folder}/{kind}") for kind in LAYOUTS}


def resume_all(fields: Fields, folder: str) -> dict[str, Any]:
    ways = [(source, kind) for source in LAYOUTS for kind in LAYOUTS if "v-half" in (source, kind)]
    return {f"{source} -> {kind}": _train_on(kind, fields, load=f"{folder}/{source}") for source, kind in ways}


# Mind the sizes under the distributed optimizer: where a tied weight's bucket needs padding before it, Megatron-Core
# itself saves a wrong state ("param range exceeds unpadded buffer"), under 1F1B as well.
CHECKPOINTED: dict[str, tuple[int, Fields]] = {
    "tied": (2, {**GPT, "layers": 4, "v_layout": "E|t|tt|tL"}),
    "experts": (2, {**LLAMA, **MOE}),
    "multi-token prediction": (2, {**LLAMA, **PREDICTION}),
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
    with _pipeline(kind) as building:
        chunks = build_gpt(case, building=building, config_overrides={"calculate_per_token_loss": True})
        data = batches(case, 4)
        losses = get_forward_backward_func()(
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
        for kind in ("v-half", "1f1b")
        for forward_only in (False, True)
    }


def test_losses_and_token_counts_end_where_trainers_look_for_them(dist: Dist) -> None:
    results = dist(2)(both_ends, {**GPT, "pp": 2})
    for forward_only in (False, True):
        losses = results[1]["1f1b", forward_only][0]
        assert len(losses) == 4 and results[1]["v-half", forward_only][0] == losses
        assert results[0]["v-half", forward_only][0] == results[0]["1f1b", forward_only][0] == []
    stock = _merged([result["1f1b", False][1] for result in results])
    assert _differences([result["v-half", False][1] for result in results], stock) == []


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
    for kind in ("v-half", "1f1b"):
        case = _case(_laid_out(kind, fields))
        with _pipeline(kind) as building:
            chunks = build_gpt(case, building=building)
            optimizer = _Recording(build_optimizer(chunks, case, clip_grad=0.1))
            train_steps(chunks, case, num_microbatches=2, steps=2, optimizer=optimizer)
        found.append(optimizer.norms)
    return found


@pytest.mark.parametrize("fields", [GPT, {**LLAMA, **PREDICTION}], ids=["tied", "multi-token prediction"])
def test_the_gradient_norm_counts_a_copied_weight_once(dist: Dist, fields: Fields) -> None:
    """Equal up to rounding: other ranks hold the squares that are summed."""
    for ours, stock in dist(2)(norms, {**fields, "pp": 2}):
        assert min(stock) > 0.1  # clipped
        assert ours == pytest.approx(stock, rel=1e-5)
