"""Ranks and machines that are not there: what lets one process be any rank of a job, with tensors that hold nothing.

Groups send nothing (PyTorch's backend "fake"), tensors are `FakeTensor`s, and what asks a tensor for its values, or the
machine for its memory, is answered here:

    random states      Megatron's tracker reads the generator's state as numbers; it is left alone
    addresses          every storage has one, or the activation engine takes all of them for one parameter
    equal              tensors of equal shape count as equal: the activation engine compares what one program made
    agreement          what this rank says, nobody contradicts
    host memory        what the configuration gives, whether this machine has it or not
    pinned memory      a fake tensor too
    pipeline links     communicators that send nothing
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megamem.integrations import capability, megatron_core
from megamem.runtime.activations import signature, streams
from megamem.runtime.pipeline import links

HOST_NBYTES = 1 << 40  # of "auto": the machine is not there to be asked


@contextlib.contextmanager
def absent_ranks(*, tensor: int, pipeline: int, pipeline_rank: int, chunks: int) -> Iterator[None]:
    """Megatron's groups of a job of tensor x pipeline ranks, of which this process is one; none of the others exists.

    Enter it before the CPU rig, which would make gloo of the groups.
    """
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  # registers the backend

    rank = pipeline_rank * tensor
    # Megamem's pipeline keeps notices in the store, which FakeStore cannot hold.
    dist.init_process_group("fake", rank=rank, world_size=tensor * pipeline, store=dist.HashStore())  # type: ignore[attr-defined]
    try:
        with _groups(tensor, pipeline, chunks):
            yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """Megatron's groups of a process alone, for a real step."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())  # type: ignore[attr-defined]
    try:
        with _groups(1, 1, 1):
            yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _groups(tensor: int, pipeline: int, chunks: int) -> Iterator[None]:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        create_gloo_process_groups=False,
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def absent_machine() -> Iterator[None]:
    """What asks the machine or a group for something real is answered; to be entered before megamem is enabled."""
    answers: list[tuple[Any, str, Any]] = [
        (CudaRNGStatesTracker, "fork", lambda self, *args, **kwargs: contextlib.nullcontext()),
        (megatron_core, "resolve_host_memory", _host_memory),
        (streams, "map_pages", _pages),
        (links, "connect", _connect),
        (capability, "agree", lambda numbers, group=None: list(numbers)),
        (megatron_core, "agree", lambda numbers, group=None: list(numbers)),
        (signature._Learner, "_close", lambda self, one, other: one.shape == other.shape),
        (torch.UntypedStorage, "data_ptr", _storage_address),
        (Tensor, "data_ptr", lambda tensor: _storage_address(tensor.untyped_storage()) + _offset_nbytes(tensor)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, answer in answers:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, answer)
        yield


@contextlib.contextmanager
def tensors_without_values() -> Iterator[None]:
    """Fake tensors, two of which are equal if their shapes are."""
    with FakeTensorMode(allow_non_fake_inputs=True), _EqualByShape():  # type: ignore[no-untyped-call]
        yield


class _EqualByShape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.equal.default:
            return args[0].shape == args[1].shape
        return func(*args, **(kwargs or {}))


def _storage_address(storage: torch.UntypedStorage) -> int:
    """Far from that of any other storage which is alive."""
    return int(storage._cdata) << 50


def _offset_nbytes(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _host_memory(value: int | Literal["auto"], local_ranks: int) -> int:
    return HOST_NBYTES if value == "auto" else value


def _pages(nbytes: int, alignment: int = 0) -> tuple[Tensor, Any]:
    return torch.empty(nbytes, dtype=torch.uint8), None


def _connect(ranks: Sequence[int], rank: int, *_where: Any, **_options: Any) -> Any:
    from torch._C._distributed_c10d import FakeProcessGroup

    group: Any = FakeProcessGroup  # whose stubs are of another release
    return group._create_internal(rank, len(ranks), group.Options())
