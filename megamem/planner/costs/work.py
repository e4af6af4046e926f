"""FLOPs and memory traffic of the parts of a model on one rank, for one microbatch. Counts only; no hardware.

Causal attention counts half of the scores. An element-wise kernel counts what it reads and what it writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamem.ir.job import Job
from megamem.ir.model import Model
from megamem.planner.memory.parameters import kv_width, padded_vocabulary

LOGIT_TRAFFIC = 36
"""Bytes read and written per logit by Megatron's vocabulary-parallel cross entropy: to fp32 (6), maximum (4), shifted
(8), exponent and sum (8 + 4), softmax and its gradient in bf16 (6)."""


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """One transformer layer, forward.

    gemms:        FLOPs of the matrix products by name: `qkv`, `projection`, `fc1`, `fc2`, `router`, `experts`,
                  `shared_experts`
    attention:    FLOPs of causal attention
    scores, scores_back: bytes of scores that unfused attention reads and writes, forward and in the backward pass
    traffic:      bytes that element-wise kernels read and write, forward
    traffic_back: the same in the backward pass
    replayed:     bytes of those that rebuilding what autograd saves runs again: all but the last residual
    experts:      bytes of those of the experts, which no rebuilding runs
    activation:   bytes of the activation function's own, of all experts together
    """

    gemms: dict[str, float]
    attention: float
    traffic: float
    traffic_back: float
    replayed: float
    scores: float = 0.0
    scores_back: float = 0.0
    experts: float = 0.0
    activation: float = 0.0

    @property
    def gemm(self) -> float:
        """FLOPs of all matrix products."""
        return sum(self.gemms.values())


def layer_work(job: Job, number: int) -> LayerWork:
    """Layer `number` (from 1) of a job on one rank, for one microbatch."""
    model, tensor, size = job.model, job.layout.tensor, job.itemsize
    hidden, tokens = model.hidden_size, job.tokens
    sequence = job.seq_length // job.layout.context
    inside = sequence * job.micro_batch_size
    gemms = _attention_gemms(model, tensor, inside)
    if model.is_moe(number):
        gemms |= _expert_gemms(job, inside)
        moe = model.experts
        assert moe is not None
        rows = moe.topk * tokens * job.layout.experts_tensor
        act = rows * moe.ffn_hidden_size // job.layout.experts_tensor + inside * moe.shared_ffn_hidden_size // tensor
        moved = 4 * rows * hidden  # gathered into the experts' order, and back
    else:
        width = model.ffn_hidden_size // tensor
        gemms["fc1"] = 2.0 * inside * hidden * width * (2 if model.swiglu else 1)
        gemms["fc2"] = 2.0 * inside * hidden * width
        act, moved = inside * width, 0
    gates = 2 if model.swiglu else 1
    rotary = (
        inside * (model.query_width + kv_width(model, tensor) * tensor) // tensor if model.position == "rope" else 0
    )
    norms, residual = 4 * tokens * hidden, 3 * tokens * hidden
    forward = norms + 2 * residual + 2 * rotary + (gates + 1) * act + moved
    backward = 6 * tokens * hidden + 2 * residual + 2 * rotary + (2 * gates + 1) * act + moved
    scores, scores_back = score_traffic(job)
    of_experts = (gates + 1) * act + moved if model.is_moe(number) else 0
    return LayerWork(
        gemms=gemms,
        scores=scores,
        scores_back=scores_back,
        attention=float(inside) * job.seq_length * (model.query_width + model.value_width) / tensor,
        traffic=float(forward * size),
        traffic_back=float(backward * size),
        replayed=float((forward - residual - of_experts) * size),
        experts=float(of_experts * size),
        activation=float((gates + 1) * act * size),
    )


def score_traffic(job: Job) -> tuple[float, float]:
    """Bytes of scores that the kernels of unfused attention read and write: forward, and in the backward pass.

    Counted from Megatron-Core's DotProductAttention, kernel by kernel, each of which goes through memory: the product,
    with PyTorch's softmax the mask and the copies in fp32 and back, softmax, dropout, the product with the values.
    """
    if not job.kernels.is_unfused:
        return 0.0, 0.0
    heads, size = job.model.num_attention_heads // job.layout.tensor, job.itemsize
    softmax = job.softmax_itemsize
    forward = size + 2 * softmax + size  # written by the product, softmax, read by the product with the values
    backward = size + 3 * softmax + 2 * size  # gradient written, softmax, read by the products for query and for key
    backward += size  # the probabilities, for the gradient of the values
    if not job.fuses_softmax:
        forward += 2 * softmax
        backward += 2 * softmax
    if softmax != size:
        forward += 2 * (size + softmax)
        backward += 2 * (size + softmax)
    if job.model.attention_dropout:
        forward += 2 * size + 1
        backward += 2 * size + 1
    pairs = float(heads) * job.micro_batch_size * job.seq_length * job.seq_length
    return pairs * forward, pairs * backward


def _attention_gemms(model: Model, tensor: int, inside: int) -> dict[str, float]:
    hidden = model.hidden_size
    output = model.value_width // tensor
    if model.latent is None:
        width = model.query_width // tensor + 2 * kv_width(model, tensor)
        return {"qkv": 2.0 * inside * hidden * width, "projection": 2.0 * inside * hidden * output}
    latent, query = model.latent, model.query_width // tensor
    down = hidden * (latent.kv_lora_rank + latent.qk_pos_emb_head_dim) // tensor
    up = latent.kv_lora_rank * model.num_attention_heads * (latent.qk_head_dim + latent.v_head_dim) // tensor
    queries = hidden * query
    if latent.q_lora_rank is not None:
        queries = hidden * latent.q_lora_rank // tensor + latent.q_lora_rank * query
    return {"qkv": 2.0 * inside * (queries + down + up), "projection": 2.0 * inside * hidden * output}


def _expert_gemms(job: Job, inside: int) -> dict[str, float]:
    model, layout, moe = job.model, job.layout, job.model.experts
    assert moe is not None
    products = 3 if model.swiglu else 2
    rows = moe.topk * job.tokens * layout.experts_tensor
    width = moe.ffn_hidden_size // layout.experts_tensor
    found = {
        "router": 2.0 * job.tokens * model.hidden_size * moe.num_experts,
        "experts": 2.0 * rows * model.hidden_size * width * products,
    }
    if moe.shared_ffn_hidden_size:
        shared = moe.shared_ffn_hidden_size // layout.tensor
        found["shared_experts"] = 2.0 * inside * model.hidden_size * shared * products
    return found


def output_flops(job: Job, shards: int = 1) -> float:
    """The output layer's product, forward, on one rank; `shards` pipeline ranks divide the vocabulary."""
    inside = job.seq_length // job.layout.context * job.micro_batch_size
    parts = job.layout.tensor * shards
    return 2.0 * inside * job.model.hidden_size * padded_vocabulary(job.model, parts) / parts


