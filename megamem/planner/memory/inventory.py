"""What a transformer layer saves for its backward pass, tensor by tensor, from the sizes of the model.

    saved_tensors(job, number)      the tensors of layer `number` on one rank, in one microbatch

What is saved follows from the kernels (`ir.kernels`). Megatron-Core's local layers, with its own unfused attention and
norms or with megamem's, are those that the tests compare with real ones byte by byte, as they run on a CPU. Transformer
Engine's are written down from its source (2.20): LayerNormLinear saves input, normalised input and one or two numbers a
token; Linear its input; flash attention query, key, value, output and log-sum-exp; SwiGLU the output of fc1; rotary
positions nothing of their own. With unfused attention and Megatron's kernels they are the formulas of arXiv 2205.05198.

Each tensor has two sizes. `nbytes` is the memory that it covers, which is what is copied, stored or rebuilt. `storage`
is the memory that it keeps from being freed where it stays: a value that is a view of query, key and value together
keeps all three.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megamem.ir.activation import SAVED
from megamem.ir.job import Job
from megamem.planner.memory.parameters import kv_width, padded_vocabulary

_FP32, _INT64 = 4, 8
_GROUP = 128  # numbers that share a scale
LEAST_WIDTH = 16  # numbers of a token; fewer are statistics, which no codec takes


@dataclass(frozen=True, kw_only=True)
class Storage:
    """A piece of device memory. What several tensors share is counted once, by its name."""

    name: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A tensor that a layer saves.

    name:       key for `LayerRule.fate_of`: `layer_input`, `attention_output`, or the path of the module that saves it
    nbytes:     bytes of its own
    storage:    what stays where it stays
    anchor:     the anchor whose output it is made of by element-wise operations alone; empty: of the layer's input
    rebuilt:    whether a replay brings it back; attention's own scratch and experts' tensors cannot be rebuilt
    routed:     whether it is of the expert part, which is handled whole and counted apart
    tiled:      whether it is kept tile by tile, by an MLP that runs in tiles
    on_demand:  whether it is not saved, but kept where replays need it
    shared:     whether all layers of a stage save the same one, which the engine leaves where it is
    coded:      bytes in 8 bits, with a scale for 128 neighbours; 0: no codec takes it
    """

    name: str
    nbytes: int
    storage: Storage
    anchor: str = ""
    rebuilt: bool = True
    routed: bool = False
    tiled: bool = False
    on_demand: bool = False
    shared: bool = False
    coded: int = 0


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """A module output that can be stored so that a replay need not run its GEMM: bytes, and FLOPs of the GEMM.

    coded: bytes in 8 bits
    """

    name: str
    nbytes: int
    flops: float
    coded: int = 0


def saved_tensors(job: Job, number: int) -> tuple[Saved, ...]:
    """What layer `number` (from 1) saves on one rank in one microbatch."""
    return tuple(_Layer(job, number).tensors())


