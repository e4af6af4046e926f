"""Loss, gradients and outputs against the definition in fp64, on one rank and on several.

Errors are relative to the largest value of the reference. Inputs in fp32: 2e-6 for everything. In 16 bits, u being half
a unit in the last place of 1 (2^-8 in bf16, 2^-11 in fp16), the reference gets the same rounded operands, and what is
left is: the logits' rounding, at most u max|l|, which moves a loss by twice that and a probability by twice that share;
the rounding of every element of the logits' gradient d by u, which the GEMMs add up as |d| |W|; and that of the
result by u. With fp32 logits the first is gone, and the loss has the bound of fp32.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

import torch
import torch.distributed as dist
from torch.nn import functional as F

from megamem.kernels.linear_cross_entropy import (
    LossOptions,
    TokenOutputs,
    combine_statistics,
    empty_logits,
    empty_statistics,
    gradient_coefficients,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    shard_gradient,
    shard_input_gradient,
    shard_statistics,
    shard_statistics_and_numerator,
    token_outputs,
)

FP32 = 2e-6
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
Run = Callable[[int], Callable[..., list[Any]]]

# Softcap x z-loss x label smoothing x ignore index.
CASES = [
    {"softcap": softcap, "z_loss": z_loss, "label_smoothing": smoothing, "ignore_index": ignore}
    for softcap, z_loss, smoothing, ignore in itertools.product((None, 4.0), (0.0, 1e-2), (0.0, 0.1), (None, -100))
]
EVERYTHING = {
    "softcap": 4.0, "z_loss": 1e-2, "label_smoothing": 0.1, "logit_scale": 0.7, "entropy": True, "arg_max": True,
}  # fmt: skip


class Problem:
    """Random operands, their upstream gradients, and what the definition makes of them in fp64."""

    def __init__(
        self,
        options: LossOptions,
        *,
        shape: tuple[int, ...] = (48,),
        rows: int = 0,
        dtype: Any = torch.float32,
        loss_scale: float = 1.0,
    ) -> None:
        random = torch.Generator().manual_seed(1)
        size, rows = 24, rows or options.vocab_size
        self.options = options
        self.hidden = torch.randn(*shape, size, generator=random).to(dtype)
        self.weight = (torch.randn(rows, size, generator=random) * 0.5).to(dtype)
        self.labels = torch.randint(options.vocab_size, shape, generator=random)
        if options.ignore_index is not None:
            self.labels.view(-1)[::5] = options.ignore_index
        # Positive and different for every token, as loss masks and advantages are; for loss, log-probability, entropy.
        self.upstream = (torch.rand(3, *shape, generator=random) + 0.1) * loss_scale
        hidden, weight = (tensor.double().requires_grad_() for tensor in (self.hidden, self.weight))
        self.expected = linear_cross_entropy_reference(hidden, weight, self.labels, options)
        self.backward(self.expected)
        self.hidden_gradient, self.weight_gradient = hidden.grad, weight.grad

    def backward(self, outputs: TokenOutputs) -> None:
        """Give every differentiable output its upstream gradient."""
        pairs = zip(outputs[: 3 if self.options.entropy else 1], self.upstream, strict=False)
        sum((output * upstream).sum() for output, upstream in pairs).backward()

    def errors(self, outputs: TokenOutputs, hidden_gradient: Any, weight_gradient: Any) -> dict[str, float]:
        """By what it is of: the largest difference, relative to the largest value."""
        found = {
            name: relative(value, getattr(self.expected, name))
            for name, value in outputs._asdict().items()
            if value is not None
        }
        found["hidden"] = relative(hidden_gradient, self.hidden_gradient)
        found["weight"] = relative(weight_gradient, self.weight_gradient)
        return found


def relative(value: Any, expected: Any) -> float:
    assert value.shape == expected.shape
    difference = (value.double() - expected.double()).abs().max().item()
    return float(difference / max(expected.abs().max().item(), 1e-30))


def run(problem: Problem, **kwargs: Any) -> dict[str, float]:
    """The errors of the operation on this rank alone."""
    hidden, weight = (tensor.clone().requires_grad_() for tensor in (problem.hidden, problem.weight))
    outputs = linear_cross_entropy(hidden, weight, problem.labels, problem.options, **kwargs)
    problem.backward(outputs)
    return problem.errors(outputs, hidden.grad, weight.grad)


def worst(errors: dict[str, float]) -> float:
    return max(errors.values())


# ---------------------------------------------------------------------------------------------- the definition itself


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_definition_is_that_of_pytorch(smoothing: float) -> None:
    options = LossOptions(vocab_size=53, label_smoothing=smoothing, entropy=True, arg_max=True)
    problem = Problem(options)
    logits = problem.hidden.double() @ problem.weight.double().T
    expected = F.cross_entropy(logits, problem.labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(problem.expected.loss, expected)
    distribution = torch.distributions.Categorical(logits=logits)
    counts = problem.labels >= 0
    torch.testing.assert_close(problem.expected.entropy[counts], distribution.entropy()[counts])
    torch.testing.assert_close(
        problem.expected.log_probability[counts], distribution.log_prob(problem.labels.clamp(0))[counts]
    )
    assert torch.equal(problem.expected.arg_max, logits.argmax(-1))


def test_scale_comes_before_the_cap_and_the_z_loss_after_it() -> None:
    options = LossOptions(vocab_size=11, logit_scale=3.0, softcap=2.0, z_loss=0.5)
    problem = Problem(options, rows=13)
    logits = 2.0 * torch.tanh(3.0 * (problem.hidden.double() @ problem.weight[:11].double().T) / 2.0)
    expected = F.cross_entropy(logits, problem.labels, reduction="none") + 0.5 * logits.logsumexp(-1) ** 2
    torch.testing.assert_close(problem.expected.loss, expected.masked_fill(problem.labels < 0, 0.0))


# ------------------------------------------------------------------------------------------------------- one rank


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp32_is_exact(case: dict[str, Any]) -> None:
    assert worst(run(Problem(LossOptions(vocab_size=997, **case)))) < FP32


def test_a_word_can_be_ignored() -> None:
    """The padding token's id, as many tokenizers' users have it; its weight still is in everybody's softmax."""
    problem = Problem(LossOptions(vocab_size=20, ignore_index=3, label_smoothing=0.1, entropy=True), shape=(60,))
    assert (problem.labels == 3).sum() >= 12
    assert worst(run(problem)) < FP32
    assert problem.weight_gradient[3].any()


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 9, 127, 1000])
@pytest.mark.parametrize("padding", [0, 1, 64])
def test_every_size_of_vocabulary_and_padding(vocab_size: int, padding: int) -> None:
    problem = Problem(LossOptions(vocab_size=vocab_size, **EVERYTHING), rows=vocab_size + padding)
    errors = run(problem)
    if vocab_size == 1:  # one word is certain: everything but the z-loss is 0, and a relative error means nothing
        assert errors["loss"] < FP32
        return
    assert worst(errors) < FP32
    assert not problem.weight_gradient[vocab_size:].any()


