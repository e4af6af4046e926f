"""The one file that knows Transformer Engine (2.10 and later): whatever megamem reads or calls there stands here.

Transformer Engine's extension is compiled with CUDA. What this file takes from its Python, names, arguments and
attributes, is read out of this file and held against the sources of its releases by a test, so objects of
Transformer Engine are annotated with their types here.

    installed, is_loaded         which release, with the remedy where it is missing or too old
    DelayedLinears               weight gradients of its linear layers, apart from their input gradients
    must_stay, take_apart ...    what of its tensors may be moved, and how
    save_original_inputs         layers that keep an input which is there anyway, instead of a copy of their own
    attention_note               what FP8 attention keeps against expectation

It is never imported for its own sake: what a model does not use is not loaded.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from packaging.version import Version
from torch import Tensor
from torch.nn import Module, Parameter

from megamem.errors import MissingPackage
from megamem.integrations.megatron_linear import accumulated, users_of_parameters
from megamem.runtime.pipeline.weights import WeightQueue, WeightTask

if TYPE_CHECKING:
    from transformer_engine.pytorch import GroupedLinear, LayerNormLinear, LayerNormMLP, Linear
    from transformer_engine.pytorch.module._common import WeightGradStore
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Tensor
    from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Tensor
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
    from transformer_engine.pytorch.tensor.storage.mxfp8_tensor_storage import MXFP8TensorStorage
    from transformer_engine.pytorch.tensor.storage.nvfp4_tensor_storage import NVFP4TensorStorage

OLDEST = Version("2.10")
_REMEDY = 'pip install --no-build-isolation "megamem[te]"'


def installed() -> Version:
    """The release of Transformer Engine. Raises MissingPackage where there is none, or one before 2.10."""
    package = sys.modules.get("transformer_engine")
    try:
        found = Version(getattr(package, "__version__", None) or importlib.metadata.version("transformer_engine"))
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingPackage(f"Transformer Engine is not installed; {_REMEDY} (it is compiled with CUDA)") from error
    if found < OLDEST:
        raise MissingPackage(f"Transformer Engine {found} is older than {OLDEST}, the first one supported; {_REMEDY}")
    return found


def is_loaded() -> bool:
    """Whether anything in this process uses Transformer Engine; without, no model can have its layers."""
    return "transformer_engine.pytorch" in sys.modules


# -- weight gradients apart from input gradients ---------------------------------------------------------------------


class DelayedLinears:
    """Puts the weight gradients of Transformer Engine's linear layers on a queue while it has an open list.

    Its autograd functions ask `module.wgrad_store` whether the weight gradient is to be put off, and if so leave with
    it what the matrix product needs; `module.backward_dw()` computes it. That is what `delay_wgrad_compute` switches
    on, for good, when a layer is built, and Megatron-Core refuses it without overlapped experts. Here the store is
    replaced by one that asks the queue, microbatch for microbatch, so nothing has to be known when the model is built.

    While a microbatch runs that will be split, each weight is hidden by an alias without hooks: autograd would run the
    hooks of the parameter (Megatron's DDP) in B, when there is no gradient yet.

    Put off is what Transformer Engine keeps for the product: under sequence parallelism the gathered input.

    `left_out(chunks)`: ids of modules that are not to be taken over (an MLP in tiles gives back what W would need).
    """

    def __init__(self, queue: WeightQueue) -> None:
        self.left_out: Callable[[Sequence[Module]], set[int]] = lambda chunks: set()
        self._queue = queue
        self._layers: list[_Layer] = []
        self.problems: list[str] = []  # why layers of Transformer Engine cannot be split, each reason once
        self.overwrites = False  # whether a step's first microbatch is not added to main_grad but replaces it

    def learn(self, chunks: Sequence[Module]) -> int:
        """Take the linear layers over that can be split; how many matrices they have.

        Raises MissingPackage for a release before 2.10.
        """
        if not is_loaded():
            return 0
        installed()
        from transformer_engine.pytorch import GroupedLinear, LayerNormLinear, LayerNormMLP, Linear

        users = users_of_parameters(chunks)
        self._layers = [layer for layer in self._layers if layer.is_alive]
        known = {id(layer.module) for layer in self._layers} | self.left_out(chunks)
        count = 0
        for index, chunk in enumerate(chunks):
            for module in chunk.modules():
                if not isinstance(module, (Linear, LayerNormLinear, GroupedLinear, LayerNormMLP)):
                    continue
                if id(module) in known:
                    continue
                self.overwrites |= _fuses(module)
                problem = _unsplittable(module, users)
                if problem is None:
                    layer = _Layer(module, index, self._queue)
                    self._layers.append(layer)
                    count += len(layer.weights)
                elif problem not in self.problems:
                    self.problems.append(problem)
        return count

    @contextlib.contextmanager
    def hiding(self, chunk: int, microbatch: int, *, forward: bool) -> Iterator[None]:
        """While a chunk runs a microbatch, forward or backward, whose weight gradients are put off."""
        mine = [layer for layer in self._layers if layer.chunk == chunk]
        for layer in mine:
            layer.hide(microbatch, forward)
        try:
            yield
        finally:
            for layer in mine:
                layer.show()

    def forget(self) -> None:
        """After a step that failed."""
        for layer in self._layers:
            layer.aliases.clear()

    def close(self) -> None:
        """Give the layers their own stores back."""
        while self._layers:
            self._layers.pop().close()


def _fuses(module: Linear | LayerNormLinear | GroupedLinear | LayerNormMLP) -> bool:
    """Whether the weight gradient is added to `main_grad` by the product itself."""
    return bool(module.fuse_wgrad_accumulation)


def _unsplittable(module: Module, users: dict[Parameter, list[tuple[str, Module]]]) -> str | None:
    """Why a layer with weight gradients cannot be split, or None."""
    from transformer_engine.pytorch import GroupedLinear, LayerNormMLP

    if isinstance(module, LayerNormMLP):
        return "LayerNormMLP has the gradients of two products"
    if _puts_off(module):
        return "delay_wgrad_compute puts them off already"
    if not isinstance(module, GroupedLinear) and (problem := _shape_problem(module)) is not None:
        return problem
    for name in _Names.of(module).weights:
        weight = getattr(module, name)
        if type(weight) is not Parameter:
            return f"their weights are {type(weight).__name__}, not plain parameters (fp8_param_gather)"
        if hasattr(weight, "__fsdp_param__"):
            return "their weights belong to Megatron-FSDP"
        if len(users[weight]) > 1:
            return "their weights are used elsewhere too"
        if not weight.requires_grad:
            return "their weights are frozen"
    return None


def _puts_off(module: Linear | LayerNormLinear | GroupedLinear) -> bool:
    store: WeightGradStore = module.wgrad_store
    return bool(store.delay_wgrad_compute())


def _shape_problem(module: Linear | LayerNormLinear) -> str | None:
    if len(module.weight_names) > 1:
        return "parameters_split cuts a weight into several parameters"
    if module.ub_overlap_ag_dgrad or module.ub_overlap_rs_dgrad or module.ub_bulk_dgrad or module.ub_bulk_wgrad:
        return "tp_comm_overlap hides communication behind the weight gradients"
    return None


@dataclass(frozen=True)
class _Names:
    """The parameters of a linear layer: matrices, biases, and which biases its autograd function adds.

    A bias that the layer adds, or returns, outside the function has its gradient in B, by autograd.
    """

    weights: list[str]
    biases: list[str]
    fused: list[str]

    @classmethod
    def of(cls, module: Linear | LayerNormLinear | GroupedLinear) -> _Names:
        from transformer_engine.pytorch import GroupedLinear

        return cls.of_grouped(module) if isinstance(module, GroupedLinear) else cls.of_single(module)

    @classmethod
    def of_single(cls, module: Linear | LayerNormLinear) -> _Names:
        biases = list(module.bias_names) if module.use_bias else []
        is_fused = module.apply_bias and not module.gemm_bias_unfused_add
        return cls(list(module.weight_names), biases, biases if is_fused else [])

    @classmethod
    def of_grouped(cls, module: GroupedLinear) -> _Names:
        several = range(module.num_gemms)
        weights = ["weight"] if "weight" in module._parameters else [f"weight{index}" for index in several]
        biases = [f"bias{index}" for index in several] if module.use_bias else []
        return cls(weights, biases, biases if module.apply_bias else [])


class _Layer:
    """One linear layer whose store is ours."""

    def __init__(self, module: Linear | LayerNormLinear | GroupedLinear, chunk: int, queue: WeightQueue) -> None:
        self._reference = weakref.ref(module)
        self.chunk = chunk
        names = _Names.of(module)
        self.weights, self.biases = names.weights, names.biases
        self.delayed = [name for name in (*names.weights, *names.fused) if getattr(module, name).requires_grad]
        self.aliases: dict[int, dict[str, Any]] = {}  # by microbatch, until its weight gradients are computed
        self._microbatch = -1
        self._queue = queue
        self._own: WeightGradStore = module.wgrad_store
        self.store = _store_class()(self, queue)
        module.wgrad_store = self.store
        theirs: type[Linear] | type[LayerNormLinear] | type[GroupedLinear] = _theirs(module)
        self._backward_dw = theirs.backward_dw  # a subclass (Megatron's) calls it under conditions of its own

    @property
    def is_alive(self) -> bool:
        return self._reference() is not None

    @property
    def module(self) -> Any:
        module = self._reference()
        assert module is not None
        return module

    def hide(self, microbatch: int, forward: bool) -> None:
        """Have the layer see an alias of each parameter whose gradient is put off: in B those of F."""
        self._microbatch = microbatch
        if forward:
            self.aliases[microbatch] = {name: _alias(self.parameter(name)) for name in self.delayed}
        vars(self.module).update(self.aliases[microbatch])  # found before what __getattr__ finds, the parameter

    def show(self) -> None:
        """Have the layer see its parameters."""
        for name in (*self.weights, *self.biases):
            vars(self.module).pop(name, None)

    def parameter(self, name: str) -> Any:
        """The parameter itself, hidden or not."""
        return self.module._parameters[name]

    def put(self, tensors: Sequence[Any], function: Callable[..., Any]) -> None:
        """In B: leave a task for each parameter whose gradient is put off."""
        tasks = self._queue.current
        assert tasks is not None
        call = _Call(self, self._microbatch, tensors, function)
        kept = tuple(_buffers(tensors))
        for name in self.delayed:
            task = WeightTask(parameter=self.parameter(name), gradient=call.gradient_of(name), kept=kept)
            self._queue.put(tasks, task)
            kept = ()  # counted once

    def compute(self, tensors: Sequence[Any], function: Callable[..., Any], aliases: dict[str, Any]) -> None:
        """Run the layer's `backward_dw` on what was put: it leaves the gradients on the aliases."""
        others = {name: self.parameter(name).detach() for name in self.biases if name not in aliases}
        for other in others.values():
            other.grad = other.detach()  # it has one, so backward_dw does not look for it
        vars(self.module).update({**aliases, **others})
        try:
            with self.store.giving(tensors, function):
                self._backward_dw(self.module)
        finally:
            self.show()

    def close(self) -> None:
        module = self._reference()
        if module is not None:
            module.wgrad_store = self._own
            self.show()


def _theirs(module: Module) -> Any:
    """The class of Transformer Engine that a layer is of, or is derived from."""
    return next(kind for kind in type(module).__mro__ if kind.__module__.startswith("transformer_engine."))


def _alias(parameter: Any) -> Any:
    """The same memory as a leaf of its own, with what Transformer Engine looks for on a parameter."""
    alias: Any = parameter.detach().requires_grad_(parameter.requires_grad)
    if hasattr(parameter, "main_grad"):
        alias.main_grad = parameter.main_grad
    return alias


class _Call:
    """The weight gradients of one call of a layer, which are computed together when the first one is asked for."""

    def __init__(self, layer: _Layer, microbatch: int, tensors: Sequence[Any], function: Callable[..., Any]) -> None:
        self._layer, self._microbatch = layer, microbatch
        self._todo: tuple[Sequence[Any], Callable[..., Any]] | None = (tensors, function)
        self._gradients: dict[str, Tensor | None] = {}

    def gradient_of(self, name: str) -> Callable[[], Tensor | None]:
        return lambda: self._gradient(name)

    def _gradient(self, name: str) -> Tensor | None:
        if self._todo is not None:
            (tensors, function), self._todo = self._todo, None
            aliases = self._layer.aliases[self._microbatch]
            self._layer.compute(tensors, function, aliases)
            for key, alias in aliases.items():
                self._gradients[key], alias.grad = alias.grad, None
        gradient = self._gradients.pop(name)
        if gradient is None and name in self._layer.weights and _fuses(self._layer.module):
            return accumulated(self._layer.parameter(name))
        return gradient


@cache
def _store_class() -> Any:
    """Transformer Engine's store of weight gradients, asking and filling the queue."""
    from transformer_engine.pytorch.module._common import WeightGradStore

    class QueuedStore(WeightGradStore):  # type: ignore[misc]
        def __init__(self, layer: _Layer, queue: WeightQueue) -> None:
            super().__init__(True)
            self._layer, self._queue, self._gives = layer, queue, False

        def delay_wgrad_compute(self) -> bool:
            return self._gives or self._queue.current is not None

        def put(self, tensor_list: Sequence[Any], func: Callable[..., Any]) -> None:
            self._layer.put(tensor_list, func)

        @contextlib.contextmanager
        def giving(self, tensors: Sequence[Any], function: Callable[..., Any]) -> Iterator[None]:
            """While `backward_dw` takes this from the store."""
            super().put(tensors, function)
            self._gives = True
            try:
                yield
            finally:
                self._gives = False

    return QueuedStore


def _buffers(tensors: Any) -> Iterator[Tensor]:
    """The memory behind what a store was given: tensors, quantised ones, lists of them."""
    if isinstance(tensors, (list, tuple)):
        for item in tensors:
            yield from _buffers(item)
    elif hasattr(tensors, "get_data_tensors"):
        storage: Float8TensorStorage | Float8BlockwiseQTensorStorage | MXFP8TensorStorage | NVFP4TensorStorage = tensors
        yield from _buffers(storage.get_data_tensors())
    elif isinstance(tensors, Tensor):
        yield tensors


# -- what layers save ------------------------------------------------------------------------------------------------


def is_offloading() -> bool:
    """Whether this runs inside Transformer Engine's own CPU offload, which has hooks of its own on what layers save."""
    if not is_loaded():
        return False
    from transformer_engine.pytorch.cpu_offload import is_cpu_offload_enabled

    return bool(is_cpu_offload_enabled())


def is_quantized(tensor: object) -> bool:
    """Whether a tensor only stands for others, the codes and scales of its values."""
    if not is_loaded():
        return False
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensor

    return isinstance(tensor, QuantizedTensor)


def must_stay(tensor: Tensor) -> bool:
    """Whether a saved tensor must not be moved as it is: it has no memory of its own, or it is marked, as Transformer
    Engine marks buffers that others write to."""
    return is_quantized(tensor) or bool(getattr(tensor, NOT_TO_OFFLOAD, False))


NOT_TO_OFFLOAD = "_TE_do_not_offload"
"""The attribute that `mark_not_offload` sets."""


def take_apart(tensor: Tensor) -> tuple[list[Tensor | None], Callable[[list[Tensor | None]], Tensor]] | None:
    """The codes and scales behind a quantised activation, and what makes the activation of them again; else None.

    Layers hand such activations on where attention computes in FP8 (`fp8_multi_head_attention`). What they make of
    their inputs they save as plain codes and scales themselves.
    """
    if isinstance(tensor, Parameter) or not is_quantized(tensor):
        return None
    copy: Float8Tensor | Float8BlockwiseQTensor | MXFP8Tensor | NVFP4Tensor = tensor.detach()  # the saved one is in use
    parts, _ = copy.prepare_for_saving()

    def put_together(parts: list[Tensor | None]) -> Tensor:
        copy.restore_from_saved(parts)
        return copy

    return list(parts), put_together


def weight_buffers(module: Module) -> Iterator[Tensor]:
    """The memory of quantised weights, and of the quantised copies of weights that layers keep from one microbatch to
    the next, transposed ones included. Layers save both for their backward pass, and both are there anyway."""
    if not is_loaded():
        return
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    for part in module.modules():
        yield from _buffers([weight for weight in part.parameters(recurse=False) if is_quantized(weight)])
        if isinstance(part, TransformerEngineBaseModule):
            yield from _buffers(_kept_copies(part))


def _kept_copies(module: TransformerEngineBaseModule) -> list[Any]:
    return list(module._fp8_workspaces.values())


def save_original_inputs(modules: Iterable[Module]) -> list[Module]:
    """Have FP8 linear layers save their input as it comes, and quantise it again in the backward pass; which changed.

    For inputs that are kept, or made again, for others anyway: a quantised copy beside them is all that the layer would
    add. The codes are the same again, but not with delayed scaling, whose scales have moved on; do not call it there.
    """
    if not is_loaded():
        return []
    from transformer_engine.pytorch import GroupedLinear, Linear

    changed = [module for module in modules if isinstance(module, (Linear, GroupedLinear)) and not _saves_input(module)]
    set_saving_inputs(changed, True)
    return changed


def set_saving_inputs(modules: Iterable[Any], value: bool) -> None:
    """Undo, or do again, what `save_original_inputs` did."""
    for module in modules:
        module.save_original_input = value


def _saves_input(module: Linear | GroupedLinear) -> bool:
    return bool(module.save_original_input)


FP8_ATTENTION_BACKWARD = "NVTE_FP8_DPA_BWD"
"""The environment variable by which FP8 attention computes its backward pass in FP8 too (default), or not (0)."""


def attention_note(config: Any) -> str | None:
    """What to know of a model whose attention computes in FP8, and yet keeps what it needs later in 16 bits.

    By default it keeps q, k and v in 8 bits; its output too with delayed scaling, but in 16 with tensorwise and MXFP8
    scaling, where the projection behind it shares these 16 bits (Megatron sets its save_original_input).
    """
    in_fp8 = getattr(config, "fp8_dot_product_attention", False) or getattr(config, "fp8_multi_head_attention", False)
    if not (getattr(config, "fp8", None) and in_fp8) or int(os.environ.get(FP8_ATTENTION_BACKWARD, "1")):
        return None
    return (
        f"attention computes in FP8, but keeps q, k, v and its output in 16 bits, because {FP8_ATTENTION_BACKWARD} is "
        "0; unset it to keep q, k and v in half of that"
    )
