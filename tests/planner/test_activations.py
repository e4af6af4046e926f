"""From options to one rule per layer. No torch."""

from __future__ import annotations

from typing import Any

import pytest

from megamem.config import Activations, load_config
from megamem.errors import ConfigError
from megamem.ir.activation import ANCHORS, BASE, EXPERTS, KEEP, RECOMPUTE, SAVED, SWAP, ActivationPlan, Fate
from megamem.planner.activations import plan_activations


def _plan(num_layers: int = 6, **options: Any) -> ActivationPlan:
    config: Activations = load_config({"activations": options}).activations
    return plan_activations(config, num_layers)


def test_recompute_keeps_the_base_of_every_layer_and_stores_nothing_else() -> None:
    for rule in _plan(policy="recompute").rules:
        assert not rule.untouched and rule.store_input
        assert [rule.fates[name] for name in BASE] == [KEEP, KEEP]
        assert {rule.fates[name] for name in (*ANCHORS, SAVED)} == {RECOMPUTE}


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_memo_swaps_the_base_and_one_fraction_of_all_the_rest(fraction: float) -> None:
    rule = _plan(policy="memo", swap_fraction=fraction).rules[0]
    assert [rule.fates[name] for name in BASE] == [SWAP, SWAP]
    assert rule.fates[SAVED] == Fate(fraction=fraction)
    assert {rule.fates[name] for name in ANCHORS} == {RECOMPUTE}
    assert rule.recomputes == (fraction < 1)


def test_ordered_stores_outputs_of_linear_layers_and_rebuilds_those_of_element_wise_ones() -> None:
    rule = _plan(policy="ordered", swap_fraction=0.3).rules[0]
    assert [rule.fates[name] for name in BASE] == [SWAP, SWAP]
    assert {rule.fates[name] for name in ANCHORS} == {Fate(fraction=0.3)}
    assert rule.fates[SAVED] == RECOMPUTE


@pytest.mark.parametrize("policy", ["memo", "ordered"])
@pytest.mark.parametrize(("kept", "untouched"), [(0, []), (2, [5, 6]), (6, [*range(1, 7)]), (9, [*range(1, 7)])])
def test_the_last_layers_are_left_alone(policy: str, kept: int, untouched: list[int]) -> None:
    plan = _plan(policy=policy, keep_last_layers=kept)
    assert [number for number, rule in enumerate(plan.rules, 1) if rule.untouched] == untouched


def test_two_layers_are_kept_by_default_and_none_under_recompute() -> None:
    assert sum(rule.untouched for rule in _plan(policy="memo").rules) == 2
    assert not any(rule.untouched for rule in _plan(policy="recompute").rules)


@pytest.mark.parametrize(("every", "stored"), [(1, [1, 2, 3, 4, 5, 6]), (2, [1, 3, 5]), (4, [1, 5]), (9, [1])])
def test_every_kth_layer_stores_its_input(every: int, stored: list[int]) -> None:
    plan = _plan(policy="memo", residual_every=every)
    assert [number for number, rule in enumerate(plan.rules, 1) if rule.store_input] == stored


def test_experts_recomputed_by_megatron_are_kept_by_us() -> None:
    fates = {
        choice: _plan(policy="memo", experts=choice).rules[0].fates[EXPERTS] for choice in ("keep", "swap", "recompute")
    }
    assert fates == {"keep": KEEP, "swap": SWAP, "recompute": KEEP}


def test_rows_of_the_table_refine_their_layers_and_later_rows_win() -> None:
    table = [{"layers": "2-4", "fc1": 0.5, "mlp.linear_fc2": "keep"}, {"layers": "4", "fc1": "swap"}]
    rules = _plan(policy="ordered", keep_last_layers=1, table=table).rules
    assert [str(rule.fates["fc1"]) for rule in rules] == ["swap", "0.5", "0.5", "swap", "swap", "swap"]
    assert "mlp.linear_fc2" not in rules[0].fates
    assert rules[1].fate_of("mlp.linear_fc2") == KEEP


def test_a_row_for_a_layer_takes_it_out_of_those_left_alone() -> None:
    rules = _plan(policy="memo", table=[{"layers": "6", "saved": "recompute"}]).rules
    assert [rule.untouched for rule in rules] == [False, False, False, False, True, False]


