"""Vocabulary parallelism in Megatron-Core: `vocabulary.parallel` (arXiv 2411.05288).

    VocabularyParallel    shards models as they are built, checks them, begins the passes of each step

The schedule does the rest: it has IF, S, T and IB among its actions, which the loop runs (`runtime.vocabulary`). A
model of the last stage whose loss is asked for ends with its hidden state (`vocabulary_ends`); as with
`vocabulary.fused_loss` Megatron counts the padding of the vocabulary as words, and so does this, labels of -100 have
loss 0, and any other label that is no word is an error in the first step, and NaN afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn import Module

from megamem.config import Vocabulary
from megamem.errors import UnsupportedError
from megamem.integrations.capability import Capability, agree
from megamem.integrations.placement import VPlacement, inner_model, physical_group
from megamem.integrations.report import mib
from megamem.integrations.step_call import StepCall
from megamem.integrations.step_plan import StepPlan
from megamem.integrations.vocabulary import PendingLogits, asks_for_loss, deferred, loss_problems, models, signature
from megamem.integrations.vocabulary_ends import VocabularyEnds
from megamem.integrations.vocabulary_shards import (
    VocabularyShards,
    build_problems,
    config_problems,
    is_sharded,
    shard_model,
    shards_of,
)
from megamem.ir.schedule import Barriers
from megamem.kernels.linear_cross_entropy import LossOptions, check_shards, chunk_columns
from megamem.patches import GROUPS
from megamem.patches.registry import Patch
from megamem.runtime.pipeline.mailbox import Format
from megamem.runtime.session import AbstractLoss
from megamem.runtime.vocabulary.connections import Connections
from megamem.runtime.vocabulary.layout import Layout
from megamem.runtime.vocabulary.passes import SharedVocabulary


@dataclass(frozen=True, kw_only=True)
class VocabularyParallelReport:
    """What this rank did of the embeddings; its passes, evaluation included.

    words, vocab_size:   of this rank, and of all
    chunk_nbytes:        logits in memory at a time
    whole_nbytes:        all logits of a microbatch, on one rank without this, in the same dtype
    """

    barriers: int
    words: int
    vocab_size: int
    num_microbatches: int
    chunk_nbytes: int
    whole_nbytes: int

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much), ready to print."""
        rows = [("words on this rank", f"{self.words} of {self.vocab_size}")]
        if self.num_microbatches:
            rows += [
                ("microbatches that passed through its rows", str(self.num_microbatches)),
                ("barriers in each", str(self.barriers)),
                ("logits in memory at a time", f"{mib(self.chunk_nbytes)} of {mib(self.whole_nbytes)}"),
            ]
        return rows


