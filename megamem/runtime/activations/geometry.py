"""Which memory a saved tensor covers, and which part of it belongs to a range of tokens.

Autograd hands the same memory over several times under different shapes: the query as [s, b, n, d] and, transposed for
the attention kernel, as [b, n, s, d]; a linear layer's input as [s, b, h] and flattened as [s*b, h]. Storing each would
double the traffic. `Region` is the shape-free description under which all of them are equal, and `Geometry` says how
one of them lies on a *compact* copy of the region (1-D, no gaps).

    mixed_qkv [s, b, 3h], value = its last third        region: sizes (s*b, h), strides (3h, 1)
    as [s, b, n, d]   strides (3hb, 3h, d, 1)    compact strides (hb, h, d, 1)
    as [b, n, s, d]   strides (3h, d, 3hb, 1)    compact strides (h, d, hb, 1)

A token range is a slice of a rank's own tokens. In a tensor that holds the tokens of all tensor-parallel ranks
(`blocks` of them, one behind the other, as an all-gather leaves them) the range is the same slice of every block, never
a plain prefix:

    tokens 2..3 of 0..3, blocks = 2:    [ 0 1 2 3 | 0 1 2 3 ]
                                             ^^^       ^^^
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Region:
    """A set of memory cells: storage address, element type, offset, and collapsed (size, stride) pairs, largest first.

    Two tensors with equal regions hold the same numbers in the same memory, whatever their shapes.
    """

    storage: int
    dtype: torch.dtype
    offset: int
    dims: tuple[tuple[int, int], ...]

    @property
    def numel(self) -> int:
        """How many elements the region has."""
        count = 1
        for size, _ in self.dims:
            count *= size
        return count


def region_of(tensor: Tensor) -> Region | None:
    """The region of a tensor, or None where elements share memory (an `expand`ed tensor) or there are none."""
    dims: list[tuple[int, int]] = []
    if tensor.is_contiguous():  # the common case, without the sort
        numel = tensor.numel()
        if numel == 0:
            return None
        dims.append((numel, 1))
    else:
        pairs = zip(tensor.stride(), tensor.shape, strict=True)
        for stride, size in sorted((pair for pair in pairs if pair[1] != 1), reverse=True):
            if stride == 0 or size == 0:
                return None
            if dims and dims[-1][1] == stride * size:
                dims[-1] = (dims[-1][0] * size, stride)
            elif dims and dims[-1][1] < stride * size:
                return None  # overlapping
            else:
                dims.append((size, stride))
    return Region(tensor.untyped_storage().data_ptr(), tensor.dtype, int(tensor.storage_offset()), tuple(dims))


def compact_strides(tensor: Tensor, region: Region) -> tuple[int, ...]:
    """Strides with which `tensor`'s shape lies on the region's compact 1-D copy."""
    if len(region.dims) == 1 and region.dims[0][1] == 1:
        return tensor.stride()
    weights: list[tuple[int, int]] = []  # (stride in memory, stride in the compact copy), largest first
    after = region.numel
    for size, stride in region.dims:
        after //= size
        weights.append((stride, after))
    result = []
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        memory, compact = next(((m, c) for m, c in weights if m <= stride), (1, 1))
        result.append(stride // memory * compact if size != 1 else 1)
    return tuple(result)


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a tensor lies on a compact 1-D copy of its region."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    skip: int = 0  # elements of the flat memory before the tensor's first

    @classmethod
    def of(cls, tensor: Tensor, region: Region) -> Geometry:
        """The geometry of `tensor`, whose region is `region`."""
        return cls(tuple(tensor.shape), compact_strides(tensor, region))

    def view(self, flat: Tensor) -> Tensor:
        """The tensor, as a view of the compact copy `flat`."""
        if self.skip == 0:
            return flat.as_strided(self.shape, self.strides)
        return flat.as_strided(self.shape, self.strides, flat.storage_offset() + self.skip)

    def permuted(self, order: tuple[int, ...]) -> Geometry:
        """The geometry of `tensor.permute(order)`."""
        return Geometry(tuple(self.shape[i] for i in order), tuple(self.strides[i] for i in order))


def compact(tensor: Tensor, dims: tuple[tuple[int, int], ...]) -> Tensor:
    """The elements of the region with these `dims` that begins where `tensor` does, as a 1-D tensor: a view where
    there are no gaps, else a copy."""
    sizes, strides = zip(*dims, strict=True)
    flat = tensor.as_strided(sizes, strides)
    # A lone strided dimension is reshaped without a copy.
    return flat if strides == (1,) else flat.reshape(-1).contiguous()


@dataclass(frozen=True, slots=True)
class TokenAxis:
    """Where the tokens are in a tensor: dimension `dim` holds `blocks` x tokens x `inner` elements."""

    dim: int
    blocks: int = 1
    inner: int = 1

    def blocked(self, tensor: Tensor) -> Tensor:
        """A view with the dimension split in (blocks, tokens * inner); one dimension more."""
        return torch.unflatten(tensor, self.dim, (self.blocks, tensor.shape[self.dim] // self.blocks))

    def range(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """The tokens [start, stop) of every block, as a *blocked* view."""
        return self.blocked(tensor).narrow(self.dim + 1, start * self.inner, (stop - start) * self.inner)

    def take(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """The tokens [start, stop) of every block, in the tensor's own number of dimensions."""
        if self.blocks == 1:
            return tensor.narrow(self.dim, start * self.inner, (stop - start) * self.inner)
        return self.range(tensor, start, stop).flatten(self.dim, self.dim + 1)


def token_axes(full: tuple[int, ...], part: tuple[int, ...], tokens: int, taken: int, blocks: int) -> list[TokenAxis]:
    """Every way in which a tensor of shape `part` can be `taken` of `tokens` tokens of one of shape `full`.

    Empty when the shapes do not differ in exactly one dimension, in the proportion of the tokens. More than one
    candidate is left where the shape alone does not tell whether the tokens of several ranks are gathered in it.
    """
    if len(full) != len(part):
        return []
    differing = [dim for dim in range(len(full)) if full[dim] != part[dim]]
    if len(differing) != 1:
        return []
    dim = differing[0]
    if full[dim] % tokens or full[dim] * taken != part[dim] * tokens:
        return []
    per_token = full[dim] // tokens
    candidates = [TokenAxis(dim, 1, per_token)]
    if blocks > 1 and per_token % blocks == 0:
        candidates.append(TokenAxis(dim, blocks, per_token // blocks))
    return candidates
