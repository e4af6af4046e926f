"""Regions, compact copies and token ranges against brute force: every tensor element is looked up by its address."""

from __future__ import annotations

import itertools
import random

import pytest

torch = pytest.importorskip("torch", reason="pip install 'megamem[train]'")

from megamem.runtime.activations.geometry import (  # noqa: E402
    Geometry,
    TokenAxis,
    compact,
    compact_strides,
    region_of,
    token_axes,
)

SEEDS = range(400)


def _view(rng: random.Random) -> torch.Tensor:
    """A tensor of distinct numbers seen through a chain of permutations, slices, splits and merges."""
    shape = [rng.randint(1, 4) for _ in range(rng.randint(1, 4))]
    count = torch.Size(shape).numel()
    start = rng.randint(0, 3)
    tensor = torch.arange(start + count, dtype=torch.float32)[start:].view(shape)
    for _ in range(rng.randint(0, 4)):
        dim = rng.randrange(tensor.dim())
        size = tensor.shape[dim]
        match rng.randrange(4):
            case 0:
                tensor = tensor.permute(rng.sample(range(tensor.dim()), tensor.dim()))
            case 1:
                begin = rng.randrange(size)
                tensor = tensor.narrow(dim, begin, rng.randint(1, size - begin))
            case 2:
                tensor = tensor.unflatten(dim, (size, 1) if size % 2 else (2, size // 2))
            case 3 if dim + 1 < tensor.dim():
                with_next = tensor.flatten(dim, dim + 1)
                tensor = with_next if with_next.data_ptr() == tensor.data_ptr() else tensor
    return tensor


def _cells(tensor: torch.Tensor) -> list[int]:
    """Offsets into the storage of all elements."""
    places = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
    return places.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten().tolist()


@pytest.mark.parametrize("block", range(4))
def test_a_region_is_exactly_the_memory_of_its_tensor(block: int) -> None:
    for seed in SEEDS[block::4]:
        tensor = _view(random.Random(seed))
        region = region_of(tensor)
        assert region is not None, seed
        assert region.numel == tensor.numel()
        places = torch.arange(tensor.untyped_storage().nbytes() // 4)
        sizes, strides = zip(*region.dims, strict=True) if region.dims else ((1,), (1,))
        assert sorted(places.as_strided(sizes, strides, region.offset).flatten().tolist()) == sorted(_cells(tensor)), (
            seed
        )


def test_a_tensor_comes_back_from_the_compact_copy_of_its_region() -> None:
    for seed in SEEDS:
        tensor = _view(random.Random(seed))
        region = region_of(tensor)
        assert region is not None
        flat = compact(tensor, region.dims)
        assert flat.is_contiguous() and flat.numel() == tensor.numel()
        assert torch.equal(Geometry.of(tensor, region).view(flat.clone()), tensor), seed


def test_every_view_of_the_same_memory_has_the_same_region_and_comes_back_from_one_copy() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        tensor = _view(rng)
        other = tensor.permute(rng.sample(range(tensor.dim()), tensor.dim()))
        dim = rng.randrange(other.dim())
        other = other.unsqueeze(dim) if rng.random() < 0.5 else other.unflatten(dim, (1, other.shape[dim]))
        region = region_of(tensor)
        assert region is not None and region == region_of(other), seed
        flat = compact(tensor, region.dims).clone()
        assert torch.equal(Geometry.of(other, region).view(flat), other), seed


def test_different_memory_has_different_regions() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        base = torch.arange(64.0).view(4, 4, 4)
        one, other = (
            base.narrow(dim, begin, rng.randint(1, 4 - begin))
            for dim, begin in ((rng.randrange(3), rng.randrange(4)) for _ in range(2))
        )
        same = sorted(_cells(one)) == sorted(_cells(other))
        assert (region_of(one) == region_of(other)) == same, seed
    assert region_of(base) != region_of(base.clone())
    assert region_of(base) != region_of(base.view(torch.int32))


def test_a_permuted_geometry_is_that_of_the_permuted_tensor() -> None:
    for seed in SEEDS[:100]:
        rng = random.Random(seed)
        tensor = _view(rng)
        order = tuple(rng.sample(range(tensor.dim()), tensor.dim()))
        region = region_of(tensor)
        assert region is not None
        flat = compact(tensor, region.dims)
        assert torch.equal(Geometry.of(tensor, region).permuted(order).view(flat), tensor.permute(order)), seed


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 1).expand(4, 3),
        torch.zeros(0, 4),
        torch.zeros(4, 0).t(),
        torch.zeros(10).as_strided((3, 4), (2, 1)),
        torch.zeros(10).unfold(0, 4, 2),
    ],
    ids=["expanded", "empty", "empty, transposed", "overlapping rows", "overlapping windows"],
)
def test_memory_that_is_shared_between_elements_has_no_region(tensor: torch.Tensor) -> None:
    assert region_of(tensor) is None


