"""V placement of a Megatron-Core model: rank r of p holds stage r in chunk 0 and stage 2p - 1 - r in chunk 1.

    rank      0        1        2        3
    chunk 0   stage 0  stage 1  stage 2  stage 3
    chunk 1   stage 7  stage 6  stage 5  stage 4        (arXiv 2405.15362, section 3)

With four or more chunks the V is repeated: every odd chunk runs backwards through the ranks. Their number is even, so
that the model begins and ends on rank 0.

Megatron-Core derives what a chunk holds from two numbers: its virtual stage c and its pipeline rank. In a ring that is
stage c * p + rank, so an odd chunk becomes its stage of the V by believing to be on rank p - 1 - r, its *logical* rank.
`VPlacement` makes it believe so, without a changed file:

    LogicalGroup   the pipeline group as a chunk sees it: rank() is the logical one. It sits in the chunk's own
                   ProcessGroupCollection, whence layer numbers, final norm, casts and checkpoint offsets are read.
    as_stage       while it is entered, `parallel_state` too answers with the logical rank: for layer specs, pipeline
                   layouts, and trainers' batches.
    build          overrides what the trainer thought about first and last stage, and checks the layers afterwards.

A pipeline_model_parallel_layout is read in the order of the stages, as in a ring.

The first and the last stage are both on rank 0, hence Megatron's collectives over the embedding group, which holds
the first and the last rank, have no part in a V: copies of a tied weight, or of the embedding that multi-token
prediction needs in the last stage, are set equal, and their gradients summed, within rank 0. The chunks' own embedding
group is None. The loss is on rank 0 too, while trainers look for it on the last rank: `hand_over_losses` and
`hand_over_tokens` bring it there.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch import Tensor
from torch.nn import Module

from megamem.errors import UnsupportedError
from megamem.integrations import compat
from megamem.integrations.local_spec import moe_layers
from megamem.ir.schedule import Placement
from megamem.runtime.session import AbstractPlacement


@final
class LogicalGroup:
    """A pipeline group that reports another rank; everything else is the group's own.

    `torch.distributed` does not know it as a group: what needs global ranks must ask `physical`, and fails loudly here.
    """

    __slots__ = ("_rank", "physical")

    def __init__(self, physical: Any, rank: int) -> None:
        self.physical, self._rank = physical, rank

    def rank(self) -> int:
        """The logical rank."""
        return self._rank

    def size(self) -> int:
        """The number of pipeline ranks."""
        size: int = self.physical.size()
        return size

    def __getattr__(self, name: str) -> Any:
        if name in LogicalGroup.__slots__:  # not set yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.physical, name)


def physical_group(group: Any) -> Any:
    """The group that has the real rank and that collectives can run on."""
    return getattr(group, "physical", group)


@final
class VPlacement(AbstractPlacement):
    """The V placement in one process, after `initialize_model_parallel` and before a model is built.

    Raises UnsupportedError where the parallel layout has no V.
    """

    def __init__(self) -> None:
        self._group = parallel_state.get_pipeline_model_parallel_group()
        self._rank: int = self._group.rank()
        chunks = _check_layout(self._group.size())
        self.placement = Placement(shape="v", num_ranks=self._group.size(), num_chunks=chunks)
        self._waiting: list[weakref.ref[Module]] = []  # first stages with a copied weight, whose last is not built yet
        self._announced: int | None = None

    def stage(self, chunk: int) -> int:
        """The stage that a chunk of this rank is, from 0."""
        return self.placement.stage(self._rank, chunk)

    def logical_rank(self, chunk: int) -> int:
        """The rank that a chunk of this rank would be on in Megatron's ring."""
        return self.stage(chunk) % self.placement.num_ranks

    def is_first(self, chunk: int) -> bool:
        """Whether a chunk of this rank is the first stage of the model."""
        return self.stage(chunk) == 0

    def is_last(self, chunk: int) -> bool:
        """Whether a chunk of this rank is the last stage of the model."""
        return self.stage(chunk) == self.placement.num_stages - 1

    @contextmanager
    def as_stage(self, chunk: int) -> Iterator[None]:
        """Let `parallel_state` answer for the stage that `chunk` is: pipeline rank, first stage, last stage.

        Costs two assignments; the order of collectives and point-to-point messages does not depend on it.
        """
        with _as_rank(self.logical_rank(chunk)):
            yield

    @contextmanager
    def building(self, chunk: int) -> Iterator[None]:
        """`as_stage` for a user's code around the constructor: layer specs, data sets, what a builder asks for."""
        if chunk not in range(self.placement.num_chunks):
            raise UnsupportedError(
                f"this V has chunks 0 to {self.placement.num_chunks - 1} on every rank, no chunk {chunk}"
            )
        before, self._announced = self._announced, chunk
        try:
            with self.as_stage(chunk):
                yield
        finally:
            self._announced = before

    def run_building(self, build: Callable[..., Any], /, *args: Any, vp_stage: int | None = None, **kwargs: Any) -> Any:
        if vp_stage is None:
            return build(*args, **kwargs)
        with self.building(vp_stage):
            return build(*args, vp_stage=vp_stage, **kwargs)

    # -- construction --------------------------------------------------------------------------------------------------

    def build_model(self, model: Module, values: dict[str, Any], construct: Callable[[], None]) -> None:
        """Have a GPTModel constructed, with `values` for arguments, for the stage that its chunk is."""
        groups = copy.copy(values["pg_collection"] or ProcessGroupCollection.use_mpu_process_groups())
        if groups.pp.size() == 1:  # a model of its own beside the pipeline
            construct()
            return
        problems = [*_problems(values, self.placement, self._announced)]
        if problems:
            raise UnsupportedError("V placement: " + "; ".join(problems))
        chunk: int = self._announced if values["vp_stage"] is None else values["vp_stage"]  # type: ignore[assignment]
        self._check_prediction(values, chunk)
        groups.pp = LogicalGroup(getattr(groups.pp, "physical", groups.pp), self.logical_rank(chunk))
        groups.embd = None
        values |= {"pg_collection": groups, "vp_stage": chunk}
        values |= {"pre_process": self.is_first(chunk), "post_process": self.is_last(chunk)}
        with self.as_stage(chunk):
            construct()
        self._check_layers(model, chunk)

    def on_language_model(self, model: Module) -> None:
        if not _is_placed(model) and model.pp_group.size() > 1:  # type: ignore[operator]
            raise UnsupportedError(
                f"V placement is for GPTModel; {type(model).__name__} finds its layers in a way of its own. Use a "
                "schedule on Megatron's own placement, such as gis-h"
            )

    def on_embeddings(self, model: Module) -> None:
        if not _is_placed(model) or not _has_copies(model):
            return
        if self.is_first(_chunk_of(model)):
            self._waiting.append(weakref.ref(model))
        elif self.is_last(_chunk_of(model)):
            copied, original = _tied_weight(model), _tied_weight(self._first_chunk())
            if not original.is_meta:
                copied.data.copy_(original.data)

    def _first_chunk(self) -> Module:
        while self._waiting:
            first = self._waiting.pop()()
            if first is not None:
                return first
        raise UnsupportedError(
            "V placement: the last chunk of a model with tied embeddings, or with multi-token prediction, was built "
            "before its chunk 0, whose weight it copies"
        )

    def layer_numbers(self, config: Any, stage: int) -> range:
        """The layers of a stage, counted from 1 over the whole model."""
        counts = [self._num_layers(config, before) for before in range(stage + 1)]
        return range(1 + sum(counts[:-1]), 1 + sum(counts))

    def _num_layers(self, config: Any, stage: int) -> int:
        chunk, logical = divmod(stage, self.placement.num_ranks)
        with _as_rank(logical):  # a pipeline layout ignores pp_rank
            number: int = get_num_layers_to_build(config, vp_stage=chunk, pp_rank=logical)
        return number

    def _check_prediction(self, values: dict[str, Any], chunk: int) -> None:
        """That multi-token prediction is in the last stage alone, on the rank that has the embedding it copies."""
        wanted, found = self.is_last(chunk) and bool(values["config"].mtp_num_layers), values["mtp_block_spec"]
        if wanted != (found is not None):
            raise UnsupportedError(
                f"V placement: chunk {chunk} of pipeline rank {self._rank} is stage {self.stage(chunk)}, which "
                f"{'has' if wanted else 'does not have'} the model's multi-token prediction, but its mtp_block_spec "
                f"{'is None' if wanted else 'is not None'}: it was made for another stage, or "
                "pipeline_model_parallel_layout has it elsewhere than in the last one. Make it inside "
                f"`with handle.building({chunk}):`"
            )

    def _check_layers(self, model: Any, chunk: int) -> None:
        """That the layers are those of the stage; a layer spec made outside may have been made for another."""
        stage = self.stage(chunk)
        wanted = [*self.layer_numbers(model.config, stage)]
        found = [getattr(layer, "layer_number", None) for layer in model.decoder.layers]
        kinds = moe_layers(model.config)
        wanted_experts = [number for number in wanted if kinds[number - 1]]
        found_experts = [layer.layer_number for layer in model.decoder.layers if compat.is_moe_layer(layer)]
        if (wanted, wanted_experts) != (found, found_experts):
            raise UnsupportedError(
                f"V placement: chunk {chunk} of pipeline rank {self._rank} is stage {stage}, layers {wanted} "
                f"(with experts: {wanted_experts}), but was built with layers {found} (with experts: {found_experts}): "
                f"its layer spec was made for another stage. Make it inside `with handle.building({chunk}):`"
            )

    # -- what a placed model does --------------------------------------------------------------------------------------

    def run_as_stage(
        self, model: Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not _is_placed(model):
            return method(model, *args, **kwargs)
        with self.as_stage(_chunk_of(model)):
            return method(model, *args, **kwargs)

    def check_model(self, chunks: Sequence[Module]) -> None:
        """Raise UnsupportedError unless `chunks` are this rank's chunks, in order, and were built by this placement."""
        models = [inner_model(chunk) for chunk in chunks]
        found = [_chunk_of(model) if _is_placed(model) else "an unplaced one" for model in models]
        if found != [*range(self.placement.num_chunks)]:
            raise UnsupportedError(
                f"V placement: a step needs chunks 0 to {self.placement.num_chunks - 1} of pipeline rank {self._rank}, "
                f"and got {', '.join(map(str, found))}; build the model after megamem.enable"
            )

    def sum_tied_gradients(self, chunks: Sequence[Module]) -> bool:
        models = [inner_model(chunk) for chunk in chunks]
        if not any(map(_is_placed, models)):
            return False
        self.check_model(chunks)
        if not self.is_first(0) or not _has_copies(models[0]):
            return True
        if getattr(getattr(chunks[0], "ddp_config", None), "use_megatron_fsdp", False):
            raise UnsupportedError("V placement: copies of the embedding do not go with Megatron-FSDP; untie them")
        one, other = (compat.gradient(_tied_weight(model)) for model in (models[0], models[-1]))
        if one is not None and other is not None:  # None: the weight is frozen
            # The same two numbers as in Megatron's all-reduce of two ranks, and addition commutes. The distributed
            # optimizer gives each copy a bucket of its own, so that both are cut into the same shards.
            one.add_(other)
            other.copy_(one)
        return True

    def hand_over_tokens(self, num_tokens: Tensor) -> None:
        """Give every rank the token count of rank 0, in place; Megatron takes it from the last rank. A collective."""
        dist.broadcast(num_tokens, src=dist.get_global_rank(self._group, 0), group=self._group)

    def hand_over_losses(self, losses: list[Any]) -> list[Any]:
        """What the last stage's loss functions returned: on the last rank, where trainers look for it; else nothing.

        A collective of the pipeline group, to be called at the end of a step: it waits for the losses. GPU tensors in
        dicts, lists and tuples come on the current GPU of the receiving rank.
        """
        box = [_packed(losses)] if self._rank == 0 else [None]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self._group, 0), group=self._group)
        return _unpacked(box[0]) if self._rank == self.placement.num_ranks - 1 else []


