"""How many parameters a rank holds, and what weights, gradients and optimizer states of them take.

Shards are Megatron-Core's: column- and row-parallel linear layers, experts over the expert ranks, embeddings by
vocabulary; norms, routers and the down-projections of latent attention are on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamem.ir.job import Job
from megamem.ir.model import Model

VOCABULARY_UNIT = 128  # Megatron's --make-vocab-size-divisible-by

ADAM_STATES = 2  # first and second moment, fp32
FP32 = 4


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: `dense` ones, whose optimizer states all data ranks share, and those of experts."""

    dense: int = 0
    experts: int = 0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.dense + other.dense, self.experts + other.experts)

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes that stay from step to step."""

    weights: int
    gradients: int
    optimizer: int


def layer_parameters(model: Model, number: int, tensor: int = 1, expert: int = 1, expert_tensor: int = 1) -> Parameters:
    """Layer `number` (from 1) on one rank."""
    norm = model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)
    dense = 2 * norm + _attention(model, tensor)
    if not model.is_moe(number):
        return Parameters(dense + _mlp(model, model.ffn_hidden_size, tensor))
    moe = model.experts
    assert moe is not None
    dense += model.hidden_size * moe.num_experts  # router
    if moe.shared_ffn_hidden_size:
        dense += _mlp(model, moe.shared_ffn_hidden_size, tensor)
    return Parameters(dense, moe.num_experts // expert * _mlp(model, moe.ffn_hidden_size, expert_tensor))


def _attention(model: Model, tensor: int) -> int:
    hidden = model.hidden_size
    bias = hidden if model.add_bias_linear else 0  # of the projection, on every rank
    if model.latent is not None:
        latent, query = model.latent, model.query_width // tensor
        down = hidden * (latent.kv_lora_rank + latent.qk_pos_emb_head_dim) + latent.kv_lora_rank
        up = latent.kv_lora_rank * model.num_attention_heads * (latent.qk_head_dim + latent.v_head_dim) // tensor
        if latent.q_lora_rank is None:
            queries = hidden * query
        else:
            queries = hidden * latent.q_lora_rank + latent.q_lora_rank + latent.q_lora_rank * query
        return queries + down + up + model.value_width // tensor * hidden + bias
    width = model.query_width // tensor + 2 * kv_width(model, tensor)
    if model.add_bias_linear or model.add_qkv_bias:
        bias += width
    heads = 2 * model.kv_channels * (2 if model.normalization == "LayerNorm" else 1) if model.qk_layernorm else 0
    return hidden * width + model.query_width // tensor * hidden + bias + heads


def kv_width(model: Model, tensor: int) -> int:
    """Keys of one rank, in elements per token; groups are repeated where there are more ranks than groups."""
    if model.latent is not None:
        return model.kv_width // tensor
    return max(1, model.num_query_groups // tensor) * model.kv_channels


def _mlp(model: Model, width: int, tensor: int) -> int:
    width //= tensor
    gates = 2 if model.swiglu else 1
    bias = gates * width + model.hidden_size if model.add_bias_linear else 0
    return (gates + 1) * model.hidden_size * width + bias


def padded_vocabulary(model: Model, tensor: int) -> int:
    """Entries of the vocabulary after Megatron's padding."""
    unit = VOCABULARY_UNIT * tensor
    return -(-model.vocab_size // unit) * unit


def embedding_parameters(model: Model, tensor: int = 1, shards: int = 1) -> int:
    """The input embedding on one rank; `shards`: pipeline ranks that divide it (vocabulary parallelism)."""
    positions = model.max_position_embeddings if model.position == "learned_absolute" else 0
    return (padded_vocabulary(model, tensor * shards) // (tensor * shards) + positions) * model.hidden_size


def output_parameters(model: Model, tensor: int = 1, shards: int = 1) -> int:
    """The output layer on one rank."""
    return padded_vocabulary(model, tensor * shards) // (tensor * shards) * model.hidden_size


def model_parameters(model: Model) -> int:
    """The whole model, with the vocabulary as it is: the number that names the model."""
    layers = sum(layer_parameters(model, number).total for number in range(1, model.num_layers + 1))
    positions = model.max_position_embeddings if model.position == "learned_absolute" else 0
    vocabulary = model.vocab_size * (1 if model.share_embeddings else 2)
    final_norm = model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)
    return layers + (vocabulary + positions) * model.hidden_size + final_norm + mtp_parameters(model).total


def mtp_parameters(model: Model, tensor: int = 1, expert: int = 1, expert_tensor: int = 1) -> Parameters:
    """Multi-token prediction: per depth three norms, the projection of twice the hidden size, and a layer."""
    norm = model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)
    frame = 3 * norm + 2 * model.hidden_size * model.hidden_size // tensor
    one = Parameters(frame) + layer_parameters(model, model.num_layers, tensor, expert, expert_tensor)
    return Parameters(one.dense * model.mtp_num_layers, one.experts * model.mtp_num_layers)


