"""Norms and activation functions that save their input in 8 bits, or as it is, and never their output: the section fp8.

    hidden -> norm -> qkv, attention, projection      `mlp` keeps: activation input in 8 bits
    hidden -> norm -> fc1 -> activation -> fc2        `all` keeps: both norm inputs in 8 bits too
               ^               ^
               outputs that linear layers save: given back when the block behind them has run, made again in its
               backward pass

`regelu2`, experimental, keeps two bits of each input of GELU, from which its output cannot be made again: fc2 keeps it.

Besides, attention's values are copied out of the output of the linear layer that made query, key and value: saved as a
part of it they would hold all of it, 1.5 h of Llama 3's numbers a token for 0.25 h.

Two seams. Megatron's fused activation functions are replaced by `megamem.kernels.activation` wherever they are called:
in MLPs, in experts, in shared experts (`activation_functions`). And while a layer runs, its norms are computed by
`megamem.kernels.norm`, and each block that consumes an output is watched: attention, the MLP, and every MLP of an
expert. What is saved goes through autograd like everything else, so the activation engine, around all this, keeps,
swaps or rebuilds codes as it does any other tensor; and a replay does the same as the forward pass did.

The forward pass is that of stock Megatron to rounding (activation functions are rounded once, not after each of their
operations). Of a model under `no_grad` nothing is saved, and it computes the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.nn import Module

from megamem.errors import UnsupportedError
from megamem.integrations import compat, transformer_engine
from megamem.integrations.activation_functions import (
    ActivationCall,
    activation_problems,
    as_if_fused,
    read_call,
    two_bit_problems,
)
from megamem.integrations.capability import Capability
from megamem.integrations.norms import NormSettings, read_norm
from megamem.integrations.report import mib
from megamem.kernels import activation as activation_kernels
from megamem.kernels import norm as norm_kernels
from megamem.kernels.activation import activate
from megamem.kernels.block_codec import BlockFormat
from megamem.kernels.regelu2 import Approximation, regelu2, saved_nbytes
from megamem.patches import GROUPS
from megamem.patches.registry import Patch
from megamem.runtime.activations.layer import Args, Kwargs, first_tensor, watching
from megamem.runtime.discard import discard
from megamem.runtime.session import AbstractActivations
from megamem.sections import LowPrecision

_CONSUMERS = {"input_layernorm": "self_attention", "pre_mlp_layernorm": "mlp"}
"""Whose input a layer's norm is."""

_ATTENTION = "self_attention.core_attention"

_GROUPED = ("GroupedMLP", "TEGroupedMLP")  # all experts at once; by name, because releases have one, the other or both


