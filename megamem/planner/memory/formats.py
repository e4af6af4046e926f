"""What a layer saves with `fp8.saved_activations` or `mlp.tiles`: the inventory of a stock layer, changed.

stock      norm input, norm output, fc1 output, activation output
fp8        outputs of norms (where they are modules of their own) and of activation functions are not kept; inputs
           of activation functions, and with `all` those of norms, are codes and scales; values of attention hold no
           more than themselves (`integrations.saved_activations`)
mlp.tiles  of all that the MLP saves only its input, and for each tile the output of fc1 (`runtime.tiles`); of
           Transformer Engine's LayerNormLinear the normalised input besides
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from megamem.ir.activation import BASE
from megamem.ir.job import Job
from megamem.planner.layer_options import LayerOptions, owns_first_norm, owns_second_norm
from megamem.planner.memory.inventory import Saved, Storage, code_bytes

_CORE = "self_attention.core_attention"
_NORMS = {"x": "input_layernorm", "x1": "pre_mlp_layernorm"}


def with_options(tensors: Iterable[Saved], job: Job, number: int, options: LayerOptions) -> list[Saved]:
    """The saved tensors of layer `number` under these options, from those of the stock layer."""
    found = list(tensors)
    if options.rebuilds:
        found = list(_Rebuilt(job, number, options).of(found))
    if options.tiles(job, number):
        found = list(_in_tiles(found, job))
    return found


class _Rebuilt:
    """Section `fp8`."""

    def __init__(self, job: Job, number: int, options: LayerOptions) -> None:
        self.job, self.options = job, options
        self.dropped = {"n1"} if owns_first_norm(job) else set()
        self.dropped |= {"n2"} if owns_second_norm(job, number) else set()
        self.coded = set()
        if options.codes_norms:
            self.coded = {"x"} if owns_first_norm(job) else set()
            self.coded |= {"x1"} if owns_second_norm(job, number) else set()

    def of(self, tensors: list[Saved]) -> Iterator[Saved]:
        """The tensors, in order."""
        tensors = [plain for one in tensors for plain in self._plain_norm(one)]
        alone = sum(one.name == _CORE and one.storage.name == "qkv" for one in tensors) == 1
        for one in tensors:
            place, _, part = one.storage.name.rpartition(" ")
            if one.storage.name in self.dropped or (place and part in ("silu", "up", "product")):
                continue
            if place and part in ("act", "activated") and self.options.mode != "regelu2":
                continue
            if place and part == "fc1":
                yield from self._activation_input(one, place)
            elif one.storage.name in self.coded:
                yield from self._norm_input(one)
            elif alone and one.name == _CORE and one.storage.name == "qkv" and one.storage.nbytes >= 2 * one.nbytes:
                yield replace(one, storage=Storage(name="value of attention", nbytes=one.nbytes))
            else:
                yield one

    def _plain_norm(self, one: Saved) -> Iterator[Saved]:
        """Norms are computed by kernels of our own, whatever the model's: input as it comes, statistics in fp32."""
        norm, _, part = one.storage.name.partition(" ")
        source = next((source for source, name in _NORMS.items() if name == norm), None)
        job = self.job
        if source is None or ("n1" if source == "x" else "n2") not in self.dropped:
            yield replace(one, on_demand=False) if one.storage.name == "x" and "n1" in self.dropped else one
        elif part.startswith("statistics"):
            yield replace(one, nbytes=4 * job.tokens, storage=Storage(name=one.storage.name, nbytes=4 * job.tokens))
        elif part == "input" and source != "x":
            elements = job.tokens * job.model.hidden_size
            nbytes = elements * job.itemsize
            yield replace(one, nbytes=nbytes, storage=Storage(name=source, nbytes=nbytes), coded=code_bytes(elements))

    def _activation_input(self, one: Saved, place: str) -> Iterator[Saved]:
        """The whole output of fc1; its codes and scales; or two bits of each number."""
        nbytes, options = one.storage.nbytes, self.options
        if options.codes_activations:
            numbers, width = nbytes // self.job.itemsize, self._width(place)
            parts = {"codes": numbers, "scales": options.code_bytes(numbers // width, width)[1]}
        elif options.mode == "regelu2":
            parts = {"bits": nbytes // self.job.itemsize // 4}
        else:
            parts = {"fc1": nbytes}
        for part, size in parts.items():
            coded = code_bytes(size // self.job.itemsize) if part == "fc1" else 0
            yield replace(one, nbytes=size, storage=Storage(name=f"{place} {part}", nbytes=size), coded=coded)

    def _width(self, place: str) -> int:
        """Neighbours that share scales: the numbers of one half of fc1's output."""
        model, layout = self.job.model, self.job.layout
        if model.experts is None or place == "mlp":
            return model.ffn_hidden_size // layout.tensor
        if place == "expert":
            return model.experts.ffn_hidden_size // layout.experts_tensor
        return model.experts.shared_ffn_hidden_size // layout.tensor

    def _norm_input(self, one: Saved) -> Iterator[Saved]:
        """Codes and scales of it. A layer's input is needed for replays all the same."""
        hidden = self.job.model.hidden_size
        codes, scales = self.options.code_bytes(one.nbytes // self.job.itemsize // hidden, hidden)
        name = _NORMS[one.storage.name]
        for part, size in (("codes", codes), ("scales", scales)):
            storage = Storage(name=f"{name} {part}", nbytes=size)
            yield replace(one, name=name, nbytes=size, storage=storage, rebuilt=True, coded=0)
        if one.name in BASE:
            yield replace(one, on_demand=True)


def _in_tiles(tensors: list[Saved], job: Job) -> Iterator[Saved]:
    """Section `mlp`."""
    fused_norm = job.spec == "transformer_engine"
    inside = 0
    for one in tensors:
        is_of_norm = fused_norm and one.storage.name != "x1" and one.name in ("pre_mlp_layernorm", "mlp.linear_fc1")
        if is_of_norm:
            inside += one.nbytes
        elif one.storage.name == "mlp fc1":
            whole = one.storage.nbytes
            storage, coded = (
                Storage(name="mlp tiles", nbytes=whole + inside),
                code_bytes(whole // job.itemsize) + inside,
            )
            yield replace(one, nbytes=whole + inside, storage=storage, tiled=True, coded=coded)
        elif not one.storage.name.startswith("mlp "):
            yield replace(one, name="mlp.linear_fc1") if fused_norm and one.storage.name == "x1" else one