def stage_layers(job: Job, stage: int) -> range:
    """The numbers of the layers of a stage, of pipeline ranks x chunks stages, in the order of the model."""
    if split := job.layout.split:
        first = sum(split[:stage])
        return range(first + 1, first + split[stage] + 1)
    per_stage = job.model.num_layers // job.layout.num_stages
    return range(stage * per_stage + 1, (stage + 1) * per_stage + 1)


def layer_stage(job: Job, number: int) -> int:
    """The stage that has the layer of this number: some have none."""
    return next(stage for stage in range(job.layout.num_stages) if number in stage_layers(job, stage))


def stage_passes(job: Job, stage: int) -> range:
    """The layers of a stage, and behind those of the last one the layers of multi-token prediction, numbered on."""
    numbers = stage_layers(job, stage)
    more = job.model.mtp_num_layers if stage == job.layout.num_stages - 1 else 0
    return range(numbers.start, numbers.stop + more)


def stage_parameters(job: Job, stage: int, *, shards_vocabulary: bool = False) -> Parameters:
    """The parameters of one stage on one rank. With vocabulary parallelism the embeddings are of no stage."""
    model, layout = job.model, job.layout
    sizes = (layout.tensor, layout.expert, layout.experts_tensor)
    found = Parameters()
    for number in stage_layers(job, stage):
        found += layer_parameters(model, number, *sizes)
    last = layout.num_stages - 1
    if stage == (layer_stage(job, model.num_layers) if model.mtp_num_layers else last):
        # Megatron-Core norms before the predictions, behind the last layer; without them, before the output layer.
        found += Parameters(model.hidden_size * (2 if model.normalization == "LayerNorm" else 1))
    if stage == last:
        found += mtp_parameters(model, *sizes)
    if shards_vocabulary:
        return found
    if stage == 0 or (stage == last and model.mtp_num_layers):  # predictions of depths need a copy of the embedding
        found += Parameters(embedding_parameters(model, layout.tensor))
    if stage == last and not (model.share_embeddings and last == 0):
        found += Parameters(output_parameters(model, layout.tensor))
    return found


def vocabulary_parameters(job: Job) -> Parameters:
    """A pipeline rank's share of both embeddings under vocabulary parallelism; tied ones are one."""
    model, layout = job.model, job.layout
    tensor, ranks = layout.tensor, layout.pipeline
    tied = 1 if model.share_embeddings else 2
    positions = model.max_position_embeddings * model.hidden_size if model.position == "learned_absolute" else 0
    return Parameters(tied * output_parameters(model, tensor, ranks) + positions)


def states_of(job: Job, parameters: Parameters) -> States:
    """Weights, main gradients and Adam's states of these parameters on one rank.

    In bf16 gradients are accumulated in fp32, and the optimizer has an fp32 copy of the weights besides its moments.
    The distributed optimizer divides its states over data- and context-parallel ranks, those of experts over the ranks
    that hold the same experts.
    """
    layout = job.layout
    copies = (1 if job.bf16 else 0) + ADAM_STATES
    dense, experts = parameters.dense, parameters.experts
    if layout.distributed_optimizer:
        dense, experts = -(-dense // (layout.data * layout.context)), -(-experts // layout.expert_data)
    return States(
        weights=parameters.total * job.itemsize,
        gradients=parameters.total * FP32,
        optimizer=(dense + experts) * copies * FP32,
    )