@contextmanager
def _as_rank(rank: int) -> Iterator[None]:
    before = compat.pipeline_rank_override()
    parallel_state.set_pipeline_model_parallel_rank(rank)
    try:
        yield
    finally:
        parallel_state.set_pipeline_model_parallel_rank(before)


def inner_model(chunk: Any) -> Any:
    """The model inside a trainer's wrappers."""
    while isinstance(getattr(chunk, "module", None), Module):
        chunk = chunk.module
    return chunk


def _is_placed(model: Any) -> bool:
    return isinstance(getattr(model, "pp_group", None), LogicalGroup)


def _chunk_of(model: Any) -> int:
    chunk: int = model.vp_stage
    return chunk


def _has_copies(model: Any) -> bool:
    """Whether the last stage has a copy of the first one's embedding, for its output layer or for predictions."""
    return bool(model.share_embeddings_and_output_weights or model.config.mtp_num_layers)


def _tied_weight(model: Any) -> Tensor:
    weight: Tensor = model.shared_embedding_or_output_weight()
    return weight


class _OnGpu(NamedTuple):
    """A tensor that travels through host memory: the sender's GPU has another number than the receiver's."""

    value: Tensor


def _packed(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _OnGpu(value.detach().cpu()) if value.is_cuda else value.detach()
    return _each(_packed, value)


def _unpacked(value: Any) -> Any:
    return value.value.cuda() if isinstance(value, _OnGpu) else _each(_unpacked, value)


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: function(item) for key, item in value.items()}
    return type(value)(map(function, value)) if type(value) in (list, tuple) else value