def code_bytes(elements: int, width: int = _GROUP) -> int:
    """Of so many numbers in 8 bits, with an fp32 scale for every 128 of a row (`runtime.activations.codec`).

    width: of a row; a row that is no multiple of 128 has one scale more
    """
    return elements + 4 * (-(-elements // width) * -(-width // _GROUP))


def storage_bytes(tensors: Iterable[Saved]) -> int:
    """The memory that these tensors keep from being freed, each piece once."""
    return sum({one.storage.name: one.storage.nbytes for one in tensors if not one.on_demand}.values())


def anchors_of(job: Job, number: int) -> tuple[Anchor, ...]:
    """The anchors of layer `number` on one rank in one microbatch; a layer with experts has no fc1 of its own."""
    return _Layer(job, number).anchors()


def weight_gradient_bytes(job: Job, number: int, *, tiles: int = 0) -> int:
    """What W still needs of a layer after B: inputs and output gradients of its linear layers.

    An MLP in `tiles` needs nothing then: its weight gradients are computed in B.
    """
    return _Layer(job, number).weight_gradient_bytes(tiles=tiles)


def output_weight_gradient_bytes(job: Job) -> int:
    """What W still needs of the output layer: its input, and the gradient of the logits.

    Multi-token prediction has them again, and those of its projection from twice the hidden size.
    """
    tokens = job.seq_length // job.layout.context * job.micro_batch_size
    shard = padded_vocabulary(job.model, job.layout.tensor) // job.layout.tensor
    hidden, depths = job.tokens * job.model.hidden_size, job.model.mtp_num_layers
    return ((1 + depths) * (hidden + tokens * shard) + depths * 3 * hidden) * job.itemsize


def score_sizes(job: Job) -> list[int]:
    """What unfused attention keeps, in bytes a pair of tokens and head: its softmax, dropout's mask and its output, or
    the softmax once more in the values' type.
    """
    size, softmax = job.itemsize, job.softmax_itemsize
    if job.model.attention_dropout:
        return [softmax, size if job.kernels.is_cpu else 1, size]
    return [softmax] if softmax == size else [softmax, size]


class _Layer:
    """One layer of a job on one rank: widths and tokens, and the lists made of them."""

    def __init__(self, job: Job, number: int) -> None:
        model, layout = job.model, job.layout
        self.job, self.model, self.number = job, model, number
        self.size, self.tensor = job.itemsize, layout.tensor
        self.tokens = job.tokens  # between layers
        self.sequence = job.seq_length // layout.context
        self.inside = self.sequence * job.micro_batch_size  # inside attention and MLP: all tokens of the tensor group
        self.query = model.query_width // self.tensor
        self.key = kv_width(model, self.tensor)
        self.value = model.value_width // self.tensor if model.latent is not None else self.key
        self.output = model.value_width // self.tensor
        self.heads = model.num_attention_heads // self.tensor
        self.gates = 2 if model.swiglu else 1
        self.kernels = job.kernels
        # PyTorch has no flash kernel with dropout on a CPU: copies of its inputs and three s x s tensors are kept then.
        self.copies_inputs = (
            job.kernels.is_cpu
            and not job.kernels.is_unfused
            and bool(model.attention_dropout)
            and not job.recomputes_attention
        )
        self.is_composed = job.kernels.norm == "composed" and model.normalization == "RMSNorm"
        self.copies_norms = self.is_composed and job.bf16
        self.is_moe = model.is_moe(number)

    def _saved(
        self,
        name: str,
        elements: int,
        storage: str,
        *,
        itemsize: int = 0,
        keeps: int = 0,
        width: int = _GROUP,
        **more: Any,
    ) -> Saved:
        """A tensor in the storage of this name, of which it keeps `keeps` bytes: its own, unless said otherwise."""
        nbytes = elements * (itemsize or self.size)
        is_activation = not itemsize and elements >= LEAST_WIDTH * self.tokens
        coded = code_bytes(elements, width) if is_activation else 0
        return Saved(
            name=name, nbytes=nbytes, storage=Storage(name=storage, nbytes=keeps or nbytes), coded=coded, **more
        )

    def tensors(self) -> list[Saved]:
        """In the order in which the layer saves them."""
        whole = self.tokens * self.model.hidden_size
        found = [self._saved("layer_input", whole, "x", rebuilt=False, on_demand=self.copies_norms)]
        found += self._norm("input_layernorm", "x")
        found += self._latent() if self.model.latent is not None else self._grouped()
        found += [
            *self._scratch(),
            self._saved("attention_output", self.inside * self.output, "o", rebuilt=False),
            *self._dropout("dropout1"),
            *self._norm("pre_mlp_layernorm", "x1", anchor="projection"),
        ]
        found += self._experts() if self.is_moe else self._mlp(self.model.ffn_hidden_size, "mlp")
        return [*found, *self._dropout("dropout2")]

    def _scratch(self) -> list[Saved]:
        """What core attention keeps to itself: the log-sum-exp of every row of scores, or the scores as they become."""
        path = "self_attention.core_attention"
        if self.job.recomputes_attention:
            return self._mask(path)
        scores = self.heads * self.inside * self.sequence
        if self.kernels.is_unfused:
            return [
                *self._mask(path),
                *(
                    self._saved(path, scores, f"scores {i}", itemsize=itemsize, rebuilt=False)
                    for i, itemsize in enumerate(score_sizes(self.job))
                ),
            ]
        if self.copies_inputs:
            return [
                self._saved(path, elements, f"scratch {i}", rebuilt=False)
                for i, elements in enumerate([self.query * self.inside, self.query * self.inside] + 3 * [scores])
            ]
        return [self._saved(path, self.heads * self.inside, "lse", itemsize=_FP32, rebuilt=False)]

    def _mask(self, path: str) -> list[Saved]:
        """Where scores are masked by PyTorch: which pairs of tokens are forbidden, of all layers alike."""
        if not self.kernels.is_unfused or not self.kernels.mask:
            return []
        if self.job.fuses_softmax and not self.job.recomputes_attention:
            return []
        pairs = self.inside * self.sequence
        return [self._saved(path, pairs, "attention mask", itemsize=1, shared=True)]

    def _norm(self, name: str, storage: str, anchor: str = "") -> list[Saved]:
        """A norm of all tokens: its input, but for the layer's own, and its statistics.

        `composed` RMSNorm keeps, in fp32, its input and what it makes of it.
        """
        elements = self.tokens * self.model.hidden_size
        found = []
        if self.copies_norms:
            found.append(self._saved(name, elements, f"{name} input", itemsize=_FP32, anchor=anchor))
        elif storage != "x":
            found.append(self._saved(name, elements, storage, anchor=anchor))
        if self.is_composed:
            found.append(self._saved(name, elements, f"{name} normalised", itemsize=_FP32, anchor=anchor))
        return [*found, *self._statistics(name, self.tokens, anchor=anchor)]

    def _statistics(self, name: str, vectors: int, anchor: str = "") -> list[Saved]:
        """Of every vector one number for RMSNorm, two for LayerNorm."""
        is_layer_norm = self.model.normalization == "LayerNorm"
        itemsize = self.size if is_layer_norm and self.kernels.is_cpu else _FP32
        return [
            self._saved(name, vectors, f"{name} statistics {i}", itemsize=itemsize, anchor=anchor)
            for i in range(2 if is_layer_norm else 1)
        ]

    def _dropout(self, storage: str) -> list[Saved]:
        """The mask: of the tensor's own type where PyTorch's CPU kernel makes it, one byte an element elsewhere."""
        if not self.model.hidden_dropout:
            return []
        itemsize = self.size if self.kernels.is_cpu else 1
        return [self._saved(SAVED, self.tokens * self.model.hidden_size, storage, itemsize=itemsize)]

    def _grouped(self) -> list[Saved]:
        """Multi-head and grouped-query attention, up to what core attention saves."""
        model = self.model
        mixed = (self.query + 2 * self.key) * self.inside * self.size
        found = [self._saved("self_attention.linear_qkv", self.tokens * model.hidden_size, "n1")]
        # Queries are a view of the output of linear_qkv where a group has one, or where there is one group.
        query_is_view = self.query == self.key or self.key == model.kv_channels
        if model.qk_layernorm:
            for name, width, is_view in (("q_layernorm", self.query, query_is_view), ("k_layernorm", self.key, True)):
                path, elements = f"self_attention.{name}", width * self.inside
                if self.copies_norms:
                    found.append(self._saved(path, elements, f"{name} input", itemsize=_FP32, anchor="qkv"))
                else:
                    own: dict[str, Any] = {"keeps": mixed} if is_view else {}
                    found.append(self._saved(path, elements, "qkv" if is_view else "q", anchor="qkv", **own))
                if self.is_composed:
                    found.append(self._saved(path, elements, f"{name} normalised", itemsize=_FP32, anchor="qkv"))
                found += self._statistics(path, elements // model.kv_channels, anchor="qkv")
        if not self.kernels.fused_rope and model.position == "rope":  # cosine and sine, for query and key
            angles, width = self.sequence * model.kv_channels, model.kv_channels
            found += [self._saved("self_attention", angles, f"rotary {i}", width=width) for i in range(4)]
        changed = model.qk_layernorm or model.position == "rope"
        inputs = [
            ("key", self.key, not changed),
            ("query", self.query, not changed and query_is_view),
            ("value", self.value, True),
        ]
        if self.copies_inputs:
            inputs = [("value of all heads", self.query, False)]
        repeats = self.kernels.is_unfused and self.query != self.key and not self.job.recomputes_attention
        if repeats:  # for every query head of its group
            inputs = [inputs[1], *((f"repeated {name}", self.query, False) for name in ("key", "value"))]
        for name, width, is_view in inputs:
            storage, keeps = ("qkv", mixed) if is_view else (f"{name} of attention", width * self.inside * self.size)
            is_inside = self.copies_inputs or name.startswith("repeated")  # made by attention, which does not run again
            source: dict[str, Any] = {"anchor": "qkv", "keeps": keeps, "rebuilt": not is_inside}
            found.append(self._saved("self_attention.core_attention", width * self.inside, storage, **source))
        return found

    def _latent(self) -> list[Saved]:
        """Latent attention: compressed queries and keys, their norms, and what they are projected up to."""
        latent, path = self.model.latent, "self_attention"
        assert latent is not None
        found = [self._saved(f"{path}.linear_kv_down_proj", self.tokens * self.model.hidden_size, "n1")]
        widths = [("kv", latent.kv_lora_rank)] + ([("q", latent.q_lora_rank)] if latent.q_lora_rank else [])
        for name, width in widths:
            found += [
                self._saved(f"{path}.{name}_layernorm", self.tokens * width, f"{name} compressed"),
                self._saved(f"{path}.{name}_layernorm", self.tokens, f"{name} statistics", itemsize=_FP32),
                self._saved(f"{path}.linear_{name}_up_proj", self.tokens * width, f"{name} normalised"),
            ]
        for name, width in (("query", self.query), ("key", self.key), ("value", self.output)):
            found.append(self._saved(f"{path}.core_attention", width * self.inside, name))
        return found

    def _mlp(self, width: int, path: str) -> list[Saved]:
        """A dense MLP: the input of fc1, what the activation function saves, the input of fc2."""
        width //= self.tensor
        tokens = self.inside
        found = [self._saved(f"{path}.linear_fc1", self.tokens * self.model.hidden_size, "n2", anchor="projection")]
        if self.model.swiglu and not self.kernels.fused_activation:
            # The gate is a view of fc1's output; silu(gate) and the other half have memory of their own.
            whole = 2 * width * tokens * self.size
            found.append(self._saved(path, width * tokens, f"{path} fc1", anchor="fc1", keeps=whole))
            found += [self._saved(path, width * tokens, f"{path} {part}", anchor="fc1") for part in ("silu", "up")]
        else:
            found.append(self._saved(path, self.gates * width * tokens, f"{path} fc1", anchor="fc1"))
        return [*found, self._saved(f"{path}.linear_fc2", width * tokens, f"{path} act", anchor="fc1")]

    def _experts(self) -> list[Saved]:
        """The router's and dispatcher's input can be rebuilt, the rest is of the experts.

        Rows are counted as they are on average over ranks: topk for every token; they differ from step to step.
        """
        moe, layout = self.model.experts, self.job.layout
        assert moe is not None
        rows = moe.topk * self.tokens * layout.experts_tensor
        width = moe.ffn_hidden_size // layout.experts_tensor
        found = [self._saved("mlp", self.tokens * self.model.hidden_size, "n2", anchor="projection")]
        if moe.shared_ffn_hidden_size:
            shared = self._mlp(moe.shared_ffn_hidden_size, "mlp.shared_experts")[1:]
            found += [_as_routed(tensor) for tensor in shared]
        parts: list[tuple[str, int, int]] = [
            ("permuted", rows * self.model.hidden_size, self.size),
            ("probabilities", rows, _FP32),
            ("activated", rows * width, self.size),
            ("indices", self.tokens * moe.topk, 2 * _INT64 + _FP32),
            ("scores", self.tokens * moe.num_experts, 2 * _FP32 + 1),
            ("order", rows, _INT64),
        ]
        if not self.kernels.fused_activation:  # silu(gate), the other half, and their product before the probabilities
            parts += [(name, rows * width, self.size) for name in ("silu", "up", "product")[: 2 * self.gates - 1]]
        found += [
            self._saved("mlp.experts", elements, f"expert {name}", itemsize=itemsize, rebuilt=False, routed=True)
            for name, elements, itemsize in parts
        ]
        # Without a kernel for it silu saves the gate alone, which keeps the whole output of fc1.
        half = rows * width * (1 if not self.kernels.fused_activation else self.gates)
        whole = rows * width * self.gates * self.size
        found.append(self._saved("mlp.experts", half, "expert fc1", keeps=whole, rebuilt=False, routed=True))
        return found

    def anchors(self) -> tuple[Anchor, ...]:
        """Outputs of qkv, projection and fc1, with the FLOPs of their GEMMs."""
        hidden, size = self.model.hidden_size, self.size
        mixed = self.query + 2 * self.key
        found = []
        if self.model.latent is None:
            flops = 2.0 * self.inside * hidden * mixed
            elements = self.inside * mixed
            found.append(Anchor(name="qkv", nbytes=elements * size, flops=flops, coded=code_bytes(elements)))
        flops = 2.0 * self.inside * hidden * self.output
        elements = self.tokens * hidden
        found.append(Anchor(name="projection", nbytes=elements * size, flops=flops, coded=code_bytes(elements)))
        if not self.is_moe:
            width = self.gates * self.model.ffn_hidden_size // self.tensor
            flops = 2.0 * self.inside * hidden * width
            elements = self.inside * width
            found.append(Anchor(name="fc1", nbytes=elements * size, flops=flops, coded=code_bytes(elements)))
        return tuple(found)

    def weight_gradient_bytes(self, *, tiles: int = 0) -> int:
        """Inputs and output gradients of qkv, projection, fc1 and fc2; of experts those of their rows."""
        hidden = self.model.hidden_size
        elements = self.tokens * hidden + self.inside * (self.query + 2 * self.key)  # qkv
        elements += self.inside * (self.output + hidden)  # projection
        if self.is_moe:
            moe, layout = self.model.experts, self.job.layout
            assert moe is not None
            rows = moe.topk * self.tokens * layout.experts_tensor
            elements += rows * (2 * hidden + (1 + self.gates) * moe.ffn_hidden_size // layout.experts_tensor)
        elif not tiles:
            width = self.model.ffn_hidden_size // self.tensor
            elements += self.tokens * hidden + self.inside * ((self.gates + 1) * width + hidden)
        return elements * self.size


def _as_routed(tensor: Saved) -> Saved:
    return Saved(name=tensor.name, nbytes=tensor.nbytes, storage=tensor.storage, rebuilt=False, routed=True)
