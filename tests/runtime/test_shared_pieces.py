"""Saved tensors that travel as one: each comes back from its place in the piece, and only where that is safe."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pip install 'megamem[train]'")

from megamem.ir.activation import ANCHORS, KEEP, RECOMPUTE, SWAP, TENSORS, Fate, LayerRule  # noqa: E402
from megamem.runtime.activations.capture import Handle  # noqa: E402
from megamem.runtime.activations.recipe import Recipe, Situation, make_recipe  # noqa: E402
from megamem.runtime.activations.signature import Signature, survey  # noqa: E402

TOKENS = 16
LAYER: Any = SimpleNamespace(
    number=1,
    attention=None,
    experts=None,
    parameter_storages=frozenset,
    must_stay=lambda tensor: False,
    saver=str,
)
CAPTURE: Any = SimpleNamespace(layer=LAYER, output=lambda path: None)


def learned(tensors: list[Any]) -> tuple[Signature, list[Handle]]:
    handles = [Handle(tensor, "part") for tensor in tensors]
    signature, _ = survey(CAPTURE, handles, torch.empty(TOKENS, 1, 4), (), {})
    return signature, handles


def recipe_of(signature: Signature, saved: Fate = SWAP) -> Recipe:
    fates = {**dict.fromkeys(TENSORS, SWAP), **dict.fromkeys(ANCHORS, RECOMPUTE), "saved": saved}
    return make_recipe(signature, LayerRule(fates=fates), LAYER, Situation(TOKENS))


def check_comes_back(recipe: Recipe, handles: list[Handle], tensors: list[Any]) -> None:
    """Store what the recipe says, as a slot would hold it, and look at every saved tensor where it is said to be."""
    memory: dict[int, Any] = {}
    for load in recipe.loads:
        for piece in load.pieces:
            stored = piece.collect(handles) if piece.shares else piece.cut(handles[piece.position].tensor)  # type: ignore[arg-type]
            memory |= dict.fromkeys([share.entry for share in piece.shares] or [piece.index], stored.clone())
    for (entry, geometry), tensor in zip(recipe.targets, tensors, strict=True):
        if entry >= 0:
            got = memory[entry] if geometry is None else geometry.view(memory[entry])
            assert torch.equal(got, tensor) and got.shape == tensor.shape


def split_heads(rng: random.Random) -> list[Any]:
    """Query, key and value as views of what one linear layer made, some transposed as attention kernels want them."""
    widths = [8 * rng.randint(1, 4), 8, 8]
    mixed = torch.randn(TOKENS, 2, rng.randint(1, 3), sum(widths))
    views = list(mixed.split(widths, dim=-1))
    rng.shuffle(views)
    return [view.permute(1, 2, 0, 3) if rng.random() < 0.5 else view for view in views]


@pytest.mark.parametrize("seed", range(8))
def test_interleaved_tensors_are_stored_as_they_lie(seed: int) -> None:
    rng = random.Random(seed)
    views = split_heads(rng)
    tensors = [*views, views[0].transpose(0, 1), torch.randn(TOKENS, 2, 4)]
    signature, handles = learned(tensors)
    [weave] = signature.weaves
    assert len(weave.members) == 3 and weave.numel == sum(view.numel() for view in views)
    recipe = recipe_of(signature)
    [woven] = [piece for load in recipe.loads for piece in load.pieces if piece.is_woven]
    stored = woven.collect(handles)
    assert stored.untyped_storage().data_ptr() == views[0].untyped_storage().data_ptr()  # not gathered first
    check_comes_back(recipe, handles, tensors)


@pytest.mark.parametrize("keep", [[0, 1], [0, 2], [1, 2]])
def test_a_stretch_with_a_gap_is_no_weave(keep: list[int]) -> None:
    """With rotary positions only the value is left of it: what is not saved must not travel with it."""
    views = torch.randn(TOKENS, 2, 24).split([8, 8, 8], dim=-1)
    tensors = [views[i] for i in keep]
    signature, handles = learned(tensors)
    assert signature.weaves == []
    check_comes_back(recipe_of(signature), handles, tensors)


@pytest.mark.parametrize("saved", [KEEP, Fate(fraction=0.5), RECOMPUTE])
def test_only_what_is_swapped_whole_shares_a_piece(saved: Fate) -> None:
    tensors = [*torch.randn(TOKENS, 2, 24).split([8, 8, 8], dim=-1), *torch.randn(2, TOKENS, 1, 1).unbind()]
    signature, _ = learned([*tensors, torch.randn(TOKENS, 2, 512)])
    for entry in signature.entries:  # as if a replay brought them
        entry.sources = [SimpleNamespace(pack=("part", 0), axis=None, geometry=signature.packs[0].geometry)]  # type: ignore[list-item]
    recipe = recipe_of(signature, saved)
    assert not any(piece.shares for load in recipe.loads for piece in load.pieces)


def test_small_tensors_travel_together_by_dtype() -> None:
    big, odd = torch.randn(TOKENS, 2, 512), torch.randn(3)  # 12 bytes: what follows it would not be aligned
    stats = [torch.randn(TOKENS, 2, 1) for _ in range(3)]
    lse = torch.randn(2, 4, TOKENS).permute(0, 2, 1)  # dense, and not contiguous
    halves = [torch.randn(8).bfloat16(), torch.randn(16).bfloat16()]
    tensors = [stats[0], big, lse, odd, *halves, *stats[1:]]
    signature, handles = learned(tensors)
    recipe = recipe_of(signature)
    [load] = recipe.loads
    shared = [[signature.entries[share.entry].packs[0] for share in piece.shares] for piece in load.pieces]
    assert sorted(map(sorted, filter(None, shared))) == [[0, 2, 6, 7], [4, 5]]
    assert len(load.pieces) == 4
    check_comes_back(recipe, handles, tensors)


def test_tensors_of_one_size_are_not_bundled() -> None:
    """What travels together is freed together, so it must be little."""
    tensors = [torch.randn(TOKENS, 2, 4) for _ in range(8)]
    signature, handles = learned(tensors)
    recipe = recipe_of(signature)
    assert not any(piece.shares for load in recipe.loads for piece in load.pieces)
    check_comes_back(recipe, handles, tensors)


def test_a_layer_that_splits_its_heads_otherwise_is_learned_anew() -> None:
    mixed = torch.randn(TOKENS, 2, 24)
    signature, handles = learned(list(mixed.split([8, 8, 8], dim=-1)))
    assert signature.matches(handles)
    first, second, third = mixed.split([8, 8, 8], dim=-1)
    assert not signature.matches([Handle(tensor, "part") for tensor in (second, first, third)])
    apart = torch.empty(TOKENS, 2, 24).split([8, 8, 8], dim=-1)[2].copy_(third)
    assert not signature.matches([Handle(tensor, "part") for tensor in (first, second, apart)])