def test_a_large_vocabulary_stays_exact() -> None:
    """128256 words: the sums of so many terms keep the bound, over 6 chunks and over many small ones."""
    problem = Problem(LossOptions(vocab_size=128256, **EVERYTHING), shape=(12,))
    assert worst(run(problem)) < FP32
    assert worst(run(problem, chunk=500)) < FP32


@pytest.mark.parametrize("chunk", [1, 7, 128, 500, 4000])
def test_every_width_of_chunk(chunk: int) -> None:
    assert worst(run(Problem(LossOptions(vocab_size=501, **EVERYTHING)), chunk=chunk)) < FP32


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 3, 4)])
def test_every_shape_of_hidden_states(shape: tuple[int, ...]) -> None:
    options = LossOptions(vocab_size=30, ignore_index=None, **EVERYTHING)
    if 0 in shape:
        hidden = torch.zeros(0, 8, requires_grad=True)
        weight = torch.ones(30, 8, requires_grad=True)
        outputs = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64), options)
        outputs.loss.sum().backward()
        assert outputs.loss.shape == (0,)
        assert hidden.grad.shape == (0, 8) and not weight.grad.any()
    else:
        assert worst(run(Problem(options, shape=shape))) < FP32


def test_large_logits_and_certain_tokens() -> None:
    """Logits in the hundreds: no overflow, and no error beyond the GEMM's own, a few units of the largest logit."""
    problem = Problem(LossOptions(vocab_size=300, logit_scale=60.0, z_loss=1e-4, entropy=True))
    largest = 60.0 * (problem.hidden.double() @ problem.weight.double().T).abs().max().item()
    assert 200 < largest < 1000
    errors = run(problem)
    assert max(errors["loss"], errors["log_probability"]) < FP32
    assert worst(errors) < 4 * largest * 2**-24


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("fp32_logits", [False, True])
@pytest.mark.parametrize("case", [{}, {"softcap": 4.0, "z_loss": 1e-2, "label_smoothing": 0.1}], ids=str)
def test_16_bits_are_within_their_rounding(dtype: Any, fp32_logits: bool, case: dict[str, Any]) -> None:
    options = LossOptions(vocab_size=997, fp32_logits=fp32_logits, **case)
    # As in training with fp16, scaled: unscaled, most of the logits' gradient is subnormal there.
    problem = Problem(options, dtype=dtype, loss_scale=1024.0)
    errors = run(problem)
    hidden, weight, unit = problem.hidden.double(), problem.weight.double(), UNIT[dtype]
    logits = (hidden @ weight.T).requires_grad_()
    identity = torch.eye(997, dtype=torch.float64)
    problem.backward(linear_cross_entropy_reference(logits, identity, problem.labels, options))
    moved = 0.0 if fp32_logits else 2 * unit * logits.abs().max().item()
    added_hidden = (logits.grad.abs() @ weight.abs()).max() / problem.hidden_gradient.abs().max()
    added_weight = (logits.grad.abs().T @ hidden.abs()).max() / problem.weight_gradient.abs().max()
    assert errors["loss"] <= moved + FP32
    assert errors["hidden"] <= (moved + unit) * added_hidden + unit + FP32
    assert errors["weight"] <= (moved + unit) * added_weight + unit + FP32


