"""The options that change what layers and the loss hold, or how it travels, whatever becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from megamem.ir.activation import Codec
from megamem.ir.job import Job
from megamem.ir.tiles import automatic_tiles
from megamem.planner.activations import coded_modules, is_compressed
from megamem.sections import LowPrecision, Mlp


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """How the layers of a job are run. `fp8` and `mlp` may be off; both together are refused (`problems`).

    low_precision:  `fp8`, what norms and activation functions save
    mlp:            `mlp`, dense MLPs in tiles of their tokens
    compress:       `activations.compress`, how what is swapped travels
    loss_chunk:     `vocabulary.loss_chunk`, entries of the vocabulary at a time; 0: chosen automatically
    """

    low_precision: LowPrecision = field(default_factory=LowPrecision)
    mlp: Mlp = field(default_factory=Mlp)
    compress: Codec = "none"
    loss_chunk: int = 0

    @property
    def mode(self) -> str:
        """`fp8.saved_activations`."""
        return self.low_precision.saved_activations

    @property
    def rebuilds(self) -> bool:
        """Whether outputs of norms and activation functions are made again."""
        return self.low_precision.is_on

    @property
    def codes_activations(self) -> bool:
        """Whether inputs of activation functions are kept in 8 bits."""
        return self.mode in ("mlp", "all")

    @property
    def codes_norms(self) -> bool:
        """Whether inputs of norms are."""
        return self.mode == "all"

    def travels_coded(self, name: str) -> bool:
        """Whether a tensor, by the module that saves it or the anchor that it is, goes to host memory in 8 bits."""
        return self.compress != "none" and is_compressed(name, coded_modules(self.low_precision))

    def code_bytes(self, rows: int, width: int) -> tuple[int, int]:
        """Bytes of the codes of `rows` rows of `width` neighbours, and of their scales."""
        return rows * width, rows * 4 * -(-width // self.low_precision.group)

    def tiles(self, job: Job, number: int) -> int:
        """Tiles in which the MLP of layer `number` runs; 0: it does not."""
        if not self.mlp.is_on or job.model.is_moe(number):
            return 0
        if isinstance(self.mlp.tiles, int):
            return self.mlp.tiles
        model, layout = job.model, job.layout
        return automatic_tiles(
            job.seq_length // layout.context * job.micro_batch_size,
            width=(2 if model.swiglu else 1) * model.ffn_hidden_size // layout.tensor,
            hidden=model.hidden_size,
            gathered=layout.tensor if layout.sequence_parallel else 1,
        )

    def problems(self, job: Job) -> list[str]:
        """What a job of this model would be refused for at its start, one sentence each, with what to do."""
        return [*self._of_low_precision(job), *self._of_tiles(job)]

    def _of_low_precision(self, job: Job) -> Iterator[str]:
        if not self.rebuilds:
            return
        name, model = f"fp8.saved_activations: {self.mode}", job.model
        if self.mlp.is_on:
            yield (
                f"{name} makes outputs of activation functions again, as mlp.tiles does, and holds those of all tiles "
                "until it does; switch one of them off"
            )
        if job.recompute == "full":
            yield f"{name}: --recompute-granularity full keeps nothing of a layer that could be in 8 bits; leave it out"
        if self.mode == "regelu2" and (model.swiglu or model.experts is not None):
            yield f"{name}: two bits stand for the slope of GELU without a gate; take mlp"
        if not model.swiglu and not model.add_bias_linear:
            yield f"{name}: GELU without a bias has no fused function in Megatron-Core; switch fp8 off"
        if self.codes_norms and any(not owns_norms(job, number) for number in range(1, model.num_layers + 1)):
            yield (
                f"{name}: the norms of Transformer Engine's layers are inside its linear layers; take mlp, or "
                "--transformer-impl local"
            )

    def _of_tiles(self, job: Job) -> Iterator[str]:
        model = job.model
        if self.mlp.is_on and all(model.is_moe(number) for number in range(1, model.num_layers + 1)):
            yield "mlp.tiles: no layer of the model has a dense MLP; leave it out"


STOCK_LAYERS = LayerOptions()
"""All off."""


def owns_norms(job: Job, number: int) -> bool:
    """Whether some norm of layer `number` is a module of its own, and not inside a linear layer."""
    return owns_first_norm(job) or owns_second_norm(job, number)


def owns_first_norm(job: Job) -> bool:
    """Whether the norm before attention is a module of its own: not in Transformer Engine's layers, but for latents."""
    return job.spec != "transformer_engine" or job.model.latent is not None


def owns_second_norm(job: Job, number: int) -> bool:
    """Whether the norm before the MLP is one: in Transformer Engine's layers before experts only."""
    return job.spec != "transformer_engine" or job.model.is_moe(number)
