"""What is refused, with which words; and what happens to labels that go wrong later."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

import torch

from megamem.kernels import backends
from megamem.kernels.linear_cross_entropy import LossOptions, linear_cross_entropy

Run = Callable[[int], Callable[..., list[Any]]]


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"z_loss": -1.0}, "z_loss"),
        ({"z_loss": float("nan")}, "z_loss"),
        ({"softcap": 0.0}, "softcap"),
        ({"logit_scale": 0.0}, "logit_scale"),
        ({"vocab_size": (1 << 24) + 1, "arg_max": True}, "arg_max"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(wrong: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        LossOptions(**{"vocab_size": 10, **wrong})


def call(**changed: Any) -> Any:
    """A call that is right but for what is given."""
    given: dict[str, Any] = {
        "hidden": torch.ones(4, 8), "weight": torch.ones(10, 8), "labels": torch.zeros(4, dtype=torch.int64),
        "options": LossOptions(vocab_size=10), **changed,
    }  # fmt: skip
    return linear_cross_entropy(**given)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"hidden": torch.ones(4, 8).double()}, TypeError, "float64"),
        ({"weight": torch.ones(10, 8).bfloat16()}, TypeError, "weight is torch.bfloat16"),
        ({"labels": torch.zeros(4)}, TypeError, "labels are int64 or int32"),
        ({"weight": torch.ones(10, 7)}, ValueError, r"\[4, 8\] and \[10, 7\]"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, r"need labels \[4\], not \[5\]"),
        ({"labels": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "on one device"),
        ({"options": LossOptions(vocab_size=11)}, ValueError, "vocab_size is 11, but the weight has 10 rows"),
        ({"into_main_grad": True, "weight": torch.ones(10, 8, requires_grad=True)}, ValueError, "weight.main_grad"),
        ({"backend": "cuda"}, ValueError, "torch or triton, not 'cuda'"),
    ],
    ids=str,
)
def test_operands_it_does_not_take(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    call()
    with pytest.raises(error, match=words):
        call(**changed)


def test_a_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install triton, or take backend='torch'"):
        call(backend="triton")


# ------------------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize(("wrong", "ignore"), [(10, -100), (-1, -100), (-100, None), (1 << 40, -100)])
def test_a_label_outside_the_vocabulary_is_refused_in_the_first_call(wrong: int, ignore: int | None) -> None:
    labels = torch.tensor([1, 2, wrong, 3])
    options = LossOptions(vocab_size=10, ignore_index=ignore)
    with pytest.raises(ValueError, match=rf"1 of 4 labels .* first is {wrong} at token 2: .*vocab_size.*ignore_index"):
        call(labels=labels, options=options)


def test_a_padded_row_is_no_label() -> None:
    with pytest.raises(ValueError, match="words are 0 to 6"):
        call(labels=torch.tensor([1, 2, 7, 3]), options=LossOptions(vocab_size=7))


def test_later_it_gives_nan_for_its_token_and_for_every_gradient_it_reaches() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    options = LossOptions(vocab_size=10, entropy=True)
    call(hidden=hidden, weight=weight, options=options)
    outputs = call(hidden=hidden, weight=weight, options=options, labels=torch.tensor([1, 12, -100, 3]))
    for output in outputs[:3]:
        assert output.isnan().tolist() == [False, True, False, False]
        assert output[2] == 0
    outputs.loss.sum().backward()
    assert hidden.grad.isnan().any(1).tolist() == [False, True, False, False]
    assert weight.grad.isnan().all()


def test_the_first_call_is_one_for_each_weight_and_each_set_of_options() -> None:
    weight, wrong = torch.randn(10, 8), torch.tensor([1, 2, 12, 3])
    call(weight=weight)
    assert call(weight=weight, labels=wrong).loss.isnan().any()
    for fresh in ({"weight": weight.clone()}, {"weight": weight, "options": LossOptions(vocab_size=9)}):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            call(**fresh, labels=wrong)


# ------------------------------------------------------------------------------------------------------------ shards


def _shards(rows: list[int], first: list[int] | None, tokens: list[int], vocab_sizes: list[int]) -> str:
    """What a rank says about shards of these sizes."""
    import torch.distributed as dist

    rank = dist.get_rank()
    try:
        linear_cross_entropy(
            torch.ones(tokens[rank], 8), torch.ones(rows[rank], 8), torch.zeros(tokens[rank], dtype=torch.int64),
            LossOptions(vocab_size=vocab_sizes[rank]), group=dist.group.WORLD,
            first_word=None if first is None else first[rank],
        )  # fmt: skip
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("rows", "first", "tokens", "vocab_sizes", "words"),
    [
        ([5, 5], None, [4, 4], [10, 10], "accepted"),
        ([3, 7], [0, 3], [4, 4], [10, 10], "accepted"),
        ([3, 7], None, [4, 4], [10, 10], "rank 1's shard begins at word 7, not 3"),
        ([5, 5], [0, 4], [4, 4], [10, 10], "rank 1's shard begins at word 4, not 5"),
        ([5, 5], None, [4, 4], [11, 11], "the shards end at word 10, but vocab_size is 11"),
        ([5, 5], None, [4, 6], [10, 10], "numbers of tokens differ: [4, 6]"),
        ([5, 5], None, [4, 4], [10, 9], "vocab_size differ: [10, 9]"),
    ],
    ids=str,
)
def test_shards_that_do_not_match_are_refused_on_every_rank(
    dist: Run, rows: list[int], first: list[int] | None, tokens: list[int], vocab_sizes: list[int], words: str
) -> None:
    for said in dist(2)(_shards, rows, first, tokens, vocab_sizes):
        assert words in said
