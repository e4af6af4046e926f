"""From fates and a signature to segments of tokens: checked against a brute-force reading of the definition."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pip install 'megamem[train]'")

from megamem.errors import UnsupportedError  # noqa: E402
from megamem.ir.activation import ANCHORS, BASE, KEEP, RECOMPUTE, SWAP, TENSORS, Fate, LayerRule  # noqa: E402
from megamem.runtime.activations.geometry import Geometry, TokenAxis  # noqa: E402
from megamem.runtime.activations.recipe import Recipe, Situation, make_recipe  # noqa: E402
from megamem.runtime.activations.signature import AnchorSpec, EntrySpec, PackSpec, Signature, Source  # noqa: E402

LAYER: Any = SimpleNamespace(number=7, attention="attention", experts=None)  # all that a recipe asks of a layer
PATHS = {"qkv": "qkv_linear", "projection": "projection_linear", "fc1": "fc1_linear"}
AXIS = TokenAxis(0)
TOKENS = 100


def _signature(entries: dict[str, list[Source]], anchors: tuple[str, ...] = ANCHORS) -> Signature:
    """One saved tensor per entry; names are as in `EntrySpec.name`."""
    signature = Signature([], [])
    for index, (name, sources) in enumerate(entries.items()):
        geometry = Geometry((TOKENS, 4), (4, 1))
        signature.packs.append(PackSpec(torch.Size((TOKENS, 4)), (4, 1), torch.float32, index, geometry, True))
        signature.entries.append(EntrySpec(name, [index], TOKENS * 4, torch.float32, sources))
    signature.anchors = {name: AnchorSpec(PATHS[name], AXIS) for name in anchors}
    signature.attention = AXIS
    return signature


def _by_pack(path: str, axis: TokenAxis | None = AXIS) -> Source:
    return Source(Geometry((TOKENS, 4), (4, 1)), axis, pack=(path, 0))


def _by_input(part: str) -> Source:
    return Source(Geometry((TOKENS, 4), (4, 1)), AXIS, part=part)


USUAL = {
    "layer_input": [],
    "norm": [_by_pack("norm")],
    "attention": [],  # the log-sum-exp
    "attention_output": [],
    "fc1_linear": [_by_pack("fc1_linear"), _by_input("fc1_linear")],
    "act": [_by_pack("act")],
}


def _rule(**fates: Fate) -> LayerRule:
    named = {name.replace("__", "."): fate for name, fate in fates.items()}
    return LayerRule(fates={**dict.fromkeys(TENSORS, SWAP), **dict.fromkeys(ANCHORS, RECOMPUTE), **named})


def _make(rule: LayerRule, entries: Any = None, **situation: Any) -> Recipe:
    return make_recipe(_signature(USUAL if entries is None else entries), rule, LAYER, Situation(TOKENS, **situation))


def _spans(recipe: Recipe) -> list[tuple[int, int]]:
    return [(segment.start, segment.stop) for segment in recipe.segments]


def _check_complete(recipe: Recipe) -> None:
    """Every token of every entry is stored or replayed exactly once, and no replay answers what is not stored."""
    for plan in recipe.entries:
        covered = [0] * TOKENS
        for token in range(TOKENS if plan.whole else plan.tokens):
            covered[token] += 1
        whole_by_replay = plan.source is not None and plan.source.axis is None
        for segment in recipe.segments:
            if plan.index in segment.wanted:
                span = range(TOKENS) if whole_by_replay else range(segment.start, segment.stop)
                for token in span:
                    covered[token] += 1
        rebuilt_input = plan.name == "layer_input" and not recipe.store_input
        assert covered == [0 if rebuilt_input else 1] * TOKENS, plan
    for segment in recipe.segments:
        assert all(anchor.start <= segment.start and segment.stop <= anchor.tokens for anchor in segment.answered)
        reachable = {index for items in segment.on_pack.values() for index, _ in items}
        reachable |= {index for items in segment.on_input.values() for index, _ in items}
        assert segment.wanted <= reachable
        skipped = {anchor.path for anchor in segment.answered}
        assert not any(path in skipped for path, _ in segment.on_pack)


def test_a_pure_swap_has_no_replay_and_stores_no_anchor() -> None:
    recipe = _make(_rule())
    assert recipe.segments == [] and recipe.anchors == [] and not recipe.needs_base
    assert all(plan.whole and plan.tier == "host" for plan in recipe.entries)
    _check_complete(recipe)


def test_recomputation_is_one_replay_of_everything_but_attention_and_its_scratch() -> None:
    recipe = _make(_rule(saved=RECOMPUTE, layer_input=KEEP, attention_output=KEEP))
    assert _spans(recipe) == [(0, TOKENS)]
    assert recipe.segments[0].wanted == {1, 4, 5}
    assert [plan.tier for plan in recipe.entries if plan.whole] == ["hbm"] * 3
    _check_complete(recipe)


def test_equal_fractions_make_one_segment_and_different_ones_a_cut_each() -> None:
    assert _spans(_make(_rule(saved=Fate(fraction=0.4)))) == [(40, 100)]
    rule = _rule(saved=RECOMPUTE, fc1=Fate(fraction=0.25), qkv=Fate(fraction=0.5), act=Fate(fraction=0.5))
    recipe = _make(rule)
    assert _spans(recipe) == [(0, 25), (25, 50), (50, 100)]
    assert [[anchor.name for anchor in segment.answered] for segment in recipe.segments] == [
        ["qkv", "fc1"],
        ["qkv"],
        [],
    ]
    assert [5 in segment.wanted for segment in recipe.segments] == [False, False, True]
    _check_complete(recipe)


def test_anchors_are_stored_from_where_replays_begin() -> None:
    """Where everything is stored no replay asks for an anchor."""
    rule = _rule(saved=Fate(fraction=0.3), act=Fate(fraction=0.3), fc1=Fate(fraction=0.7), qkv=Fate(fraction=0.2))
    recipe = _make(rule)
    assert [(plan.name, plan.start, plan.tokens) for plan in recipe.anchors] == [("fc1", 30, 70)]
    (piece,) = [piece for load in recipe.loads for piece in load.pieces if piece.kind == "anchor"]
    assert (piece.start, piece.tokens) == (30, 70)
    _check_complete(recipe)


def test_an_anchor_is_left_out_of_a_replay_unless_only_running_it_brings_a_tensor() -> None:
    rule = _rule(saved=RECOMPUTE, fc1=SWAP)
    assert [plan.name for plan in _make(rule).anchors] == ["fc1"]
    only_inside = {**USUAL, "fc1_linear": [_by_pack("fc1_linear")]}
    recipe = _make(rule, only_inside)
    assert recipe.anchors == []
    _check_complete(recipe)


def test_what_cannot_be_rebuilt_goes_with_attention_output_however_small_its_fraction() -> None:
    odd = {**USUAL, "routing": []}
    recipe = _make(_rule(saved=RECOMPUTE, attention_output=KEEP), odd)
    assert (recipe.entries[6].whole, recipe.entries[6].tier) == (True, "hbm")
    recipe = _make(_rule(saved=RECOMPUTE), odd)
    assert (recipe.entries[6].whole, recipe.entries[6].tier) == (True, "host")
    _check_complete(recipe)


def test_attentions_own_scratch_shares_the_fate_of_its_output() -> None:
    recipe = _make(_rule(saved=Fate(fraction=0.5), attention_output=KEEP))
    assert (recipe.entries[2].whole, recipe.entries[2].tier) == (True, "hbm")


def test_a_tensor_that_does_not_count_tokens_comes_with_the_first_replay_only() -> None:
    entries = {**USUAL, "table": [_by_pack("table", axis=None)]}
    recipe = _make(_rule(saved=RECOMPUTE, fc1=Fate(fraction=0.5)), entries)
    assert [6 in segment.wanted for segment in recipe.segments] == [True, False]
    _check_complete(recipe)


@pytest.mark.parametrize(
    ("room", "base", "replayed"), [("all", "host", False), ("base", "host", True), ("none", "hbm", True)]
)
def test_where_the_host_is_full_the_rest_is_recomputed_and_then_the_base_is_kept(
    room: Any, base: str, replayed: bool
) -> None:
    recipe = _make(_rule(), room=room)
    assert {plan.tier for plan in recipe.entries if plan.name in BASE} == {base}
    assert bool(recipe.segments) == replayed
    assert recipe.entries[2].tier == base
    _check_complete(recipe)


def test_what_stays_in_device_memory_anyway_does_not_depend_on_room() -> None:
    rule = _rule(saved=Fate(fraction=0.5, tier="hbm"), layer_input=KEEP, attention_output=KEEP)
    assert [_make(rule, room=room).entries for room in ("all", "base", "none")] == [_make(rule).entries] * 3  # type: ignore[arg-type]


def test_an_input_that_is_held_elsewhere_stays() -> None:
    recipe = _make(_rule(), input_is_held=True)
    assert [plan.tier for plan in recipe.entries if plan.name in BASE] == ["hbm", "host"]


def test_an_input_that_the_layer_before_brings_is_not_stored() -> None:
    recipe = _make(_rule(), store_input=False, keep_base=True)
    assert not recipe.entries[0].whole and recipe.entries[0].tokens == 0
    assert recipe.needs_base and not recipe.store_input
    assert all(piece.kind != "layer_input" and piece.index != 0 for load in recipe.loads for piece in load.pieces)
    _check_complete(recipe)


def test_the_base_travels_apart_where_the_next_layer_may_ask_for_it_alone() -> None:
    apart = _make(_rule(), keep_base=True)
    assert [(load.is_base, len(load.pieces)) for load in apart.loads] == [(True, 2), (False, 4)]
    together = _make(_rule())
    assert [(load.is_base, len(load.pieces)) for load in together.loads] == [(False, 6)]


def test_a_layer_that_is_replayed_whole_takes_0_and_1_but_no_fraction_between() -> None:
    signature = _signature({name: [_by_pack(name, axis=None)] if sources else [] for name, sources in USUAL.items()})
    signature.whole_only = "dropout"
    for fraction, spans in ((0.0, [(0, TOKENS)]), (1.0, [])):
        recipe = make_recipe(signature, _rule(saved=Fate(fraction=fraction)), LAYER, Situation(TOKENS))
        assert _spans(recipe) == spans
        _check_complete(recipe)
    with pytest.raises(UnsupportedError, match=r"layer 7: a fraction of 0\.5 is not possible.*dropout"):
        make_recipe(signature, _rule(saved=Fate(fraction=0.5)), LAYER, Situation(TOKENS))


def test_any_fates_cover_every_token_once() -> None:
    rng = random.Random(0)
    for _ in range(400):
        fates: dict[str, Fate] = {
            name: Fate(fraction=rng.choice((0.0, 1.0, rng.random())), tier=rng.choice(("hbm", "host")))
            for name in ("saved", *ANCHORS, "act", "norm")
        }
        base = {name: rng.choice((KEEP, SWAP)) for name in BASE}
        room = rng.choice(("all", "base", "none"))
        recipe = _make(_rule(**fates, **base), room=room, store_input=rng.random() < 0.7, keep_base=rng.random() < 0.5)
        _check_complete(recipe)
        assert len(recipe.segments) <= 7
        stops = [0, *(stop for _, stop in _spans(recipe))]
        assert all(start >= stop for (start, _), stop in zip(_spans(recipe), stops, strict=False))


def test_codes_and_scales_travel_as_they_are() -> None:
    """What is in another format than the layer's input is no activation; a codec would make it one."""
    signature = _signature({"norm": [], "codes": [], "scales": []})
    signature.dtype = torch.bfloat16
    for pack, entry, dtype in zip(
        signature.packs, signature.entries, (torch.bfloat16, torch.uint8, torch.float32), strict=True
    ):
        pack.shape, pack.dtype, entry.dtype = torch.Size((TOKENS, 512)), dtype, dtype
    rule = LayerRule(fates=dict.fromkeys((*TENSORS, "norm", "codes", "scales"), Fate(fraction=1.0, codec="fp8")))
    recipe = make_recipe(signature, rule, LAYER, Situation(TOKENS))
    assert [piece.codec for load in recipe.loads for piece in load.pieces if piece.kind == "entry"] == [
        "fp8",
        None,
        None,
    ]