def _check_layout(num_ranks: int) -> int:
    """The chunks per rank; refuses, before any model is built, a process whose parallel groups have no V."""
    chunks: int | None = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    problems = []
    if num_ranks < 2:
        problems.append(f"it needs 2 or more pipeline ranks, and there is {num_ranks}")
    if chunks is None or chunks % 2:
        problems.append(
            "it has 2 chunks on every rank, or another even number; initialise Megatron with "
            f"virtual_pipeline_model_parallel_size=2, not {chunks}"
        )
    if problems:
        raise UnsupportedError("V placement: " + "; ".join(problems))
    assert chunks is not None
    return chunks


def _problems(values: dict[str, Any], placement: Placement, announced: int | None) -> Iterator[str]:
    """Why a GPTModel with these arguments cannot be a chunk of a V."""
    config, chunk = values["config"], values["vp_stage"]
    num_ranks, chunks, stages = placement.num_ranks, placement.num_chunks, placement.num_stages
    if values["pg_collection"] is not None and values["pg_collection"].pp.size() != num_ranks:
        yield f"the model's pipeline group has {values['pg_collection'].pp.size()} ranks, the schedule's {num_ranks}"
    if config.virtual_pipeline_model_parallel_size != chunks:
        yield (
            f"virtual_pipeline_model_parallel_size must be {chunks} in the model's configuration, "
            f"not {config.virtual_pipeline_model_parallel_size}"
        )
    if chunk is None and announced is None:
        yield "pass vp_stage=chunk to GPTModel, or build it inside `with handle.building(chunk):`"
    if chunk is not None and announced is not None and chunk != announced:
        yield f"vp_stage={chunk} is built inside `handle.building({announced})`"
    if chunk not in (None, *range(chunks)):
        yield f"there is no chunk {chunk}"
    if getattr(config, "defer_embedding_wgrad_compute", False):
        yield "defer_embedding_wgrad_compute belongs to Megatron's own cool-down; switch it off"
    if announced is None and (own := _layer_kinds(config)):
        yield f"kinds of layers by {own} cannot be checked; make spec and model inside `with handle.building(chunk):`"
    if _is_even_split(config) and config.num_layers % stages:
        near = max(stages, round(config.num_layers / stages) * stages)
        yield (
            f"{config.num_layers} layers do not divide into {stages} stages ({num_ranks} ranks x {chunks} chunks); "
            f"the nearest number is {near}, or give pipeline_model_parallel_layout"
        )


def _layer_kinds(config: Any) -> str:
    """The setting that makes layers differ by their number in the layer spec, other than experts; empty for none."""
    names = ("heterogeneous_block_specs", "linear_attention_freq", "experimental_attention_variant")
    return next((name for name in names if getattr(config, name, None)), "")


def _is_even_split(config: Any) -> bool:
    names = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
    account = config.account_for_embedding_in_pipeline_split or config.account_for_loss_in_pipeline_split
    uneven = config.pipeline_model_parallel_layout or account
    return not uneven and all(getattr(config, name) is None for name in names)