@final
class VocabularyParallel(Capability, AbstractLoss):
    """The embeddings of the models of a process, shared by all its pipeline and tensor-parallel ranks."""

    SECTION: ClassVar[str] = "vocabulary"
    OPTION: ClassVar[str] = "vocabulary.parallel"
    BUILDS: ClassVar[bool] = True
    NOT_LIVE: ClassVar[str] = (
        "vocabulary.parallel is true, a step has run, and no rank has run a vocabulary pass. Is the model a GPTModel, "
        "built after megamem.enable, and does it train with Megatron's forward-backward functions? Set "
        "vocabulary.parallel: false to go on without"
    )

    def __init__(self, options: Vocabulary) -> None:
        self.options = options
        self.barriers: Barriers = options.barriers
        self._connections: Connections | None = None
        self._shards: weakref.ref[VocabularyShards] | None = None
        self._ends: VocabularyEnds | None = None
        self._checked_labels = self._checked_loss = False
        self._num_microbatches = 0
        self._chunk = self._chunk_nbytes = self._whole_nbytes = 0
        self._logit_scale = 1.0

    def patches(self) -> list[Patch]:
        return [patch.bound(self) for patch in GROUPS["vocabulary.loss"]]

    def expected(self) -> str:
        ranks = parallel_state.get_pipeline_model_parallel_world_size()
        shards = ranks * parallel_state.get_tensor_model_parallel_world_size()
        more = "one microbatch" if self.barriers == 1 else "two microbatches"
        return f"embeddings and logits on {shards} ranks, activations of at most {more} more"

    # -- the model -----------------------------------------------------------------------------------------------------

    def build_model(self, model: Module, values: dict[str, Any], construct: Callable[[], None]) -> None:
        groups = values["pg_collection"] or ProcessGroupCollection.use_mpu_process_groups()
        pipeline = physical_group(groups.pp)
        if pipeline.size() == 1:  # a model of its own beside the pipeline
            construct()
            return
        problems = [*build_problems(values, pipeline.size() * groups.tp.size())]
        if problems:
            raise UnsupportedError(f"{self.OPTION}: " + "; ".join(problems))
        wanted = dict(values)
        values["share_embeddings_and_output_weights"] = False
        construct()
        shard_model(model, wanted)

    def problems(self, chunks: Sequence[Module]) -> list[str]:
        found = [problem for chunk in chunks for problem in _problems(chunk)]
        shards = shards_of(inner_model(chunks[0]))
        if shards is None:
            found.append("the model's embeddings were not sharded; build a GPTModel after megamem.enable")
        (all_have,) = agree([int(shards is not None)])
        if all_have and shards is not None:
            found += _shard_problems(shards)
        return found

    def adopt(self, chunks: Sequence[Module]) -> None:
        model = inner_model(chunks[0])
        shards = shards_of(model)
        assert shards is not None  # `problems` has seen to it
        self._shards = weakref.ref(shards)
        scale = getattr(model, "_scale_logits", None)  # since 0.19: muP
        if scale is not None:  # asked on every rank, also where the model has no output layer
            self._logit_scale = float(scale(torch.ones((), dtype=torch.float64)))

    @property
    def shards(self) -> VocabularyShards:
        """This rank's rows."""
        found = None if self._shards is None else self._shards()
        assert found is not None  # the first step has begun
        return found

    def run_model(self, model: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not (is_sharded(model) and model.post_process):
            return method(model, *args, **kwargs)
        if not asks_for_loss(signature(method).bind(model, *args, **kwargs).arguments) or self._ends is None:
            raise UnsupportedError(
                f"{self.OPTION}: the model is asked for logits, or outside a step of the pipeline, and its output "
                "layer lies on all ranks; give it labels, or switch vocabulary.parallel off for inference"
            )
        with deferred(model.output_layer):
            return method(model, *args, **kwargs)

    def compute(self, model: Any, method: Callable[..., Tensor], labels: Tensor, logits: Any) -> Tensor:
        if not isinstance(logits, PendingLogits) or self._ends is None:
            stock: Tensor = method(model, labels, logits)
            return stock
        return self._ends.catch(logits.hidden, labels)

    # -- a step --------------------------------------------------------------------------------------------------------

    def connect(self, pipeline: Any, device: torch.device, store: Any, epoch: int, failure: Callable[[], Any]) -> None:
        """Open the communicators, unless they are open; every rank of the pipeline calls it."""
        if self._connections is not None:
            return
        tensor = parallel_state.get_tensor_model_parallel_group()
        self._connections = Connections(
            dist.get_process_group_ranks(pipeline), pipeline.rank(),
            dist.get_process_group_ranks(tensor), tensor.rank(), device, store, epoch, failure,
        )  # fmt: skip

    def disconnect(self) -> None:
        """Drop the communicators, whatever is under way."""
        connections, self._connections = self._connections, None
        self._ends = None
        if connections is not None:
            connections.close()

    def begin(
        self, call: StepCall, config: Any, placement: VPlacement | None, plan: StepPlan, form: Format
    ) -> tuple[VocabularyEnds, SharedVocabulary]:
        """The ends and the passes of a step that begins; `form` is that of a hidden state."""
        assert self._connections is not None and form.shape is not None
        layout = _layout(call, plan, form, self.shards, config)
        self._size_chunk(layout)
        checks_labels, self._checked_labels = not self._checked_labels, True
        checks_loss = not (self._checked_loss or call.forward_only)
        self._checked_loss = self._checked_loss or not call.forward_only
        self._ends = VocabularyEnds(call, config, placement, layout.tokens, checks=checks_loss)
        passes = SharedVocabulary(
            layout,
            self.shards,
            self._ends,
            self._connections,
            LossOptions(vocab_size=self.shards.vocab_size, logit_scale=self._logit_scale),
            barriers=self.barriers,
            chunk=self._chunk,
            keeps_logits=self.options.keep_logits,
            order=plan.inputs,
            trains=not call.forward_only,
            checks=checks_labels,
        )
        self._num_microbatches += call.num_microbatches
        return self._ends, passes

    def end(self) -> None:
        """The step is over."""
        self._ends = None

    def _size_chunk(self, layout: Layout) -> None:
        tokens, size = layout.tokens[0] * layout.tokens[1], layout.dtype.itemsize
        rows = self.shards.words.num_words
        chosen = self.options.loss_chunk
        self._chunk = min(rows, chunk_columns(tokens, rows, size) if chosen == "auto" else chosen)
        self._chunk_nbytes = tokens * size * self._chunk
        self._whole_nbytes = tokens * size * -(-self.shards.vocab_size // layout.tensor_group.size())

    def is_live(self) -> bool | None:
        return self._num_microbatches > 0

    def report(self) -> VocabularyParallelReport:
        shards = None if self._shards is None else self._shards()
        return VocabularyParallelReport(
            barriers=self.barriers,
            words=0 if shards is None else shards.words.num_words,
            vocab_size=0 if shards is None else shards.vocab_size,
            num_microbatches=self._num_microbatches,
            chunk_nbytes=self._chunk_nbytes,
            whole_nbytes=self._whole_nbytes,
        )

    def close(self) -> None:
        self.disconnect()


def _layout(call: StepCall, plan: StepPlan, form: Format, shards: VocabularyShards, config: Any) -> Layout:
    assert form.shape is not None
    placement, tensor = plan.schedule.placement, call.groups.tp
    length, batch, _ = form.shape
    return Layout(
        num_ranks=placement.num_ranks,
        rank=call.group.rank(),
        first=placement.rank_of(0),
        last=placement.rank_of(placement.num_stages - 1),
        tensor_group=tensor,
        sequence_parallel=bool(config.sequence_parallel),
        scatters_embedding=shards.scatters_embedding,
        tokens=(batch, length * (tensor.size() if config.sequence_parallel else 1)),
        hidden=tuple(form.shape),
        dtype=shards.embedding.weight.dtype,
        device=form.device,
    )


def _problems(chunk: Module) -> Iterator[str]:
    """Why the losses of a model chunk cannot be computed by vocabulary passes."""
    if getattr(getattr(chunk, "ddp_config", None), "use_megatron_fsdp", False):
        yield "Megatron-FSDP shards every weight in a way of its own; use DistributedDataParallel"
    for model in models([chunk]):
        yield from loss_problems(model)
        yield from config_problems(model.config)


def _shard_problems(shards: VocabularyShards) -> list[str]:
    """What does not match between the shards of a pipeline's ranks; a collective of them."""
    group = parallel_state.get_model_parallel_group()
    weight = shards.embedding.weight
    try:
        check_shards(weight, 0, shards.words.start, shards.vocab_size, group)
    except ValueError as error:
        return [str(error)]
    return []