def test_an_expanded_dimension_of_size_one_is_no_obstacle() -> None:
    tensor = torch.arange(6.0).view(2, 1, 3).expand(2, 1, 3)
    region = region_of(tensor)
    assert region is not None
    assert torch.equal(
        Geometry(tuple(tensor.shape), compact_strides(tensor, region)).view(compact(tensor, region.dims)), tensor
    )


def test_values_of_a_fused_projection_lie_on_their_compact_copy_as_the_module_says() -> None:
    s, b, n, d = 5, 2, 3, 4
    h = n * d
    mixed = torch.arange(float(s * b * 3 * h)).view(s, b, 3 * h)
    value = mixed[..., 2 * h :].unflatten(2, (n, d))
    region = region_of(value)
    assert region is not None and region.dims == ((s * b, 3 * h), (h, 1)) and region.offset == 2 * h
    assert compact_strides(value, region) == (h * b, h, d, 1)
    assert compact_strides(value.permute(1, 2, 0, 3), region) == (h, d, h * b, 1)


# -- token ranges ------------------------------------------------------------------------------------------------------


def _with_tokens(rng: random.Random) -> tuple[torch.Tensor, TokenAxis, int]:
    """A tensor whose elements are the number of their token within the rank, and where its tokens are."""
    tokens, blocks, inner, dim = rng.randint(1, 6), rng.choice((1, 1, 2, 4)), rng.choice((1, 1, 2, 3)), rng.randrange(3)
    one_dim = torch.arange(tokens).repeat_interleave(inner).repeat(blocks)
    shape = [rng.randint(1, 3) for _ in range(3)]
    shape[dim] = len(one_dim)
    view = [1, 1, 1]
    view[dim] = len(one_dim)
    return one_dim.view(view).expand(shape).contiguous(), TokenAxis(dim, blocks, inner), tokens


def test_taking_a_range_gives_those_tokens_of_every_block_and_nothing_else() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        tensor, axis, tokens = _with_tokens(rng)
        start = rng.randrange(tokens)
        stop = rng.randint(start + 1, tokens)
        taken = axis.take(tensor, start, stop)
        wanted = (tensor >= start) & (tensor < stop)
        assert taken.dim() == tensor.dim()
        assert torch.equal(taken.flatten(), tensor[wanted]), seed  # row by row, in the same order
        assert axis.range(tensor, start, stop).data_ptr() >= tensor.data_ptr()
        assert axis.range(tensor, start, stop).untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def test_ranges_written_one_by_one_restore_the_tensor() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        tensor, axis, tokens = _with_tokens(rng)
        cuts = sorted({0, tokens, *(rng.randint(0, tokens) for _ in range(3))})
        restored = torch.full_like(tensor, -1)
        for start, stop in itertools.pairwise(cuts):
            part = axis.take(tensor, start, stop).clone()
            axis.range(restored, start, stop).copy_(axis.blocked(part))
        assert torch.equal(restored, tensor), seed


def test_the_true_axis_is_among_the_candidates_and_every_candidate_has_the_right_shape() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        tensor, axis, tokens = _with_tokens(rng)
        if tokens == 1:
            continue
        start = rng.randrange(tokens - 1)
        stop = rng.randint(start + 1, tokens - (start == 0))
        part = axis.take(tensor, start, stop)
        found = token_axes(tuple(tensor.shape), tuple(part.shape), tokens, stop - start, axis.blocks)
        assert axis in found, seed
        assert all(each.take(tensor, start, stop).shape == part.shape for each in found)
        assert len(found) <= 2


@pytest.mark.parametrize(
    ("full", "part"),
    [((8, 4), (4, 4, 1)), ((8, 4), (8, 4)), ((8, 4), (4, 2)), ((8, 4), (3, 4)), ((9, 4), (3, 4))],
    ids=["dimensions", "no difference", "two differ", "wrong proportion", "no multiple"],
)
def test_shapes_that_are_no_token_range_have_no_axis(full: tuple[int, ...], part: tuple[int, ...]) -> None:
    assert token_axes(full, part, tokens=8, taken=4, blocks=2) == []