def test_everything_that_would_run_attention_again_is_reported_at_once() -> None:
    table = [{"layers": "1", "attention_output": "recompute"}, {"layers": "2", "layer_input": "0.5@hbm"}]
    with pytest.raises(ConfigError) as caught:
        _plan(policy="memo", table=table)
    first, second = caught.value.problems
    assert "layer 1: attention_output: recompute would need attention to run again" in first
    assert "layer 2: layer_input: 0.5@hbm would need the layer before to run again" in second
    assert all("give keep or swap" in problem for problem in caught.value.problems)


FP8 = {"policy": "memo", "compress": "fp8"}


def _codecs(row: dict[str, str], **options: Any) -> dict[str, str | None]:
    """What travels how in layer 1, by tensor or the module that saves it."""
    rule = _plan(**{**FP8, **options}, table=[{"layers": "all", **row}] if row else []).rules[0]
    paths = ("self_attention.linear_qkv", "mlp", "mlp.linear_fc1", "mlp.linear_fc2", "self_attention.core_attention")
    return {
        **{name: rule.fates[name].codec for name in rule.fates},
        **{path: rule.fate_of(path).codec for path in paths},
    }


def test_linear_inputs_and_what_the_activation_function_gets_are_compressed() -> None:
    coded = {name for name, codec in _codecs({}).items() if codec == "fp8"}
    assert coded == {"self_attention.linear_qkv", "mlp", "mlp.linear_fc1", "mlp.linear_fc2"}
    coded = {name for name, codec in _codecs({}, policy="ordered", swap_fraction=0.5).items() if codec == "fp8"}
    assert coded == {"fc1"}


def test_compression_changes_no_fate_but_its_codec() -> None:
    for policy in ("memo", "ordered"):
        for row in ({}, {"saved": "0.5@hbm"}, {"mlp.linear_fc2": "recompute", "fc1": "0.25"}):
            options = {"policy": policy, "swap_fraction": 0.4, "table": [{"layers": "all", **row}] if row else []}
            plain, coded = _plan(**options).rules[0], _plan(**options, compress="fp8").rules[0]
            for name in (*coded.fates, "mlp.linear_fc1", "mlp.linear_fc2", "mlp", "pre_mlp_layernorm"):
                one = plain.fates.get(name) or plain.fate_of(name)
                other = coded.fates.get(name) or coded.fate_of(name)
                assert (one.fraction, one.tier) == (other.fraction, other.tier), (policy, row, name)


def test_the_table_asks_for_more_or_less_compression() -> None:
    found = _codecs({"mlp.linear_fc2": "swap/none", "attention_output": "swap/fp8", "mlp.linear_fc1": "0.5"})
    assert found["mlp.linear_fc2"] == "none" and found["attention_output"] == found["mlp.linear_fc1"] == "fp8"
    assert _codecs({"mlp.linear_fc2": "swap/fp8"}, compress="none")["mlp.linear_fc2"] == "fp8"
    everything = _codecs({"saved": "swap/fp8"}, compress="none")
    assert everything["mlp.linear_fc2"] == "fp8" and everything["self_attention.core_attention"] is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qkv", "query or key"),
        ("self_attention.core_attention", "query or key"),
        ("self_attention.core_attention.flash_attention", "query or key"),
        ("experts", "as it is"),
    ],
)
def test_what_must_not_be_compressed_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        _plan(policy="memo", table=[{"layers": "all", name: "swap/fp8"}])


def test_compression_without_swap_is_a_contradiction() -> None:
    with pytest.raises(ConfigError, match=r"activations.compress: has no effect with policy 'recompute'"):
        _plan(policy="recompute", compress="fp8")


@pytest.mark.parametrize("mode", ["mlp", "all"])
def test_codes_take_the_place_of_what_they_are_made_of_and_are_not_coded_again(mode: str) -> None:
    table = [{"layers": "2", "saved": "swap/fp8"}]
    options = {"policy": "ordered", "swap_fraction": 0.3, "compress": "fp8", "table": table}
    config = load_config({"activations": options, "fp8": {"saved_activations": mode}})
    first, second = plan_activations(config.activations, 4, config.fp8).rules[:2]
    assert first.fates["fc1"] == RECOMPUTE and first.fates["mlp"] == Fate(fraction=0.3)
    assert first.fates["qkv"] == Fate(fraction=0.3)
    assert second.fate_of("pre_mlp_layernorm") == (SWAP if mode == "all" else Fate(fraction=1.0, codec="fp8"))
