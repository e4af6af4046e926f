"""Megatron-Core's linear layers, with the weight gradient computed apart from the input gradient.

`LinearWithGradAccumulationAndAsyncCommunication` is the autograd function of all linear layers that are not Transformer
Engine's: attention, MLP, every expert of a SequentialMLP, the output layer. Its backward pass can leave the weight
gradient out (for Megatron's deferred embedding gradient); `_apart` runs it so, with all its tensor-parallel
communication, and keeps what the weight gradient needs. That gradient is then computed by the lines that this backward
pass has for it.

During such a forward pass the weight is an alias without gradient, so that the graph does not lead to the parameter:
else its hooks (Megatron's DDP) would run in B, before there is a gradient. Biases stay in B; they are cheap.

What is not split, and runs whole in B: a weight that something else than linear layers uses too (an embedding, tied
with the output layer, on the same rank), frozen inputs, weights of Megatron-FSDP and of GTP, layers under autocast.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor
from torch.nn import Module, Parameter

from megamem.runtime.pipeline.weights import WeightQueue, WeightTask

_GTP_SIZE = 9  # after input, weight, bias, fusion, all-reduce, sequence parallel, buffer, limit, group; since 0.19


class SplitLinears:
    """Puts the weight gradients of linear layers on a queue while it has an open list."""

    def __init__(self, queue: WeightQueue) -> None:
        self._queue = queue
        self._splittable: dict[int, weakref.ref[Parameter]] = {}  # by id, which a later parameter may have again

    def learn(self, chunks: Sequence[Module]) -> int:
        """Find the weights that only linear layers use; how many there are, without output layers."""
        linears = (layers.ColumnParallelLinear, layers.RowParallelLinear)
        users_of = users_of_parameters(chunks)
        found = {key: users for key, users in users_of.items() if all(isinstance(user, linears) for _, user in users)}
        self._splittable |= {id(parameter): weakref.ref(parameter) for parameter in found}
        return sum(not users[0][0].endswith("output_layer") for users in found.values())

    def run(self, function: Any, arguments: tuple[Any, ...]) -> Tensor:
        """`function.apply(*arguments)`, split if a list is open and the weight allows it."""
        tasks = self._queue.current
        if tasks is None or not self._can_split(arguments):
            return run_whole(function, arguments)
        source, weight, *rest = arguments
        sink = _Sink(self._queue, tasks, weight, arguments)
        return _apart(function).apply(sink, source, weight.detach(), *rest)  # type: ignore[no-any-return]

    def _can_split(self, arguments: tuple[Any, ...]) -> bool:
        source, weight, _, _, _, _, buffer, *_ = arguments
        return (
            torch.is_grad_enabled()
            and source.requires_grad
            and weight.requires_grad
            and (known := self._splittable.get(id(weight))) is not None
            and known() is weight
            and buffer is None
            and not hasattr(weight, "__fsdp_param__")
            and all(size == 1 for size in arguments[_GTP_SIZE : _GTP_SIZE + 1])  # then the output's dtype, since 0.20
            and not torch.is_autocast_enabled(source.device.type)
        )

    def unsplit(self, chunks: Iterable[Module]) -> list[str]:
        """Matrices whose gradient B computed although W was asked for: their names, and the modules they are in."""
        found = []
        for index, chunk in enumerate(chunks):
            for path, module in chunk.named_modules():
                for name, parameter in module.named_parameters(recurse=False):
                    if parameter.requires_grad and parameter.dim() > 1 and id(parameter) not in self._queue.split:
                        found.append(f"chunk {index}: {path}.{name} ({type(module).__name__})")
        return found


def users_of_parameters(chunks: Iterable[Module]) -> dict[Parameter, list[tuple[str, Module]]]:
    """The modules, and their paths, that have each parameter."""
    users: dict[Parameter, list[tuple[str, Module]]] = {}
    for chunk in chunks:
        for path, module in chunk.named_modules():
            for parameter in module.parameters(recurse=False):
                users.setdefault(parameter, []).append((path, module))
    return users


def run_whole(function: Any, arguments: tuple[Any, ...]) -> Tensor:
    """`function.apply(*arguments)`, whose backward pass gets the weight that it was called with.

    What comes out of `ctx.saved_tensors` under saved-tensor hooks is another tensor with the same memory. Megatron's
    function then adds to `main_grad`, but finds no `grad_added_to_main_grad` to set and returns no gradient, so that
    the hook of DDP which starts the reduction of a bucket does not run.
    """
    _, weight, _, fused, *_ = arguments
    is_hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    if fused and is_hooked and weight.is_leaf and torch.is_grad_enabled():
        function = _knowing(function)
    return function.apply(*arguments)  # type: ignore[no-any-return]


class _Sink:
    """Where one call of a linear layer leaves its weight gradient."""

    __slots__ = ("fused", "group", "parameter", "queue", "sequence_parallel", "tasks", "uses_bias")

    def __init__(
        self, queue: WeightQueue, tasks: list[WeightTask], parameter: Parameter, arguments: tuple[Any, ...]
    ) -> None:
        _, _, bias, self.fused, _, self.sequence_parallel, _, _, self.group, *_ = arguments
        self.queue, self.tasks, self.parameter = queue, tasks, parameter
        self.uses_bias = bias is not None

    def put(self, source: Tensor, grad_output: Tensor) -> None:
        """Leave the task: `source` [s, b, k] is the layer's input (this rank's shard), grad_output [s', b, n]."""
        kept = source, grad_output
        task = WeightTask(parameter=self.parameter, gradient=lambda: self._gradient(*kept), kept=kept)
        self.queue.put(self.tasks, task)

    def _gradient(self, source: Tensor, grad_output: Tensor) -> Tensor | None:
        """As in the backward pass of Megatron's function, after `if wgrad_compute`."""
        if self.sequence_parallel:
            shape = [source.shape[0] * self.group.size(), *source.shape[1:]]
            gathered = layers.get_global_memory_buffer().get_tensor(shape, source.dtype, "mpu")
            layers.dist_all_gather_func(gathered, source, group=self.group)
            source = gathered
        grad_output, source = layers.prepare_input_tensors_for_wgrad_compute(grad_output, source)
        if not self.fused:
            return grad_output.t().matmul(source)
        weight: Any = self.parameter
        kernels = layers.fused_weight_gradient_mlp_cuda
        if weight.main_grad.dtype == torch.float32:
            kernels.wgrad_gemm_accum_fp32(source, grad_output, weight.main_grad)
        else:
            kernels.wgrad_gemm_accum_fp16(source, grad_output, weight.main_grad)
        return accumulated(weight)


def accumulated(weight: Any) -> Tensor | None:
    """What autograd gets for a weight gradient that was added to `main_grad` already.

    Megatron's DDP looks at its hook whether a gradient arrives, and does not look at this one.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight.detach())


class _Context:
    """What Megatron's backward pass reads of its context, with other saved tensors."""

    def __init__(self, context: Any, saved: tuple[Tensor, Tensor]) -> None:
        self._context = context
        self.saved_tensors = saved

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class _InputGradientOnly(_Context):
    """The same, with the weight gradient left out."""

    def __init__(self, context: Any, saved: tuple[Tensor, Tensor], seen: list[Tensor]) -> None:
        super().__init__(context, saved)
        self.grad_output_buffer, self.wgrad_deferral_limit = seen, 0
        self.gradient_accumulation_fusion, self.main_grad = True, None  # the branch that makes no gradient itself
        self.use_bias = False  # it would add up one dimension of three


@cache
def _knowing(function: Any) -> Any:
    """Megatron's autograd function, which does not take its weight out of the saved tensors."""

    class LinearThatKnowsItsWeight(function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, source: Tensor, weight: Tensor, *rest: Any) -> Any:
            ctx.parameter = weight
            return function.forward(ctx, source, weight, *rest)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> Any:
            source, _ = ctx.saved_tensors
            return function.backward(_Context(ctx, (source, ctx.parameter)), grad_output)

    return LinearThatKnowsItsWeight


@cache
def _apart(function: Any) -> Any:
    """Megatron's autograd function, without the weight gradient."""

    class LinearWithoutWeightGradient(function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, sink: _Sink, *arguments: Any) -> Any:
            ctx.sink = sink
            source, weight, bias, _, *rest = arguments
            return function.forward(ctx, source, weight, bias, False, *rest)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> Any:
            source, weight = ctx.saved_tensors
            grad_output = grad_output.to(source.dtype)  # as the function does, of outputs that have another dtype
            grad_source, *rest = function.backward(_InputGradientOnly(ctx, (source, weight), []), grad_output)
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(dim=0) if ctx.sink.uses_bias else None
            ctx.sink.put(source, grad_output)
            return None, grad_source, None, grad_bias, *rest[2:]

    return LinearWithoutWeightGradient