def projection_flops(job: Job) -> float:
    """The product of a depth of multi-token prediction that joins hidden states and embeddings, forward, on a rank."""
    inside = job.seq_length // job.layout.context * job.micro_batch_size
    return 4.0 * inside * job.model.hidden_size**2 / job.layout.tensor


def output_traffic(job: Job, shards: int = 1) -> float:
    """Bytes that the loss reads and writes on one rank, forward and backward together."""
    inside = job.seq_length // job.layout.context * job.micro_batch_size
    parts = job.layout.tensor * shards
    return float(LOGIT_TRAFFIC) * inside * padded_vocabulary(job.model, parts) / parts


MFU_FORMULA = (
    "3 x (2 x weights of every matrix product that a token goes through + 2 s q for causal attention, q the width of "
    "the heads) FLOPs a token, output layer included, input embedding and recomputation not; over GPUs x step time x "
    "peak dense bf16 FLOP/s"
)


def model_flops(job: Job) -> float:
    """FLOPs of one training step of the whole job, as `MFU_FORMULA` counts them."""
    model = job.model
    tokens = float(job.seq_length) * job.global_batch_size
    alone = _alone(job)
    per_token = 0.0
    seen: dict[bool, float] = {}
    for number in range(1, model.num_layers + 1):
        is_moe = model.is_moe(number)
        if is_moe not in seen:
            work = layer_work(alone, number)
            seen[is_moe] = (work.gemm + work.attention) / job.seq_length
        per_token += seen[is_moe]
    per_token += 2.0 * model.hidden_size * model.vocab_size
    if model.mtp_num_layers:
        last = seen[model.is_moe(model.num_layers)]
        extra = last + 2.0 * model.hidden_size * (2 * model.hidden_size + model.vocab_size)
        per_token += model.mtp_num_layers * extra
    return 3.0 * per_token * tokens


def _alone(job: Job) -> Job:
    """One sequence of the job on one rank."""
    from dataclasses import replace

    from megamem.ir.job import Layout

    return replace(job, layout=Layout(), micro_batch_size=1, global_batch_size=1)
