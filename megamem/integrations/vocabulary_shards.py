"""A GPTModel whose embeddings lie in shards on all ranks of pipeline and tensor parallelism (arXiv 2411.05288).

    shard_model          replaces the two weights of a model chunk that has just been constructed
    VocabularyShards     this rank's rows of both, a submodule of chunk 0 on every pipeline rank
    ArrivedEmbeddings    stands where the first stage has its word embeddings, and returns what IF has made

The weights are ordinary parameters: DDP's buckets, the distributed optimizer, gradient clipping and weight decay find
them as they find a tensor-parallel weight, of which every rank has rows of its own. Nothing is shared between ranks, so
a model with tied embeddings is an untied one to Megatron, whose all-reduce of tied gradients has nothing to do: the one
shard is used twice. Position embeddings, dropout, final norm stay where they are.

**Checkpoints** have Megatron's own layout: the key and the global shape of the whole weight, of which a rank has rows
`start` to `stop`. So they load at any other layout, with vocabulary parallelism or without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, final

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor
from torch.nn import Module, Parameter

from megamem.errors import UnsupportedError
from megamem.integrations.placement import physical_group
from megamem.ir.vocabulary import VocabShard, shard_number, shard_vocabulary
from megamem.runtime.vocabulary.layout import AbstractShards

_NAME = "vocabulary"  # of the submodule
_SEED = 2_147_483_647  # a prime: sums of it and small seeds are seeds of nobody else


@final
class ArrivedEmbeddings(Module):
    """In place of a VocabParallelEmbedding: `arrived` is what it returns, once."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived: Tensor | None = None

    def forward(self, input_: Tensor) -> Tensor:
        """The embeddings of a microbatch, as the original shapes them: [b, s, h], or [s / t, b, h]."""
        arrived, self.arrived = self.arrived, None
        if arrived is None:
            raise UnsupportedError(
                "vocabulary.parallel: the model is called outside a training or evaluation step of the pipeline, and "
                "its word embeddings lie on all ranks; switch it off for inference"
            )
        return arrived


class _Rows(Module):
    """Rows of a weight. Calling it returns them, after the hooks that DDP has on modules to wait for parameters."""

    def __init__(
        self, words: VocabShard, vocab_size: int, config: Any, init_method: Callable[..., Any], which: int
    ) -> None:
        super().__init__()
        self._words, self._vocab_size = words, vocab_size
        on_cpu = config.use_cpu_initialization
        device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        shape = words.num_words, config.hidden_size
        self.weight = Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            self._initialise(init_method, (torch.initial_seed() + _SEED * (2 * words.start + which)) % 2**63)
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        self.weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
        self.weight.allreduce = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def _initialise(self, init_method: Callable[..., Any], seed: int) -> None:
        """From random numbers of its own: those that other weights and dropout draw are as without shards."""
        device = self.weight.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            init_method(self.weight)

    def forward(self) -> Parameter:
        return self.weight

    def sharded(self, key: str) -> ShardedTensor:
        """The rows as a part of the whole weight `key`."""
        shape = tuple(self.weight.shape)
        return ShardedTensor(
            key=key,
            data=self.weight,
            dtype=self.weight.dtype,
            local_shape=shape,
            global_shape=(self._vocab_size, shape[1]),
            global_offset=(self._words.start, 0),
            axis_fragmentations=None,  # the last shard may be smaller
            replica_id=(0, 0, parallel_state.get_data_parallel_rank(with_context_parallel=True)),
            allow_shape_mismatch=True,  # as Megatron's own: other layouts pad the vocabulary to another size
        )


