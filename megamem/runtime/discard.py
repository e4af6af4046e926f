"""Outputs that are not kept: their memory is given back once their consumer has run, and filled again for its backward.

    output = activate(input)                 # saves what it can be made of again
    result = linear(output)                  # autograd saves `output` here
    discard(output, rebuild, result)         # its memory is free

    result's gradient is there  ->  rebuild(output)  ->  the linear layer's backward pass reads it, autograd frees it

The tensor stays, its storage is emptied under it, so whatever autograd or a saved-tensor hook holds of it is empty too,
and full again in time: the way of Megatron-Core's `CheckpointWithoutOutput`, without a second graph. Nobody else may
read the output in between.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def discard(output: Tensor, rebuild: Callable[[Tensor], None], result: Tensor) -> int:
    """Free the memory of `output` until the gradient of `result` is there; how many bytes that are.

    Only where something will want it back: `result`, which was computed from the output, must require grad. Not where
    the output shares its memory with something else (0 bytes). `rebuild` is handed a tensor like `output` to write to.
    """
    storage = output.untyped_storage()
    nbytes = storage.nbytes()
    if not result.requires_grad or nbytes != output.nbytes or result.untyped_storage().data_ptr() == storage.data_ptr():
        return 0
    result.register_hook(_Refill(output, rebuild))  # type: ignore[no-untyped-call]
    storage.resize_(0)
    return nbytes


class _Refill:
    """Fills the memory again, once. The graph holds this longer than the memory is needed, so it lets go of it then."""

    def __init__(self, output: Tensor, rebuild: Callable[[Tensor], None]) -> None:
        self._storage: torch.UntypedStorage | None = output.untyped_storage()
        self._nbytes = self._storage.nbytes()
        self._like = torch.empty(0, dtype=output.dtype, device=output.device)
        self._geometry = output.storage_offset(), output.shape, output.stride()
        self._rebuild: Callable[[Tensor], None] | None = rebuild

    def __call__(self, _gradient: Tensor) -> None:
        storage, rebuild = self._storage, self._rebuild
        if storage is None or rebuild is None:
            return  # a second pass through a graph that was retained, where the memory was, too
        self._storage = self._rebuild = None
        storage.resize_(self._nbytes)
        # A tensor of its own: to autograd, which counts writes, the saved one was never written to.
        rebuild(self._like.set_(storage, *self._geometry))
        self._like = torch.empty(0)
