"""The loss of Megatron-Core's language models without their logits: `vocabulary.fused_loss`.

A model that is given labels calls its output layer, may scale the logits, and hands them to
`LanguageModule.compute_language_model_loss`; so does every head of multi-token prediction. While such a call runs, the
output layer returns `PendingLogits` in their place, which hold what logits would be made of, and the loss is computed
from those by `megamem.kernels.linear_cross_entropy`. It is the same in all releases. `output_processor`, which
GPTModel.forward takes since 0.18, is not used: heads of multi-token prediction do not pass it, and the output layer
would not be called, so that the hook which waits for its parameters under overlap_param_gather would not run.

Everything else goes Megatron's way: calls without labels, inference, calls with an output_processor of the user's.

**Loss.** Megatron counts the padding of the vocabulary as words; so does this. Label smoothing is no option of its
language models. Labels of -100, which Megatron's SFT data has and masks, have loss 0. Any other label that is no word
is an error in the first call, and NaN afterwards (Megatron: the loss of a token whose label has logit 0).

**Weight gradient.** Where Megatron's DDP is at work it is added to `main_grad` chunk by chunk, in the dtype of
`main_grad`, whether gradient_accumulation_fusion is on or not; no gradient of the weight's size exists beside it. A
schedule that splits linear layers into B and W has it computed in B: apart, W would multiply the logits a third time,
on the stage that has most to do already.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, final

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor
from torch.nn import Module
from torch.utils.weak import WeakIdKeyDictionary

from megamem.config import Vocabulary
from megamem.errors import UnsupportedError
from megamem.integrations import compat
from megamem.integrations.capability import Capability
from megamem.integrations.report import mib
from megamem.kernels.linear_cross_entropy import LossOptions, chunk_columns, linear_cross_entropy
from megamem.patches import GROUPS
from megamem.patches.registry import Patch
from megamem.runtime.session import AbstractLoss


@final
@dataclass(kw_only=True, slots=True)
class PendingLogits:
    """What an output layer would make logits [s, b, V / t] of.

    hidden:   [s, b, h], with sequence parallelism this rank's part of the sequence
    weight:   [V / t, h], of the layer or of the embedding that it is tied to; None where it lies elsewhere
    scale:    what Megatron has multiplied the logits by since (muP, `LanguageModule._scale_logits`)
    arg_max:  [s, b], the word with the largest logit, once the loss is computed; for what follows the loss, which is
              the count of accepted tokens in multi-token prediction since 0.19
    """

    layer: ColumnParallelLinear
    hidden: Tensor
    weight: Tensor
    scale: float = 1.0
    arg_max: Tensor | None = None

    def __mul__(self, factor: float) -> PendingLogits:
        return PendingLogits(layer=self.layer, hidden=self.hidden, weight=self.weight, scale=self.scale * factor)

    def size(self, dim: int) -> int:
        """The number of words of this rank, which is the last dimension."""
        return len(self.weight) if dim == -1 else self._refuse(f"size({dim})")

    def max(self, dim: int) -> tuple[Tensor, Tensor]:
        """In the last dimension: 1 and the row of the arg-max on the rank that holds it; 0 and row 0 on the others.

        Enough to find out, by a comparison of the ranks' values, which word has the largest logit.
        """
        if dim != -1 or self.arg_max is None:
            return self._refuse(f"max({dim})")
        row = self.arg_max - self.layer.tp_group.rank() * len(self.weight)
        is_mine = (row >= 0) & (row < len(self.weight))
        return is_mine.to(self.hidden.dtype), row * is_mine

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        pending = args[0] if args and isinstance(args[0], cls) else None
        if function is torch.argmax and kwargs == {"dim": -1} and pending is not None and pending.arg_max is not None:
            return pending.arg_max
        raise _asked_for_logits(getattr(function, "__name__", str(function)))

    def _refuse(self, name: str) -> NoReturn:
        raise _asked_for_logits(name)

    def __getattr__(self, name: str) -> Any:
        raise _asked_for_logits(name)


def _asked_for_logits(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{FusedLoss.OPTION}: something around the loss asks for the logits ({name}), which are never in memory; "
        "switch it off, or set vocabulary.fused_loss to false"
    )


@dataclass(frozen=True, kw_only=True)
class VocabularyReport:
    """Losses that this rank computed without logits, evaluation included.

    num_stock:     calls of its output layer that Megatron answered: for logits, for inference
    chunk_nbytes:  logits of one chunk of the largest loss, in memory at a time
    whole_nbytes:  all its logits on this rank, in the same dtype, which were never in memory
    """

    num_losses: int
    num_stock: int
    chunk_nbytes: int
    whole_nbytes: int

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much), ready to print."""
        rows = [("losses computed without logits", str(self.num_losses))]
        if self.num_losses:
            rows.append(("logits in memory at a time", f"{mib(self.chunk_nbytes)} of {mib(self.whole_nbytes)}"))
        if self.num_stock:
            rows.append(("requests that Megatron answered", str(self.num_stock)))
        return rows


