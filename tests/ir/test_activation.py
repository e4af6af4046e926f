"""Fates as text and numbers, and which rule applies to what. No torch."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megamem.ir.activation import (
    ANCHORS,
    BASE,
    EXPERTS,
    KEEP,
    RECOMPUTE,
    SAVED,
    SWAP,
    TENSORS,
    ActivationPlan,
    Fate,
    LayerRule,
)

ALL = dict.fromkeys(TENSORS, SWAP)


@pytest.mark.parametrize(
    ("text", "fate"),
    [
        ("keep", KEEP),
        ("swap", SWAP),
        ("recompute", RECOMPUTE),
        ("0.5", Fate(fraction=0.5)),
        (0.5, Fate(fraction=0.5)),
        (1, SWAP),
        (0, RECOMPUTE),
        (" 0.25@hbm ", Fate(fraction=0.25, tier="hbm")),
        ("0.5@host", Fate(fraction=0.5)),
        ("1e-1", Fate(fraction=0.1)),
        ("1@hbm", KEEP),
        ("swap/fp8", Fate(fraction=1.0, codec="fp8")),
        ("0.5@host/fp8", Fate(fraction=0.5, codec="fp8")),
        ("0.5/none", Fate(fraction=0.5, codec="none")),
    ],
)
def test_a_fate_is_read_from_its_text(text: str | float, fate: Fate) -> None:
    assert Fate.parse(text) == fate


def test_a_fate_survives_the_way_to_text_and_back() -> None:
    rng = random.Random(0)
    for _ in range(300):
        fate = Fate(fraction=rng.choice((0.0, 1.0, round(rng.random(), 4))), tier=rng.choice(("hbm", "host")))
        assert Fate.parse(str(fate)) == fate
        coded = replace(fate, codec="fp8" if fate.tier == "host" and fate.fraction else "none")
        assert Fate.parse(str(coded)) == coded
    assert [str(fate) for fate in (KEEP, SWAP, RECOMPUTE)] == ["keep", "swap", "recompute"]


@pytest.mark.parametrize(
    "text", ["", "swop", "0.5@nvme", "0.5@", "@host", "half", "1.5", "-0.1", "0.5.1", "nan", "e", "inf"]
)
def test_what_is_no_fate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"none of keep|between 0 and 1"):
        Fate.parse(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("keep/fp8", "swapped to host"),
        ("0.5@hbm/fp8", "swapped to host"),
        ("recompute/fp8", "swapped to host"),
        ("swap/int4", "none or fp8"),
        ("swap/", "none or fp8"),
        ("swap/fp8/fp8", "none or fp8"),
        ("/fp8", "none of keep"),
    ],
)
def test_a_codec_that_cannot_be_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Fate.parse(text)


def test_a_fate_cannot_be_made_with_another_tier() -> None:
    with pytest.raises(ValueError, match="hbm or host"):
        Fate(fraction=0.5, tier="nvme")  # type: ignore[arg-type]


@pytest.mark.parametrize("fraction", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_fraction_outside_of_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Fate(fraction=fraction)


def test_token_counts_are_exact_at_the_ends_monotone_and_never_more_than_the_fraction() -> None:
    rng = random.Random(1)
    for _ in range(500):
        total, one, other = rng.randint(0, 1 << 20), rng.random(), rng.random()
        low, high = (Fate(fraction=f).num_tokens(total) for f in sorted((one, other)))
        assert 0 <= low <= high <= total
        assert high <= max(one, other) * total + 1
        assert (RECOMPUTE.num_tokens(total), SWAP.num_tokens(total)) == (0, total)
    assert [Fate(fraction=k / 10).num_tokens(10) for k in range(11)] == list(range(11))  # no 0.7 * 10 = 6.999
    assert Fate(fraction=1 / 3).num_tokens(9) == 3


def test_only_fractions_strictly_between_are_partial() -> None:
    assert Fate(fraction=0.5).is_partial
    assert not any(fate.is_partial for fate in (KEEP, SWAP, RECOMPUTE))


def test_a_rule_needs_a_fate_for_every_name_unless_it_leaves_its_layer_alone() -> None:
    with pytest.raises(ValueError, match="saved, experts"):
        LayerRule(fates=dict.fromkeys((*BASE, *ANCHORS), SWAP))
    assert LayerRule(untouched=True).fates == {}


def test_the_longest_matching_path_decides() -> None:
    rule = LayerRule(fates={**ALL, "mlp": KEEP, "mlp.linear_fc2": RECOMPUTE})
    assert rule.fate_of("mlp.linear_fc2") == rule.fate_of("mlp.linear_fc2.inner") == RECOMPUTE
    assert rule.fate_of("mlp.linear_fc1") == rule.fate_of("mlp") == KEEP
    assert rule.fate_of("self_attention.linear_qkv") == SWAP
    assert rule.fate_of("mlp_two") == SWAP  # no prefix of a word
    assert rule.fate_of("layer_input") == SWAP


@pytest.mark.parametrize(
    ("changed", "recomputes", "partial"),
    [
        ({}, False, False),
        ({SAVED: RECOMPUTE}, True, False),
        ({SAVED: Fate(fraction=0.5)}, True, True),
        ({"mlp.linear_fc2": RECOMPUTE}, True, False),
        ({"fc1": Fate(fraction=0.5)}, False, True),
        ({"fc1": RECOMPUTE, "qkv": RECOMPUTE}, False, False),
        ({EXPERTS: KEEP}, False, False),
    ],
)
def test_a_rule_knows_whether_it_recomputes_and_cuts(changed: dict[str, Fate], recomputes: bool, partial: bool) -> None:
    rule = LayerRule(fates={**ALL, **changed})
    assert (rule.recomputes, rule.is_partial) == (recomputes, partial)
    left_alone = LayerRule(untouched=True, fates={**ALL, **changed})
    assert (left_alone.recomputes, left_alone.is_partial) == (False, False)


def test_a_layer_whose_input_is_rebuilt_recomputes() -> None:
    assert LayerRule(fates=ALL, store_input=False).recomputes


def test_layers_past_the_end_of_a_plan_use_its_last_rule() -> None:
    first, last = LayerRule(fates=ALL), LayerRule(untouched=True)
    plan = ActivationPlan(rules=(first, last))
    assert [plan.rule(number) for number in (1, 2, 3, 99)] == [first, last, last, last]