@dataclass(frozen=True, kw_only=True)
class SavedActivationsReport:
    """Totals of one rank, per step where steps have run.

    input_nbytes:      of norm and activation inputs, as stock Megatron saves them
    kept_nbytes:       what is saved in their place
    discarded_nbytes:  of outputs that linear layers save, given back until their backward pass, and of what values held
    num_left:          norms of other kinds, and norms fused with a linear layer: left as they are
    """

    mode: str
    input_nbytes: int
    kept_nbytes: int
    discarded_nbytes: int
    num_left: int

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much), ready to print."""
        rows = [
            ("saved activations", self.mode),
            ("inputs of norms and activations, per step", f"{mib(self.kept_nbytes)} for {mib(self.input_nbytes)}"),
            ("outputs given back, per step", mib(self.discarded_nbytes)),
        ]
        if self.num_left:
            rows.append(("norms left as they are", str(self.num_left)))
        return rows


@dataclass(slots=True)
class _Blocks:
    """What is watched of one layer: its norms, the blocks that consume their outputs, and every MLP within."""

    norms: dict[str, tuple[Module, NormSettings]] = field(default_factory=dict)
    modules: dict[str, Module] = field(default_factory=dict)
    configs: dict[int, Any] = field(default_factory=dict)  # of its MLPs, by their ids
    num_left: int = 0


_Made = tuple[Tensor, Callable[[Tensor], None]]
"""An output, and what writes it once more."""


@dataclass(slots=True)
class _Block:
    """A block that runs now: the configuration of an MLP that is not fused by itself, and the outputs made so far."""

    unfused: Any | None
    made: list[_Made] = field(default_factory=list)


@final
class SavedActivations(Capability, AbstractActivations):
    """What norms and activation functions of a process save."""

    SECTION: ClassVar[str] = "fp8"
    OPTION: ClassVar[str] = "fp8.saved_activations"
    NOT_LIVE: ClassVar[str] = (
        "fp8.saved_activations is on, a step has run, and no activation function or norm of any rank, or of a rank "
        "that has layers, was computed by megamem. Is the model made of Megatron's TransformerLayers, with MLPs that "
        "call its fused activation functions? Set fp8.saved_activations: off to go on without"
    )

    def __init__(self, options: LowPrecision) -> None:
        self.options = options
        made = BlockFormat(element=options.format, group=options.group, power_of_two=options.power_of_two_scales)
        mode = options.saved_activations
        self._activation_format = made if mode in ("mlp", "all") else None
        self._norm_format = made if mode == "all" else None
        self._is_two_bit = mode == "regelu2"
        self._num_steps = self._num_layers = self._num_calls = 0
        self._input_nbytes = self._kept_nbytes = self._discarded_nbytes = 0
        self._blocks: weakref.WeakKeyDictionary[Module, _Blocks] = weakref.WeakKeyDictionary()
        self._running: list[_Block] = []  # within one another
        self._is_replay = False
        self._sharing: list[Module] = []  # layers of Transformer Engine that save their input as it comes

    def patches(self) -> Sequence[Patch]:
        return [patch.bound(self) for patch in GROUPS["fp8.activations"]]

    def expected(self) -> str:
        format = self._activation_format
        if self._is_two_bit:
            return "2 bits of each input of GELU; its gradient is off by tens of percent: experimental"
        if format is None:
            return "gradients are stock's to rounding"
        bits = 8 + 32 / format.group
        return f"{bits:g} bits a number; gradients are off by a few percent, without direction"

    def on_layer_built(self, layer: Module) -> None:
        self._num_layers += 1
        problems = [*self._conflicts(layer)]
        if problems:
            raise UnsupportedError(f"{self.OPTION}: {self.options.saved_activations}: " + "; ".join(problems))
        config: Any = layer.config
        if compat.uses_low_precision(config) and config.fp8_recipe != "delayed":
            # Or FP8 layers would save the outputs that are not to be kept as copies of their own.
            self._sharing += transformer_engine.save_original_inputs(
                _consumers(layer, with_second=not self._is_two_bit)
            )

    @contextmanager
    def around_layer(self, layer: Module, *, is_replay: bool) -> Iterator[None]:
        blocks = self._blocks.get(layer)
        if blocks is None:
            blocks = self._blocks[layer] = _blocks_of(layer)
        unfused = [config for config in blocks.configs.values() if not config.bias_activation_fusion]
        outputs: dict[str, _Made] = {}  # of norms, by the block that consumes them

        def on_call(path: str, original: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
            if path in blocks.norms:
                (hidden,) = (*args, *kwargs.values())
                output = self._run_norm(*blocks.norms[path], hidden)
                if output.requires_grad:
                    outputs[_CONSUMERS[path]] = output, norm_kernels.rebuilder(output)
                return output
            if path == _ATTENTION:
                return original(*self._with_own_values(args), **kwargs)
            config = getattr(blocks.modules[path], "config", None)
            block = _Block(next((known for known in unfused if known is config), None))
            self._running.append(block)
            try:
                result = original(*args, **kwargs)
            finally:
                self._running.pop()
            if path in outputs:
                block.made.append(outputs.pop(path))
            if (consumed := first_tensor(result)) is not None and not self._is_replay:
                self._discarded_nbytes += sum(discard(kept, rebuild, consumed) for kept, rebuild in block.made)
            return result

        before, self._is_replay = self._is_replay, is_replay
        try:
            with as_if_fused(unfused), watching(blocks.modules, on_call):
                yield
        finally:
            self._is_replay = before

    def _with_own_values(self, args: Args) -> Args:
        """Core attention's arguments, with the values copied where they alone would hold something larger."""
        if len(args) < 3 or not all(isinstance(tensor, Tensor) for tensor in args[:3]):
            return args
        query, key, value = args[:3]
        storage = value.untyped_storage()
        is_alone = storage.data_ptr() not in (query.untyped_storage().data_ptr(), key.untyped_storage().data_ptr())
        if not (value.requires_grad and is_alone and storage.nbytes() >= 2 * value.nbytes):
            return args
        if not self._is_replay:
            self._discarded_nbytes += storage.nbytes() - value.nbytes
        return (query, key, value.clone(memory_format=torch.contiguous_format), *args[3:])

    def _run_norm(self, module: Module, norm: NormSettings, hidden: Tensor) -> Tensor:
        format = self._norm_format
        output = norm.run(module, hidden, format)
        self._count(output, hidden, hidden.nbytes if format is None else format.nbytes(hidden.shape))
        return output

    def run_activation(
        self, name: str, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        block = self._running[-1] if self._running else _Block(None)
        call = read_call(name, function, args, kwargs, block.unfused)
        if self._is_two_bit:
            return self._run_regelu2(call)
        format = self._activation_format
        output = activate(call.input, call.activation, bias=call.bias, weights=call.weights, format=format)
        if output.requires_grad:
            block.made.append((output, activation_kernels.rebuilder(output)))
        self._count(output, call.input, call.input.nbytes if format is None else format.nbytes(call.halves))
        return output

    def _run_regelu2(self, call: ActivationCall) -> Tensor:
        approximate: Approximation = "tanh" if call.activation.function == "gelu_tanh" else "none"
        output = regelu2(call.input, bias=call.bias, approximate=approximate)
        self._count(output, call.input, saved_nbytes(call.input.shape))
        return output

    def _count(self, output: Tensor, source: Tensor, kept_nbytes: int) -> None:
        """One call: what stock saves of it, and what is saved instead."""
        self._num_calls += 1
        if output.requires_grad and not self._is_replay:
            self._input_nbytes += source.nbytes
            self._kept_nbytes += kept_nbytes

    def end_step(self) -> None:
        self._num_steps += 1

    def is_live(self) -> bool | None:
        return self._num_calls > 0 or (False if self._num_layers else None)

    def report(self) -> SavedActivationsReport:
        steps = max(self._num_steps, 1)
        mode, format = self.options.saved_activations, self._activation_format
        return SavedActivationsReport(
            mode=mode if format is None else f"{mode}, {format.element}, {format.group} channels a scale",
            input_nbytes=self._input_nbytes // steps,
            kept_nbytes=self._kept_nbytes // steps,
            discarded_nbytes=self._discarded_nbytes // steps,
            num_left=sum(blocks.num_left for blocks in self._blocks.values()),
        )

    def close(self) -> None:
        transformer_engine.set_saving_inputs(self._sharing, False)
        self._sharing.clear()

    def _conflicts(self, layer: Any) -> Iterator[str]:
        """Why a layer does not go with it."""
        config = layer.config
        if compat.uses_cuda_graphs(config):
            yield "CUDA graphs replay a layer without calling Python; set cuda_graph_impl to none"
        if compat.uses_fine_grained_offload(config) or getattr(config, "cpu_offloading", False):
            yield (
                "Megatron's offloading copies outputs of norms and activation functions, whose memory is given back "
                "meanwhile; switch cpu_offloading and fine_grained_activation_offloading off (activations.policy swaps)"
            )
        if config.recompute_granularity == "full":
            yield "recompute_granularity full keeps nothing of a layer that could be in 8 bits; use selective, or none"
        elif config.recompute_granularity == "selective":
            again = {"layernorm", "moe_act", "mlp", "moe", "shared_experts"} & set(config.recompute_modules or ())
            if again:
                yield f"recompute_modules {', '.join(sorted(again))} run again what is made again here; leave them out"
        if compat.uses_hyper_connections(config):
            yield "enable_mhc_connections builds layers with a forward pass of their own; switch it off"
        if getattr(config, "activation_func_fp8_input_store", False):
            yield "activation_func_fp8_input_store does the same without scales; switch it off"
        if getattr(config, "overlap_moe_expert_parallel_comm", False):
            yield "overlap_moe_expert_parallel_comm runs the parts of a layer on its own schedule; switch it off"
        yield from activation_problems(layer)
        if self._is_two_bit:
            yield from two_bit_problems(layer)
        blocks = _blocks_of(layer)
        if self._norm_format is not None and not blocks.norms:
            yield (
                "the layer has no norm of its own (Transformer Engine's linear layers have it inside); take mlp, or "
                "build the model with a local layer spec"
            )
        hidden = int(config.hidden_size)
        if blocks.norms and hidden > norm_kernels.MAX_WIDTH and torch.cuda.is_available():
            yield f"hidden_size {hidden} is more than {norm_kernels.MAX_WIDTH}, the widest norm that the kernels take"


def _consumers(layer: Module, *, with_second: bool) -> Iterator[Module]:
    """The linear layers that are given the outputs of norms and, `with_second`, of activation functions."""
    blocks = _blocks_of(layer)
    for name in blocks.norms:
        block = blocks.modules[_CONSUMERS[name]]
        for path in ("linear_qkv", "linear_fc1", "shared_experts.linear_fc1"):
            with suppress(AttributeError):
                yield block.get_submodule(path)
    for module in blocks.modules.values() if with_second else ():
        second = getattr(module, "linear_fc2", None)
        if second is not None:
            yield second


def _blocks_of(layer: Module) -> _Blocks:
    blocks = _Blocks()
    for name, consumer in _CONSUMERS.items():
        module, block = getattr(layer, name, None), getattr(layer, consumer, None)
        if module is None or block is None:
            continue
        settings = read_norm(module)
        if settings is None:
            blocks.num_left += 1
        else:
            blocks.norms[name] = module, settings
            blocks.modules |= {name: module, consumer: block}
    for path, module in layer.named_modules():
        if path == _ATTENTION:
            blocks.modules[path] = module
        if isinstance(module, MLP) or type(module).__name__ in _GROUPED:
            blocks.modules[path] = module
            blocks.configs[id(module.config)] = module.config
    return blocks