@final
class FusedLoss(Capability, AbstractLoss):
    """Computes the losses of a process as `options` ask, and counts them.

    num_losses:      of which no logits were made, evaluation included
    num_stock:       other calls of an output layer's model: for logits, for inference
    largest_nbytes:  of one chunk's logits and of all logits of a rank, for the largest of these losses
    """

    SECTION: ClassVar[str] = "vocabulary"
    OPTION: ClassVar[str] = "vocabulary.fused_loss"
    NOT_LIVE: ClassVar[str] = (
        "vocabulary.fused_loss is true, a step has run, and no rank computed a loss without logits. Is the model given "
        "labels, and does it compute its loss with compute_language_model_loss? Set vocabulary.fused_loss: false to go "
        "on without"
    )

    def __init__(self, options: Vocabulary) -> None:
        self.options = options
        self.num_losses = self.num_stock = 0
        self.largest_nbytes = (0, 0)
        self._known: weakref.WeakSet[Module] = weakref.WeakSet()  # models that were checked
        self._adopted: weakref.WeakSet[Module] = weakref.WeakSet()  # models with a `forward` of ours
        self._marked: MutableMapping[Any, None] = WeakIdKeyDictionary()  # weights with a `zero_out_wgrad` of ours

    def patches(self) -> list[Patch]:
        return [patch.bound(self) for patch in GROUPS["vocabulary.loss"]]

    def expected(self) -> str:
        chunk = self.options.loss_chunk
        return f"logits of {'a chunk of the' if chunk == 'auto' else chunk} words at a time"

    def is_live(self) -> bool | None:
        return True if self.num_losses else None

    def report(self) -> VocabularyReport:
        chunk_nbytes, whole_nbytes = self.largest_nbytes
        return VocabularyReport(
            num_losses=self.num_losses,
            num_stock=self.num_stock,
            chunk_nbytes=chunk_nbytes,
            whole_nbytes=whole_nbytes,
        )

    def problems(self, chunks: Sequence[Module]) -> list[str]:
        """Why losses of these model chunks cannot be computed; empty where all can."""
        return [problem for model in models(chunks) for problem in loss_problems(model)]

    def adopt(self, chunks: Sequence[Module]) -> None:
        """Have the language models of these chunks come here that the patch of GPTModel does not reach, until `close`.

        They are HybridModel, which was MambaModel before 0.18, and what is like it: its forward pass takes labels, and
        calls output layer and loss itself.
        """
        for model in models(chunks):
            if not isinstance(model, GPTModel) and model not in self._adopted:
                vars(model)["forward"] = self._forward_of(model)
                self._adopted.add(model)

    def _forward_of(self, model: Module) -> Callable[..., Any]:
        method = type(model).forward

        @functools.wraps(method)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.run_model(model, method, args, kwargs)

        return forward

    def run_model(self, model: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not model.post_process:
            return method(model, *args, **kwargs)
        if not asks_for_loss(signature(method).bind(model, *args, **kwargs).arguments):
            self.num_stock += 1
            return method(model, *args, **kwargs)
        self._check(model)
        with deferred(model.output_layer):
            return method(model, *args, **kwargs)

    def compute(self, model: Any, method: Callable[..., Tensor], labels: Tensor, logits: Any) -> Tensor:
        if not isinstance(logits, PendingLogits):
            stock: Tensor = method(model, labels, logits)
            return stock
        layer, weight = logits.layer, logits.weight
        size = weight.element_size()
        chunk = self.options.loss_chunk
        if chunk == "auto":
            chunk = chunk_columns(labels.numel(), len(weight), size)
        row_nbytes = labels.numel() * size
        self.num_losses += 1
        self.largest_nbytes = max(self.largest_nbytes, (row_nbytes * min(chunk, len(weight)), row_nbytes * len(weight)))
        outputs = linear_cross_entropy(
            logits.hidden,
            weight,
            labels.transpose(0, 1).contiguous(),
            LossOptions(
                vocab_size=layer.output_size,
                logit_scale=logits.scale,
                arg_max=bool(model.config.mtp_num_layers) and compat.mtp_counts_acceptance(),
            ),
            group=layer.tp_group if layer.tp_group.size() > 1 else None,
            sequence_parallel=layer.sequence_parallel,
            into_main_grad=self._into_main_grad(weight),
            chunk=chunk,
        )
        logits.arg_max = outputs.arg_max
        losses: Tensor = outputs.loss.transpose(0, 1).contiguous()
        return losses

    def _check(self, model: Any) -> None:
        if model not in self._known:
            if problems := [*loss_problems(model)]:
                raise UnsupportedError(f"{FusedLoss.OPTION}: " + "; ".join(problems))
            self._known.add(model)

    def _into_main_grad(self, weight: Any) -> bool:
        """Whether Megatron's DDP has a `main_grad` for this weight; if so, have it add up what other uses contribute.

        The loss tells DDP that its gradient is in `main_grad` already. DDP then throws away what arrives by autograd,
        which may be that of another use in the same step: a tied embedding, or logits that were asked for. With
        `zero_out_wgrad`, which Megatron sets for embeddings tied on one rank, it adds that; the loss's part is zero.
        """
        if getattr(weight, "main_grad", None) is None or not hasattr(weight, "grad_added_to_main_grad"):
            return False
        if not getattr(weight, "zero_out_wgrad", False):
            weight.zero_out_wgrad = True
            self._marked[weight] = None
        return True

    def close(self) -> None:
        """Take back what was put on models and weights."""
        for model in self._adopted:
            del vars(model)["forward"]
        for weight in [*self._marked]:
            del weight.zero_out_wgrad
        self._adopted.clear()
        self._marked.clear()


@contextlib.contextmanager
def deferred(layer: Module) -> Iterator[None]:
    """While the block runs, calls of this output layer return `PendingLogits`. Its hooks run as ever."""

    def forward(
        input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[PendingLogits, None]:
        assert isinstance(layer, ColumnParallelLinear)
        if runtime_gather_output and layer.tp_group.size() > 1:
            raise UnsupportedError(
                f"{FusedLoss.OPTION}: runtime_gather_output asks for the logits of all tensor-parallel ranks, of which "
                "Megatron computes no loss; leave it out where labels are given"
            )
        return PendingLogits(layer=layer, hidden=input_, weight=layer.weight if weight is None else weight), None

    vars(layer)["forward"] = forward
    try:
        yield
    finally:
        del vars(layer)["forward"]


def asks_for_loss(given: dict[str, Any]) -> bool:
    """Whether a model called with these arguments returns a loss that Megatron itself would compute from logits."""
    own = ("inference_context", "inference_params", "output_processor")
    return (
        given.get("labels") is not None
        and all(given.get(name) is None for name in own)
        and not compat.in_inference_mode()
    )


def models(chunks: Sequence[Module]) -> list[LanguageModule]:
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, LanguageModule)]


