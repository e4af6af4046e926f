"""Every parallel layout that the other tests lean on trains, and trains the same model."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Result = tuple[list[float], dict[str, Any]]

LLAMA = {"layers": 4, "activation": "swiglu", "norm": "RMSNorm", "bias": False, "kv_groups": 2}
GPT = {"layers": 2, "activation": "gelu", "norm": "LayerNorm", "bias": True, "position": "learned_absolute"}
MOE = {"layers": 2, "experts": 4, "bias": False, "topk": 2}


def _train(fields: dict[str, Any], microbatches: int = 4, steps: int = 2, adam: bool = False) -> Result:
    from megamem.testing.models import GptCase, build_gpt, build_optimizer, init_parallel, train_steps

    case = GptCase(**fields)
    init_parallel(case)
    chunks = build_gpt(case)
    optimizer = build_optimizer(chunks, case) if adam else None
    return train_steps(chunks, case, num_microbatches=microbatches, steps=steps, optimizer=optimizer)


def _merged(results: list[Result]) -> Result:
    """The last rank's losses, and the gradients of all pipeline stages."""
    gradients: dict[str, Any] = {}
    for _, part in results:
        gradients |= part
    return results[-1][0], gradients


def _check_close(actual: Result, expected: Result, shards: list[Result] | None = None) -> None:
    import torch

    assert len(expected[0]) > 0
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    assert set(actual[1]) == set(expected[1])
    for name, gradient in expected[1].items():
        if actual[1][name].shape == gradient.shape:
            torch.testing.assert_close(
                actual[1][name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert shards is not None, name


@pytest.mark.parametrize("sizes", [LLAMA, GPT, {**LLAMA, "tied": True}, {**LLAMA, "qk_layernorm": True}])
def test_pipeline_equals_one_rank(dist: Dist, sizes: dict[str, Any]) -> None:
    expected = _merged(dist(1)(_train, sizes))
    assert expected[0][0] != expected[0][4]  # the second step really took a step
    _check_close(_merged(dist(2)(_train, {**sizes, "pp": 2})), expected)


def test_interleaved_pipeline_equals_one_rank(dist: Dist) -> None:
    expected = _merged(dist(1)(_train, LLAMA))
    _check_close(_merged(dist(2)(_train, {**LLAMA, "pp": 2, "vpp": 2})), expected)


@pytest.mark.parametrize("sp", [False, True], ids=["tp", "tp+sp"])
@pytest.mark.parametrize("sizes", [LLAMA, GPT])
def test_tensor_parallel_equals_one_rank(dist: Dist, sizes: dict[str, Any], sp: bool) -> None:
    import torch

    (expected,) = dist(1)(_train, sizes)
    results = dist(2)(_train, {**sizes, "tp": 2, "sp": sp})
    for result in results:
        _check_close(result, expected, shards=results)  # replicated parameters have their whole gradient on each rank
    embedding = [part["embedding.word_embeddings.weight"] for _, part in results]
    torch.testing.assert_close(torch.cat(embedding), expected[1]["embedding.word_embeddings.weight"])


def test_distributed_optimizer_equals_plain(dist: Dist) -> None:
    plain = dist(2)(_train, LLAMA, 2, 3, True)
    sharded = dist(2)(_train, {**LLAMA, "distributed_optimizer": True}, 2, 3, True)
    for one, other in zip(plain, sharded, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-5)
        assert one[0][0] != other[0][-1]


def test_distributed_optimizer_in_bf16(dist: Dist) -> None:
    import torch

    fields = {**LLAMA, "dtype": torch.bfloat16, "distributed_optimizer": True}
    losses = dist(2)(_train, fields, 2, 3, True)[0][0]
    assert losses == pytest.approx(dist(2)(_train, LLAMA, 2, 3, True)[0][0], abs=0.1)


def test_expert_parallel_equals_one_rank(dist: Dist) -> None:
    """Two ranks with half of the experts each, against two data-parallel ranks that have them all."""
    expected = dist(2)(_train, MOE, 2)
    actual = dist(2)(_train, {**MOE, "ep": 2}, 2)
    assert [losses for losses, _ in actual] == [pytest.approx(losses, abs=1e-5) for losses, _ in expected]
    _check_close((actual[0][0], _merged(actual)[1]), expected[0])


def test_moe_with_tensor_and_sequence_parallel_equals_one_rank(dist: Dist) -> None:
    expected = dist(1)(_train, MOE)
    actual = dist(2)(_train, {**MOE, "tp": 2, "sp": True})
    assert actual[0][0] == pytest.approx(expected[0][0], abs=1e-4)


def test_dropout_is_reproducible_and_active(dist: Dist) -> None:
    first, again = (dist(1)(_train, {**LLAMA, "dropout": 0.2})[0][0] for _ in range(2))
    assert first == again
    assert first != dist(1)(_train, LLAMA)[0][0]


def test_megatrons_own_attention(dist: Dist) -> None:
    expected = _merged(dist(1)(_train, LLAMA))
    _check_close(_merged(dist(1)(_train, {**LLAMA, "flash_attention": False})), expected)


def _on_an_old_gloo(fields: dict[str, Any], adam: bool) -> Result:
    """As if this torch's gloo had neither reduce-scatter nor averaging: torch 2.6's does not."""
    from torch.distributed import ProcessGroup, ReduceOp

    from megamem.testing._undo import Ledger
    from megamem.testing.cpu import cpu_rig

    asked = []

    def lacking(_group: Any, *_args: Any, **_kwargs: Any) -> None:
        asked.append(True)
        raise RuntimeError("Backend gloo does not support reduce_scatter")

    real = ProcessGroup.allreduce

    def without_average(group: Any, tensors: Any, options: Any = None, *args: Any, **kwargs: Any) -> Any:
        if options is not None and options.reduceOp == ReduceOp.AVG:
            raise RuntimeError("Cannot use ReduceOp.AVG with Gloo")
        return real(group, tensors, options, *args, **kwargs)

    ledger = Ledger()
    for name in [name for name in vars(ProcessGroup) if "reduce_scatter" in name]:
        ledger.set(ProcessGroup, name, lacking)
    ledger.set(ProcessGroup, "allreduce", without_average)
    try:
        with cpu_rig():  # its emulations go on top of what is lacking
            result = _train(fields, 2, 2, adam)
        assert asked
        return result
    finally:
        ledger.undo()


@pytest.mark.parametrize(
    ("layout", "adam"), [({"tp": 2, "sp": True}, False), ({"distributed_optimizer": True}, True)], ids=["sp", "distopt"]
)
def test_emulated_reduce_scatter_trains_the_same(dist: Dist, layout: dict[str, Any], adam: bool) -> None:
    import torch

    fields = {**LLAMA, **layout}
    for emulated, real in zip(dist(2)(_on_an_old_gloo, fields, adam), dist(2)(_train, fields, 2, 2, adam), strict=True):
        assert emulated[0] == real[0]
        assert all(torch.equal(emulated[1][name], real[1][name]) for name in real[1])


def _without_ddp(fields: dict[str, Any]) -> Result:
    return _train({**fields, "ddp": False})


def test_without_ddp_one_rank_has_the_same_gradients(dist: Dist) -> None:
    _check_close(_merged(dist(1)(_without_ddp, LLAMA)), _merged(dist(1)(_train, LLAMA)))


def test_full_recomputation_replays_dropout(dist: Dist) -> None:
    """Megatron's recomputation restores the generators that the rig lends it: same masks, so same gradients,
    bitwise.
    """
    import torch

    fields = {**LLAMA, "dropout": 0.2}
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    (losses, gradients), (again, replayed) = dist(1)(_train, fields)[0], dist(1)(_train, {**fields, "config": full})[0]
    assert losses == again
    assert all(torch.equal(gradients[name], replayed[name]) for name in gradients)
