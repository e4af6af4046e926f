"""The collectives that Megatron uses and that gloo lacks, depending on the torch release.

torch 2.13's gloo has them all; torch 2.6's lacks reduce-scatter, the list form of all-to-all and averaging. Instead
of a table of releases, the methods of `ProcessGroup` are wrapped: the real one is tried, and where the backend
answers that it does not have the operation (it does so before any communication, and on every rank alike) the result
is made from all-reduce, send and receive.

The wrapped place is `ProcessGroup`, the class below `torch.distributed`'s functions, because Megatron's modules hold
their own references to those functions.

Emulated sums add the ranks' contributions in the order of the all-reduce that gloo does have, so they are
deterministic. Emulated operations are complete when they return; the handle that `async_op=True` asks for is
therefore already complete.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megamem.testing._undo import Ledger

_LACKING = (
    "does not support",
    "not supported",
    "no support",
    "cannot use reduceop.avg",
    "unsupported",
    "not implemented",
)


def _is_lacking(error: Exception) -> bool:
    text = str(error).lower()
    return any(phrase in text for phrase in _LACKING)


class Done(dist._Work):  # type: ignore[misc,name-defined,unused-ignore]
    """The handle of an operation that has already completed."""

    def wait(self, *_args: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def emulate_missing_collectives(ledger: Ledger) -> None:
    """Wrap the methods of `ProcessGroup` that some release's gloo lacks."""
    group_class = dist.ProcessGroup
    emulations: dict[str, Callable[..., Any]] = {
        "allreduce": _average,
        "reduce_scatter": _reduce_scatter_list,
        "_reduce_scatter_base": _reduce_scatter_base,
        "reduce_scatter_single": _reduce_scatter_base,  # the same two by their names since torch 2.13
        "reduce_scatter_tensor_coalesced": _reduce_scatter_coalesced,
        "reduce_scatter_single_coalesced": _reduce_scatter_coalesced,
    }
    for name, emulation in emulations.items():
        if hasattr(group_class, name):
            ledger.set(group_class, name, _with_fallback(getattr(group_class, name), emulation))
    # The list form is always emulated: where gloo has it, all parts must be of one size, which NCCL does not ask.
    ledger.set(group_class, "alltoall", _all_to_all_list)
    for name in ("alltoall_base", "all_to_all_single"):
        if hasattr(group_class, name):
            ledger.set(group_class, name, _with_split_lists(getattr(group_class, name)))


def _with_fallback(real: Callable[..., Any], emulation: Callable[..., Any]) -> Callable[..., Any]:
    def collective(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        try:
            return real(group, *args, **kwargs)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            if not _is_lacking(error):
                raise
        return emulation(group, *args, **kwargs)

    return collective


def _with_split_lists(real: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's MoE dispatcher turns split sizes into lists on their way from the GPU to the host, so here they stay
    tensors.
    """

    def all_to_all(
        group: dist.ProcessGroup, output: torch.Tensor, input_: torch.Tensor, *rest: Any, **kwargs: Any
    ) -> Any:
        rest = tuple(arg.tolist() if isinstance(arg, torch.Tensor) else arg for arg in rest)
        return real(group, output, input_, *rest, **kwargs)

    return all_to_all


def _reduce_op(options: Any) -> tuple[Any, bool]:
    """The operation to run, and whether its result must be divided by the group's size."""
    operation = options.reduceOp if options is not None else dist.ReduceOp.SUM
    return (dist.ReduceOp.SUM, True) if operation == dist.ReduceOp.AVG else (operation, False)


def _all_reduced(group: dist.ProcessGroup, tensor: torch.Tensor, options: Any) -> torch.Tensor:
    operation, average = _reduce_op(options)
    plain = dist.AllreduceOptions()
    plain.reduceOp = operation
    group.allreduce([tensor], plain).wait()
    return tensor.div_(group.size()) if average else tensor


def _average(group: dist.ProcessGroup, tensors: Any, options: Any = None, *_rest: Any, **_kwargs: Any) -> Done:
    with torch.no_grad():
        for tensor in [tensors] if isinstance(tensors, torch.Tensor) else tensors:
            _all_reduced(group, tensor, options)
    return Done()


def _reduce_scatter_base(
    group: dist.ProcessGroup, output: torch.Tensor, input_: torch.Tensor, options: Any = None, **_kwargs: Any
) -> Done:
    with torch.no_grad():
        total = _all_reduced(group, input_.detach().clone(memory_format=torch.contiguous_format), options)
        output.copy_(total.view(group.size(), -1)[group.rank()].view_as(output))
    return Done()


def _reduce_scatter_list(
    group: dist.ProcessGroup, outputs: Any, inputs: Any, options: Any = None, **_kwargs: Any
) -> Done:
    with torch.no_grad():
        for output, parts in zip(outputs, inputs, strict=True):
            totals = [_all_reduced(group, part.detach().clone(), options) for part in parts]
            output.copy_(totals[group.rank()])
    return Done()


def _reduce_scatter_coalesced(
    group: dist.ProcessGroup, outputs: Any, inputs: Any, options: Any = None, **_kwargs: Any
) -> Done:
    for output, input_ in zip(outputs, inputs, strict=True):
        _reduce_scatter_base(group, output, input_, options)
    return Done()


def _all_to_all_list(group: dist.ProcessGroup, outputs: Any, inputs: Any, *_rest: Any, **_kwargs: Any) -> Done:
    """Each pair exchanges directly; receives are posted last, as gloo buffers what is sent."""
    rank, works = group.rank(), []
    with torch.no_grad():
        outputs[rank].copy_(inputs[rank])
        for peer in range(group.size()):
            if peer != rank and inputs[peer].numel():
                works.append(group.send([inputs[peer].contiguous()], peer, 0))
        for peer in range(group.size()):
            if peer != rank and outputs[peer].numel():
                works.append(group.recv([outputs[peer]], peer, 0))
        for work in works:
            work.wait()
    return Done()