@functools.cache
def signature(method: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(method)


def _output_weight(model: Any) -> Any:
    own = model.output_layer.weight
    return model.shared_embedding_or_output_weight() if own is None else own


def loss_problems(model: Any) -> Iterator[str]:
    """Why the loss of a language model cannot be computed without logits."""
    config = model.config
    name = type(model).__name__
    if "labels" not in signature(type(model).forward).parameters:
        yield f"{name} computes its loss in a way of its own, without which only GPTModel and HybridModel can do"
        return
    overridden = type(model).compute_language_model_loss is not LanguageModule.compute_language_model_loss
    if overridden or "compute_language_model_loss" in vars(model):
        yield f"{name} has a compute_language_model_loss of its own, which takes logits"
    if getattr(config, "defer_embedding_wgrad_compute", False):
        yield "defer_embedding_wgrad_compute keeps gradients of the logits, which are never in memory; switch it off"
    if getattr(config, "overlap_moe_expert_parallel_comm", False):
        yield "overlap_moe_expert_parallel_comm runs the loss on a schedule of its own; switch it off"
    if getattr(config, "config_logger_dir", ""):
        yield "config_logger_dir asks for the logits on disk; leave it empty"
    if compat.uses_cuda_graphs(config):
        yield "CUDA graphs replay the output layer without calling Python; set cuda_graph_impl to none"
    if getattr(config, "mtp_detach_heads", False):
        yield "mtp_detach_heads hands the output layer another view of its weight in every step; switch it off"
    if model.post_process:
        yield from _layer_problems(model.output_layer, model)


def _layer_problems(layer: Any, model: Any) -> Iterator[str]:
    if type(layer) is not ColumnParallelLinear or "forward" in vars(layer):
        yield (
            f"the output layer is a {type(layer).__name__}{' with a forward of its own' * ('forward' in vars(layer))}, "
            "not tensor_parallel.ColumnParallelLinear; switch off what replaces it (FP8 output layer, LoRA on it)"
        )
        return
    if layer.gather_output and layer.tp_group.size() > 1:
        yield (
            "parallel_output=False gathers the logits of all tensor-parallel ranks, of which Megatron computes no "
            "loss; set parallel_output to True"
        )
    if layer.bias is not None:
        yield "the output layer has a bias; build it without"
    if (dtype := getattr(layer, "output_dtype", None)) not in (None, layer.config.params_dtype):
        yield f"logit_dtype asks for logits in {dtype}, which are never in memory; leave it out"
    if getattr(layer, "gtp_remat_size", 1) > 1:
        yield "GTP shards the output layer's weight once more; switch it off"
    if hasattr(_output_weight(model), "__fsdp_param__"):
        yield "Megatron-FSDP shards the output layer's weight; use DDP, or its distributed optimizer"
