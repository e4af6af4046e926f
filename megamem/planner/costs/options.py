"""What `fp8.saved_activations` and `mlp.tiles` add to a layer's work: bytes that element-wise kernels read and write.

    fp8        codes are written as the activation function or norm runs, and read in place of its input in the backward
               pass; outputs that were not kept are made again there. No matrix product is done twice
    mlp.tiles  the activation function runs again; each tile's output and gradient is copied into its place, and each
               tile but the first reads and writes the fp32 gradients of the MLP's weights once more

Not priced, because nothing in the hardware table says what it takes: the launches of a tile's kernels, and a matrix
product's rate with fewer rows (`auto` leaves each tile 1024 of them).
"""

from __future__ import annotations

from dataclasses import dataclass

from megamem.ir.job import Job
from megamem.planner.layer_options import LayerOptions, owns_first_norm, owns_second_norm
from megamem.planner.memory.parameters import kv_width

_MAIN_GRAD = 8  # bytes read and written of an fp32 gradient


@dataclass(frozen=True, kw_only=True)
class OptionWork:
    """Bytes, for one microbatch; negative where less is read than without the options.

    forward, backward:  of each pass
    again:     of what is computed a second time in every backward pass
    replayed:  of a replay of the layer from its input and attention output
    tiles:     of the MLP; 0: whole
    """

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0
    replayed: float = 0.0
    tiles: int = 0


def option_work(job: Job, number: int, options: LayerOptions) -> OptionWork:
    """Of layer `number` (from 1)."""
    if options.rebuilds:
        return _rebuilt(job, number, options)
    if tiles := options.tiles(job, number):
        return _tiled(job, tiles)
    return OptionWork()


def _rebuilt(job: Job, number: int, options: LayerOptions) -> OptionWork:
    size, gates = job.itemsize, 2 if job.model.swiglu else 1
    forward = backward = again = 0.0
    for rows, width in _activations(job, number):
        whole, output = gates * rows * width * size, rows * width * size
        codes = sum(options.code_bytes(gates * rows, width))
        if options.codes_activations:
            forward, backward, again = forward + codes, backward + codes - whole, again + codes + output
        elif options.mode == "regelu2":
            bits = rows * width // 4
            forward, backward = forward + bits, backward + bits - whole
        else:
            again += whole + output
    hidden = job.tokens * job.model.hidden_size * size
    codes = sum(options.code_bytes(job.tokens, job.model.hidden_size))
    norms = owns_first_norm(job) + owns_second_norm(job, number)
    if options.codes_norms:
        forward, backward = forward + norms * codes, backward + norms * (codes - hidden)
    again += norms * (hidden + (codes if options.codes_norms else hidden))
    forward += _copied_values(job)
    return OptionWork(forward=forward, backward=backward, again=again, replayed=forward)


def _activations(job: Job, number: int) -> list[tuple[int, int]]:
    """Rows and width of the outputs of a layer's activation functions."""
    model, layout = job.model, job.layout
    inside = job.seq_length // layout.context * job.micro_batch_size
    if not model.is_moe(number):
        return [(inside, model.ffn_hidden_size // layout.tensor)]
    moe = model.experts
    assert moe is not None
    found = [(moe.topk * job.tokens * layout.experts_tensor, moe.ffn_hidden_size // layout.experts_tensor)]
    if moe.shared_ffn_hidden_size:
        found.append((inside, moe.shared_ffn_hidden_size // layout.tensor))
    return found


def _copied_values(job: Job) -> float:
    """Values are copied out of the output of linear_qkv where queries and keys are tensors of their own."""
    model = job.model
    if model.latent is not None or not (model.qk_layernorm or model.position == "rope"):
        return 0.0
    inside = job.seq_length // job.layout.context * job.micro_batch_size
    return 2.0 * inside * kv_width(model, job.layout.tensor) * job.itemsize


def _tiled(job: Job, tiles: int) -> OptionWork:
    model, tensor = job.model, job.layout.tensor
    gates, width = 2 if model.swiglu else 1, model.ffn_hidden_size // tensor
    inside = job.seq_length // job.layout.context * job.micro_batch_size
    activation = float((gates + 1) * inside * width * job.itemsize)
    copied = 2.0 * job.tokens * model.hidden_size * job.itemsize
    gradients = _MAIN_GRAD * (gates + 1) * model.hidden_size * width
    return OptionWork(
        forward=copied,
        backward=copied + (tiles - 1) * gradients,
        again=activation,
        replayed=-activation,
        tiles=tiles,
    )