@final
class VocabularyShards(Module, AbstractShards):
    """This rank's rows of input embedding and output layer; one weight for both where they are tied.

    scatters_embedding: whether the first stage's embedding makes parts along the sequence, as the word embeddings that
                        it had would have (VocabParallelEmbedding.reduce_scatter_embeddings)
    """

    scatters_embedding: bool

    def __init__(self, words: VocabShard, vocab_size: int, config: Any, *, is_tied: bool) -> None:
        super().__init__()
        self.words, self.vocab_size, self.is_tied = words, vocab_size, is_tied
        self.embedding = _Rows(words, vocab_size, config, config.embedding_init_method, 1)
        self.output_layer = None if is_tied else _Rows(words, vocab_size, config, config.init_method, 2)

    def input_weight(self) -> Parameter:
        weight: Parameter = self.embedding()
        return weight

    def output_weight(self) -> Parameter:
        weight: Parameter = (self.output_layer or self.embedding)()
        return weight

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, ShardedTensor]:
        """The rows, under the keys of the whole weights."""
        outer = prefix.removesuffix(f"{_NAME}.")
        found = {f"{prefix}embedding.weight": self.embedding.sharded(f"{outer}embedding.word_embeddings.weight")}
        if self.output_layer is not None:
            found[f"{prefix}output_layer.weight"] = self.output_layer.sharded(f"{outer}output_layer.weight")
        return found


def shards_of(model: Module) -> VocabularyShards | None:
    """The shards that a model chunk holds, if any."""
    found = getattr(model, _NAME, None)
    return found if isinstance(found, VocabularyShards) else None


def is_sharded(model: Any) -> bool:
    """Whether the embeddings of this model are elsewhere."""
    return bool(getattr(model, "shares_vocabulary", False))


def config_problems(config: Any) -> Iterator[str]:
    """Why the embeddings of a model with this configuration cannot be shared by all ranks."""
    if config.mtp_num_layers:
        yield "multi-token prediction uses both embeddings within a stage; set mtp_num_layers to None"
    if config.variable_seq_lengths:
        yield "variable_seq_lengths: ranks must know the shape of a microbatch before it comes; switch it off"
    if getattr(config, "init_model_with_meta_device", False):
        yield "init_model_with_meta_device leaves weights without values; switch it off"


def build_problems(values: dict[str, Any], num_shards: int) -> Iterator[str]:
    """Why the embeddings of a GPTModel with these arguments cannot be sharded; the same on every rank."""
    config, words = values["config"], values["vocab_size"]
    yield from config_problems(config)
    if values["mtp_block_spec"] is not None and not config.mtp_num_layers:
        yield "mtp_block_spec asks for multi-token prediction, which uses both embeddings within a stage"
    if not values["parallel_output"]:
        yield "parallel_output=False gathers the logits, which are never in memory; set it to True"
    if getattr(config, "defer_embedding_wgrad_compute", False):
        yield "defer_embedding_wgrad_compute keeps gradients of the logits, which are never in memory; switch it off"
    if shard_vocabulary(words, num_shards)[-1].num_words == 0:
        yield f"vocab_size {words} leaves some of {num_shards} ranks without words; take fewer ranks"


def shard_model(model: Any, values: dict[str, Any]) -> None:
    """Put this rank's shards into a GPTModel chunk, and take out its own weights.

    `values` are the arguments that it was to be constructed with; it was constructed untied.
    """
    config, vocab_size = model.config, values["vocab_size"]
    if (model.vp_stage or 0) == 0:
        group, tensor = physical_group(model.pp_group), model.pg_collection.tp  # 0.15 has no tp_group
        number = shard_number(pipeline_rank=group.rank(), tensor_rank=tensor.rank(), tensor_size=tensor.size())
        words = shard_vocabulary(vocab_size, group.size() * tensor.size())[number]
        shards = VocabularyShards(words, vocab_size, config, is_tied=values["share_embeddings_and_output_weights"])
        has_positions = values["position_embedding_type"] == "learned_absolute"
        scatters = values["scatter_embedding_sequence_parallel"] and not has_positions
        shards.scatters_embedding = config.sequence_parallel and scatters
        model.add_module(_NAME, shards)
    if model.pre_process:
        model.embedding.word_embeddings = ArrivedEmbeddings()
    if model.post_process:
        if type(model.output_layer) is not ColumnParallelLinear:
            raise UnsupportedError(
                f"vocabulary.parallel: the output layer is a {type(model.output_layer).__name__}; only a "
                "ColumnParallelLinear can be sharded"
            )
        model.output_layer.weight = None
    model.shares_vocabulary = True
    vars(model)["sharded_state_dict"] = partial(_sharded_state_dict, model)


def _sharded_state_dict(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own, which looks for the weight of the output layer on the last stage."""
    before, model.post_process = model.post_process, False
    try:
        return type(model).sharded_state_dict(model, *args, **kwargs)
    finally:
        model.post_process = before