def test_the_input_gradient_is_summed_in_fp32() -> None:
    """Of many chunks that each add little: in bf16 their sum would stop growing, in fp32 it is as good as in one."""
    problem = Problem(LossOptions(vocab_size=2000, fp32_logits=True), dtype=torch.bfloat16)
    assert run(problem, chunk=8)["hidden"] < 2 * UNIT[torch.bfloat16]


@pytest.fixture
def deterministic() -> Iterator[None]:
    """torch refuses what it knows to add up in no fixed order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_two_runs_give_the_same_bits() -> None:
    problem = Problem(LossOptions(vocab_size=700, **EVERYTHING))
    results = []
    for _ in range(2):
        hidden, weight = (tensor.clone().requires_grad_() for tensor in (problem.hidden, problem.weight))
        outputs = linear_cross_entropy(hidden, weight, problem.labels, problem.options)
        problem.backward(outputs)
        results.append([*outputs, hidden.grad, weight.grad])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_the_lowest_of_equal_logits_is_the_arg_max() -> None:
    weight = torch.zeros(40, 4)
    outputs = linear_cross_entropy(
        torch.ones(3, 4), weight, torch.zeros(3, dtype=torch.int64), LossOptions(vocab_size=40, arg_max=True)
    )
    assert outputs.arg_max.tolist() == [0, 0, 0]
    weight[[17, 33]] = 1.0
    outputs = linear_cross_entropy(
        torch.ones(3, 4), weight, torch.zeros(3, dtype=torch.int64), LossOptions(vocab_size=40, arg_max=True)
    )
    assert outputs.arg_max.tolist() == [17, 17, 17]


def test_what_needs_no_gradient_gets_none() -> None:
    problem = Problem(LossOptions(vocab_size=97))
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    problem.backward(linear_cross_entropy(hidden, problem.weight, problem.labels, problem.options))
    problem.backward(linear_cross_entropy(problem.hidden, weight, problem.labels, problem.options))
    assert relative(hidden.grad, problem.hidden_gradient) < FP32
    assert relative(weight.grad, problem.weight_gradient) < FP32
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, problem.labels, problem.options).loss.grad_fn is None


def test_autocast_does_not_take_bits_away() -> None:
    problem = Problem(LossOptions(vocab_size=97))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert worst(run(problem)) < FP32


# ------------------------------------------------------------------------------------------------------ several ranks


def shards(rows: int, num_ranks: int, uneven: bool) -> list[tuple[int, int]]:
    """First word and one past the last of every rank."""
    if not uneven:
        return [(rank * (rows // num_ranks), (rank + 1) * (rows // num_ranks)) for rank in range(num_ranks)]
    cuts = [0, *sorted(rows * (2 * rank + 1) // (2 * num_ranks + 1) for rank in range(1, num_ranks)), rows]
    return list(itertools.pairwise(cuts))


def _tensor_parallel(cases: list[dict[str, Any]], vocab_size: int, rows: int, modes: list[dict[str, Any]]) -> list[Any]:
    """The errors of every case in every mode, on this rank."""
    group = dist.group.WORLD
    assert group is not None
    rank, num_ranks = group.rank(), group.size()
    found = []
    for case, mode in itertools.product(cases, modes):
        options = LossOptions(vocab_size=vocab_size, **case)
        problem = Problem(options, shape=(8, 6), rows=rows)
        start, stop = shards(rows, num_ranks, mode.get("uneven", False))[rank]
        weight = problem.weight[start:stop].clone().requires_grad_()
        hidden, expected_hidden = problem.hidden, problem.hidden_gradient
        if mode.get("sequence_parallel"):
            hidden, expected_hidden = (whole.chunk(num_ranks)[rank] for whole in (hidden, expected_hidden))
        hidden = hidden.clone().requires_grad_()
        outputs = linear_cross_entropy(
            hidden, weight, problem.labels, options, group=group,
            first_word=start if mode.get("uneven") else None,
            sequence_parallel=mode.get("sequence_parallel", False), chunk=mode.get("chunk"),
        )  # fmt: skip
        problem.backward(outputs)
        problem.hidden_gradient, problem.weight_gradient = expected_hidden, problem.weight_gradient[start:stop]
        found.append(({**case, **mode}, problem.errors(outputs, hidden.grad, weight.grad), outputs.loss))
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_tensor_parallel_is_exact(dist: Run, num_ranks: int) -> None:
    """Softcap x z-loss x smoothing x ignore index, with and without sequence parallelism."""
    modes = [{}, {"sequence_parallel": True}]
    everything = {**EVERYTHING, "ignore_index": -1}
    by_rank = dist(num_ranks)(_tensor_parallel, [*CASES, everything], 500, 500, modes)
    for of_ranks in zip(*by_rank, strict=True):
        for case, errors, loss in of_ranks:
            assert worst(errors) < FP32, (case, errors)
            assert torch.equal(loss, of_ranks[0][2]), case  # every rank has the same bits


@pytest.mark.parametrize(("vocab_size", "rows"), [(499, 512), (130, 512), (3, 8)])
def test_shards_of_padding_and_of_unequal_size(dist: Run, vocab_size: int, rows: int) -> None:
    """130 words in four shards of 128: the last two shards are padding alone."""
    modes = [{"sequence_parallel": True, "chunk": 50}, {"uneven": True}]
    for found in dist(4)(_tensor_parallel, [{}, EVERYTHING], vocab_size, rows, modes):
        for case, errors, _ in found:
            assert worst(errors) < FP32, (case, errors)


# --------------------------------------------------------------------------------------- the parts that schedules run


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
def test_the_parts_make_the_whole(num_shards: int) -> None:
    """S on every shard, the combination, T on every shard: as vocabulary parallelism runs them, on one rank."""
    options = LossOptions(vocab_size=333, **EVERYTHING)
    problem = Problem(options, rows=340)
    cuts = shards(340, num_shards, uneven=True)
    parts = [
        shard_statistics(problem.hidden, problem.weight[start:stop], problem.labels, options, first_word=start)
        for start, stop in cuts
    ]
    statistics = combine_statistics(torch.stack(parts), options)
    coefficients = gradient_coefficients(
        statistics, problem.labels, options, loss_gradient_T=problem.upstream[0],
        log_probability_gradient_T=problem.upstream[1], entropy_gradient_T=problem.upstream[2],
    )  # fmt: skip
    input_gradient, weight_gradient = torch.zeros_like(problem.hidden), torch.full_like(problem.weight, float("nan"))
    for start, stop in cuts:
        part = shard_gradient(
            problem.hidden, problem.weight[start:stop], problem.labels, coefficients, options, first_word=start,
            weight_gradient_KD=weight_gradient[start:stop],
        )  # fmt: skip
        assert part is not None and part.dtype == torch.float32
        input_gradient += part
    outputs = token_outputs(statistics, problem.labels, options)
    assert worst(problem.errors(outputs, input_gradient, weight_gradient)) < FP32


def test_statistics_combine_in_any_grouping() -> None:
    options = LossOptions(vocab_size=300, **EVERYTHING)
    problem = Problem(options)
    parts = [
        shard_statistics(problem.hidden, problem.weight[start : start + 100], problem.labels, options, first_word=start)
        for start in (0, 100, 200)
    ]
    at_once = combine_statistics(torch.stack(parts), options)
    first = combine_statistics(torch.stack(parts[:2]), options)
    torch.testing.assert_close(combine_statistics(torch.stack([first, parts[2]]), options), at_once, rtol=FP32, atol=0)
    neutral = empty_statistics(len(problem.labels), options, problem.labels.device)
    assert torch.equal(combine_statistics(torch.stack([neutral, at_once, neutral]), options), at_once)


@pytest.mark.parametrize(
    ("wanted", "nbytes"),
    [({}, 12), ({"z_loss": 1e-3, "softcap": 3.0}, 12), ({"label_smoothing": 0.1}, 16), (EVERYTHING, 24)],
    ids=str,
)
def test_bytes_a_token_between_s_and_t(wanted: dict[str, Any], nbytes: int) -> None:
    options = LossOptions(vocab_size=300, **wanted)
    problem = Problem(options)
    statistics = shard_statistics(problem.hidden, problem.weight, problem.labels, options)
    assert statistics.untyped_storage().nbytes() == nbytes * len(problem.labels)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"softcap": 4.0, "z_loss": 1e-2, "logit_scale": 0.7},
        {"label_smoothing": 0.1, "logit_scale": 2.0, "arg_max": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_parts_with_one_barrier(num_shards: int, wanted: dict[str, Any], dtype: Any) -> None:
    """The input gradient is computed before the shards have met; the last of three shards is padding alone."""
    options = LossOptions(vocab_size=210, **wanted)
    problem = Problem(options, rows=340, dtype=dtype)
    cuts = [(0, 340)] if num_shards == 1 else [(0, 90), (90, 220), (220, 340)]
    of_shards = [
        shard_statistics_and_numerator(
            problem.hidden, problem.weight[start:stop], problem.labels, options, first_word=start, chunk=40
        )
        for start, stop in cuts
    ]
    whole = combine_statistics(torch.stack([statistics for statistics, _ in of_shards]), options)
    coefficients = gradient_coefficients(whole, problem.labels, options, loss_gradient_T=problem.upstream[0])
    found = torch.zeros(problem.hidden.shape)
    for (start, stop), (statistics, numerator) in zip(cuts, of_shards, strict=True):
        expected = shard_statistics(
            problem.hidden, problem.weight[start:stop], problem.labels, options, first_word=start
        )
        torch.testing.assert_close(statistics, expected, rtol=FP32, atol=1e-5)
        found += shard_input_gradient(
            numerator, statistics, coefficients, problem.weight[start:stop], problem.labels, options, first_word=start
        )
    assert relative(found, problem.hidden_gradient) < (FP32 if dtype == torch.float32 else 8 * UNIT[dtype])


@pytest.mark.parametrize("wanted", [{"entropy": True}, {"label_smoothing": 0.1, "softcap": 4.0}], ids=str)
def test_what_one_barrier_cannot_do_is_named(wanted: dict[str, Any]) -> None:
    options = LossOptions(vocab_size=10, **wanted)
    with pytest.raises(ValueError, match=r"=.* two barriers"):
        shard_statistics_and_numerator(torch.ones(2, 4), torch.ones(10, 4), torch.zeros(2, dtype=torch.int64), options)


def test_the_t_pass_alone_leaves_the_input_gradient_out() -> None:
    problem = Problem(LossOptions(vocab_size=97))
    statistics = shard_statistics(problem.hidden, problem.weight, problem.labels, problem.options)
    coefficients = gradient_coefficients(
        statistics, problem.labels, problem.options, loss_gradient_T=problem.upstream[0]
    )
    weight_gradient = torch.ones_like(problem.weight)
    found = shard_gradient(
        problem.hidden, problem.weight, problem.labels, coefficients, problem.options, needs_input_gradient=False,
        weight_gradient_KD=weight_gradient, accumulate=True,
    )  # fmt: skip
    assert found is None
    assert relative(weight_gradient - 1.0, problem.weight_gradient) < FP32


@pytest.mark.parametrize("fp32_logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("barriers", [1, 2])
def test_logits_that_are_kept_give_the_same_bits(barriers: int, dtype: Any, fp32_logits: bool) -> None:
    """S leaves them as they are, whatever it makes of them, and T needs no product for them."""
    options = LossOptions(vocab_size=131, softcap=4.0, z_loss=1e-2, fp32_logits=fp32_logits)
    problem = Problem(options, rows=133, dtype=dtype)
    hidden, weight, labels = problem.hidden.detach(), problem.weight.detach(), problem.labels
    statistics = shard_statistics_and_numerator if barriers == 1 else shard_statistics
    kept = empty_logits(hidden, weight, options)
    made = [statistics(hidden, weight, labels, options, chunk=40, logits_TK=logits) for logits in (None, kept)]  # type: ignore[operator]
    pairs = made if barriers == 1 else [(one,) for one in made]
    assert all(torch.equal(one, other) for one, other in zip(*pairs, strict=True))
    assert kept.shape == (48, 133) and kept.stride(0) % 128 == 0
    assert kept.dtype is (torch.float32 if fp32_logits else dtype)
    coefficients = gradient_coefficients(pairs[0][0], labels, options, loss_gradient_T=torch.ones(48))
    found = []
    for logits in (None, kept):
        weight_gradient = torch.empty(weight.shape)
        spoilt = weight if logits is None else torch.full_like(weight, torch.nan)  # only the input gradient needs it
        gradient = shard_gradient(
            hidden, spoilt if barriers == 1 else weight, labels, coefficients, options, chunk=40, logits_TK=logits,
            needs_input_gradient=barriers == 2, weight_gradient_KD=weight_gradient,
        )  # fmt: skip
        found.append((weight_gradient, gradient))
    assert torch.equal(found[0][0], found[1][0]) and found[0][0].isfinite().all()
    assert (found[0][1] is None) == (barriers == 1) and (barriers == 1 or torch.equal(found[0][1], found[1][1]))
