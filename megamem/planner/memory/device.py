"""Everything in device memory besides what layers save: states, logits, working space, buffers.

Working space is counted, not measured: the largest set of temporary tensors of one pass over one layer, with every
tensor of the full sequence that sequence parallelism gathers. On a GPU nothing of it has been compared with a run yet.
"""

from __future__ import annotations

from megamem.ir.job import Job
from megamem.ir.schedule import Placement
from megamem.planner.hardware import Hardware
from megamem.planner.layer_options import STOCK_LAYERS, LayerOptions
from megamem.planner.memory.inventory import score_sizes
from megamem.planner.memory.parameters import (
    Parameters,
    kv_width,
    padded_vocabulary,
    stage_parameters,
    states_of,
    vocabulary_parameters,
)

LOGIT_BYTES = 4 + 2
"""Per logit without the fused loss: the softmax in fp32 that Megatron's loss saves, and the logits or their gradient in
bf16. With it they become their gradient in place, and the gradient of the hidden states is summed in fp32."""
STATISTICS_BYTES = 12
"""Per token with the fused loss or a shared vocabulary: maximum, sum and the predicted logit, fp32."""
_FP32 = 4
CHUNK_BYTES = 96 << 20
LEAST_CHUNK = 2048
"""`vocabulary.loss_chunk: auto`: that much of logits, but at least so many entries, and under a quarter of them all."""
_ALIGNMENTS = (128, 8)  # of chunks that are of equal size


def static_bytes(
    job: Job, placement: Placement, rank: int, hardware: Hardware, *, shards_vocabulary: bool = False
) -> dict[str, int]:
    """Weights, gradients, optimizer states, buffers and context of one pipeline rank, by `ir.plan.MEMORY_KINDS`."""
    parameters = sum(
        (
            stage_parameters(job, placement.stage(rank, chunk), shards_vocabulary=shards_vocabulary)
            for chunk in range(placement.num_chunks)
        ),
        vocabulary_parameters(job) if shards_vocabulary else Parameters(),
    )
    states = states_of(job, parameters)
    return {
        "weights": states.weights,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        "buffers": buffer_bytes(job),
        "context": hardware.context,
    }


def buffer_bytes(job: Job) -> int:
    """Hidden states under way: of the embedding and the final norm, and a received gradient and activation."""
    hidden = job.tokens * job.model.hidden_size * job.itemsize
    return (2 if job.layout.pipeline == 1 else 4) * hidden


def chunk_of_words(tokens: int, entries: int, itemsize: int) -> int:
    """What `vocabulary.loss_chunk: auto` takes at a time (`kernels.linear_cross_entropy.passes.chunk_columns`)."""
    width = max(1, min(max(CHUNK_BYTES // (tokens * itemsize), LEAST_CHUNK), (entries - 1) // 4))
    for alignment in _ALIGNMENTS:
        if width >= alignment:
            even = -(-entries // -(-entries // (width // alignment * alignment)))
            return -(-even // alignment) * alignment
    return width


def output_bytes(job: Job, *, fused: bool, shards: int = 1, chunk: int = 0, sums_gradient: bool = True) -> int:
    """What the output layer and the loss of one microbatch hold on a rank at most.

    chunk:         entries of the vocabulary that the fused loss, or a shared vocabulary, takes at a time; 0: automatic
    sums_gradient: whether the gradient of the hidden states is summed here: with one barrier it is what S leaves to T

    With multi-token prediction the losses of all depths wait for the backward pass together, and so do the inputs of
    its norms, its projection (twice the hidden size) and the output layer.
    """
    tokens = job.seq_length // job.layout.context * job.micro_batch_size
    depths = job.model.mtp_num_layers
    frames = 5 * depths * job.tokens * job.model.hidden_size * job.itemsize
    parts = job.layout.tensor * shards
    entries = padded_vocabulary(job.model, parts) // parts
    if not fused and shards == 1:
        return (1 + depths) * tokens * entries * LOGIT_BYTES + frames
    chunk = min(chunk, entries) or chunk_of_words(tokens, entries, job.itemsize)
    sums = _FP32 * job.model.hidden_size if sums_gradient else 0
    return tokens * ((1 + depths) * STATISTICS_BYTES + chunk * job.itemsize + sums) + frames


def _score_bytes(job: Job) -> int:
    """Unfused attention's gradients of the scores, two at a time, and what recomputing it alone brings back."""
    if not job.kernels.is_unfused:
        return 0
    heads, sizes = job.model.num_attention_heads // job.layout.tensor, score_sizes(job)
    each = 2 * max(job.itemsize, sizes[0]) + (sum(sizes) if job.recomputes_attention else 0)
    return heads * job.micro_batch_size * job.seq_length**2 * each


def shared_bytes(job: Job, barriers: int, *, shards: int = 1, keep_logits: bool = False) -> int:
    """Vocabulary parallelism: what a rank keeps of one microbatch from S to T.

    shards: pipeline ranks that divide the vocabulary; keep_logits: those of the rank's shard are kept too
    """
    hidden = job.tokens * job.model.hidden_size
    numerator = 4 * hidden if barriers == 1 else 0
    tokens = job.seq_length // job.layout.context * job.micro_batch_size
    parts = job.layout.tensor * shards
    logits = tokens * padded_vocabulary(job.model, parts) // parts * job.itemsize if keep_logits else 0
    return tokens * STATISTICS_BYTES + hidden * job.itemsize + numerator + logits


def transient_bytes(job: Job, number: int, options: LayerOptions = STOCK_LAYERS) -> tuple[int, int]:
    """Working space of layer `number`: of its forward pass, and of its backward pass."""
    model, tensor = job.model, job.layout.tensor
    inside = job.seq_length // job.layout.context * job.micro_batch_size
    hidden, query = model.hidden_size, model.query_width // tensor
    mixed = query + kv_width(model, tensor) + model.value_width // tensor
    gates = 2 if model.swiglu else 1
    # Gathered input and unreduced output; flash attention accumulates the gradient of the queries in fp32.
    attention = inside * (2 * hidden + 2 * mixed) * job.itemsize + 4 * inside * query + _score_bytes(job)
    if model.is_moe(number):
        moe = model.experts
        assert moe is not None
        rows = moe.topk * job.tokens * job.layout.experts_tensor
        width = moe.ffn_hidden_size // job.layout.experts_tensor
        mlp = rows * (2 * hidden + (1 + gates) * width) * job.itemsize
        forward = 2 * rows * hidden * job.itemsize
    else:
        mlp = inside * (2 * hidden + (1 + gates) * model.ffn_hidden_size // tensor) * job.itemsize
        forward = 2 * inside * hidden * job.itemsize
        if options.rebuilds:  # outputs that are not kept
            forward += (inside * model.ffn_hidden_size // tensor + job.tokens * hidden) * job.itemsize
    if tiles := options.tiles(job, number):
        # Of a tile, what the activation function and its backward pass have; the gradient of the whole input.
        parts = 2 + gates + (2 if model.swiglu and not job.kernels.fused_activation else 0)
        width = model.ffn_hidden_size // tensor
        mlp = (inside * (2 * hidden + parts * width) // tiles + job.tokens * hidden) * job.itemsize
        forward += inside * width // tiles * job.itemsize
    return forward, max(attention, mlp)
