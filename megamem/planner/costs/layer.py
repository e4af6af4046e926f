"""Seconds that a transformer layer takes on one rank, by kind, and what rebuilding parts of it costs.

Work (`work.py`) divided by the hardware's rates. Collectives of tensor and context parallelism are taken to overlap as
Megatron-Core overlaps them: in the backward pass the second all-gather of a linear layer's input runs beside the
product for the input gradient, its reduce-scatter beside the one for the weight gradient; keys and values travel the
ring beside attention. What is longer than its cover shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megamem.ir.job import Job
from megamem.planner.costs.options import OptionWork, option_work
from megamem.planner.costs.work import LayerWork, layer_work
from megamem.planner.hardware import Hardware
from megamem.planner.layer_options import STOCK_LAYERS, LayerOptions
from megamem.planner.memory.parameters import kv_width

_ANCHORS = ("qkv", "projection", "fc1")


@dataclass(frozen=True, kw_only=True)
class PassTime:
    """One pass over one layer, in seconds by kind (`ir.plan.TIME_KINDS`)."""

    gemm: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    tensor_parallel: float = 0.0
    context_parallel: float = 0.0
    expert_parallel: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(vars(self).values()))


class LayerTime:
    """The times of layer `number` (from 1) of a job on one rank of `hardware`."""

    def __init__(self, job: Job, number: int, hardware: Hardware, options: LayerOptions = STOCK_LAYERS) -> None:
        self.job, self.number, self.hardware = job, number, hardware
        self.work: LayerWork = layer_work(job, number)
        self.more: OptionWork = option_work(job, number, options)

    @cached_property
    def forward(self) -> PassTime:
        """The forward pass."""
        attention = self._attention()
        return PassTime(
            gemm=self.work.gemm / self.hardware.gemm,
            attention=attention,
            elementwise=(self.work.traffic + self.more.forward) / self.hardware.hbm,
            # Two all-gathers and two reduce-scatters, or two all-reduces; those of the MLP for each tile.
            tensor_parallel=4 * self._gather + 2 * self._latencies,
            context_parallel=max(0.0, self._ring - self._covered(attention)),
            expert_parallel=2 * self._exchange,
        )

    @cached_property
    def backward(self) -> PassTime:
        """The gradient of the input."""
        attention, product = self._attention_back(), self.work.gemm / self.hardware.gemm
        gathers = 2 * self._gather
        return PassTime(
            gemm=product + self._early,
            attention=attention,
            elementwise=(self.work.traffic_back + self.more.backward) / self.hardware.hbm,
            tensor_parallel=gathers + 2 * max(0.0, gathers - product) + 2 * self._latencies,
            context_parallel=max(0.0, 2 * self._ring - self._covered(attention)),
            expert_parallel=2 * self._exchange,
        )

    @cached_property
    def weight(self) -> PassTime:
        """The gradients of the weights."""
        return PassTime(gemm=self.work.gemm / self.hardware.gemm - self._early)

    @cached_property
    def again(self) -> float:
        """What the layer's own options compute a second time in every backward pass."""
        return self.more.again / self.hardware.hbm

    @property
    def tiles(self) -> int:
        """In which the MLP runs; 0: whole."""
        return self.more.tiles

    @cached_property
    def _early(self) -> float:
        """Weight gradients that are computed with those of the inputs: of an MLP in tiles."""
        return (self.work.gemms["fc1"] + self.work.gemms["fc2"]) / self.hardware.gemm if self.tiles else 0.0

    @property
    def _latencies(self) -> float:
        """Of the collectives of all tiles but the first."""
        return max(0, self.tiles - 1) * self.hardware.latency if self.job.layout.tensor > 1 else 0.0

    def anchor(self, name: str) -> float:
        """Running the module of an anchor again: its product, and the collective that it needs."""
        return self.work.gemms.get(name, 0.0) / self.hardware.gemm + self._gather

    @cached_property
    def rebuild(self) -> float:
        """The element-wise part of rebuilding everything that the layer saved from its input and attention output."""
        return (self.work.replayed + self.more.replayed) / self.hardware.hbm

    @property
    def anchors(self) -> Mapping[str, float]:
        """The anchors of this layer and what running each again takes; latent attention has none for its inputs."""
        names = [name for name in _ANCHORS if name in self.work.gemms]
        if self.job.model.latent is not None:
            names.remove("qkv")
        return {name: self.anchor(name) for name in names}

    @cached_property
    def replay(self) -> float:
        """Rebuilding everything from layer input and attention output: MEMO's recomputation at alpha 0."""
        latent = self.anchor("qkv") if self.job.model.latent is not None else 0.0
        return self.rebuild + latent + sum(self.anchors.values())

    @cached_property
    def experts(self) -> float:
        """Running router and experts again, with their exchanges: `activations.experts: recompute`."""
        gemm = sum(self.work.gemms.get(name, 0.0) for name in ("router", "experts", "shared_experts"))
        return gemm / self.hardware.gemm + self.work.experts / self.hardware.hbm + 2 * self._exchange + 2 * self._gather

    def selected(self, modules: Sequence[str]) -> float:
        """Running again what Megatron's `--recompute-modules` names, as far as it is known here: `core_attn`, `mlp`,
        `moe`, `shared_experts`."""
        again = self.forward.attention if "core_attn" in modules else 0.0
        gemms = self.work.gemms
        if "fc1" in gemms:
            dense = (gemms["fc1"] + gemms["fc2"]) / self.hardware.gemm + self.work.activation / self.hardware.hbm
            return again + (dense + 2 * self._gather if "mlp" in modules else 0.0)
        if "moe" in modules:
            return again + self.experts
        shared = gemms.get("shared_experts", 0.0) / self.hardware.gemm
        return again + (shared + 2 * self._gather if shared and "shared_experts" in modules else 0.0)

    @cached_property
    def residual(self) -> float:
        """Rebuilding the layer's output from its input and attention output: sparse residuals."""
        return self.forward.total - self.forward.attention - self.forward.context_parallel

    def _attention(self) -> float:
        """Unfused it is two products over the whole square, of which causal attention needs half, as fast as any other,
        and kernels over the scores, as fast as memory: neither overlaps, since each reads what the one before wrote.
        """
        if self.job.kernels.is_unfused:
            return 2 * self.work.attention / self.hardware.gemm + self.work.scores / self.hardware.hbm
        return self.work.attention / self.hardware.attention_forward.at(self.job.seq_length)

    def _attention_back(self) -> float:
        """Unfused, four products for two."""
        if self.job.kernels.is_unfused:
            return 4 * self.work.attention / self.hardware.gemm + self.work.scores_back / self.hardware.hbm
        flops = self.work.attention * self.hardware.backward_flops
        return flops / self.hardware.attention_backward.at(self.job.seq_length)

    @cached_property
    def _gather(self) -> float:
        """One all-gather or reduce-scatter of the layer's hidden state over the tensor-parallel ranks."""
        tensor = self.job.layout.tensor
        if tensor == 1:
            return 0.0
        tokens = self.job.seq_length // self.job.layout.context * self.job.micro_batch_size
        nbytes = tokens * self.job.model.hidden_size * self.job.itemsize * (tensor - 1) / tensor
        return nbytes / self.hardware.bandwidth(tensor) + self.hardware.latency

    @cached_property
    def _ring(self) -> float:
        """Keys and values of every other context-parallel rank passing by."""
        layout = self.job.layout
        if layout.context == 1:
            return 0.0
        tokens = self.job.seq_length // layout.context * self.job.micro_batch_size
        nbytes = 2 * tokens * kv_width(self.job.model, layout.tensor) * self.job.itemsize
        bandwidth = self.hardware.bandwidth(layout.context, stride=layout.tensor)
        return (layout.context - 1) * (nbytes / bandwidth + self.hardware.latency)

    def _covered(self, attention: float) -> float:
        """Attention time beside which the ring can run: all but the first round."""
        return attention * (self.job.layout.context - 1) / self.job.layout.context

    @cached_property
    def _exchange(self) -> float:
        """One all-to-all of the rows of all experts; half of a layer's two, which the backward pass has again."""
        layout, moe = self.job.layout, self.job.model.experts
        if layout.expert == 1 or moe is None or not self.job.model.is_moe(self.number):
            return 0.0
        nbytes = moe.topk * self.job.tokens * self.job.model.hidden_size * self.job.itemsize
        bandwidth = self.hardware.bandwidth(layout.expert * layout.experts_tensor)
        return nbytes * (layout.expert - 1) / layout.expert / bandwidth + self.hardware.latency
