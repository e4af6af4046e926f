"""Megatron-Core's `TransformerLayer`, as the activation engine wants to see it."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import Module

from megamem.errors import UnsupportedError
from megamem.integrations import compat, transformer_engine
from megamem.integrations.tiled_mlp import PATH as TILED
from megamem.ir.activation import ANCHORS
from megamem.runtime.activations.layer import AbstractLayer, Args, Kwargs, PutTogether

_ATTENTION = "self_attention.core_attention"
_ANCHORS = dict(
    zip(ANCHORS, ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1"), strict=True)
)
_DEPTH = 2  # parts are the layer's submodules and theirs


@final
class MegatronLayer(AbstractLayer):
    """One `TransformerLayer` (or subclass that calls its forward).

    Tokens are dimension 0 of hidden states [s, b, h]. Under sequence parallelism s counts this rank's shard, and what
    column-parallel layers return holds the shards of all tensor-parallel ranks one behind the other.

    Nobody looks into an MLP that is `tiled`: it keeps what it needs itself.
    """

    def __init__(
        self,
        module: Module,
        around: Callable[[Module], AbstractContextManager[None]] | None = None,
        *,
        tiled: bool = False,
    ) -> None:
        """`around`: what has to surround the layer's replays, because something surrounds it while it runs."""
        self._around, self._tiled = around, tiled
        self._reference = weakref.ref(module)  # whoever knows a layer by its module must not keep the module alive
        self._experts = "mlp" if compat.is_moe_layer(module) else None
        self._parts = dict(_parts(module, self._experts or (TILED if tiled else None)))
        self._anchors = {name: path for name, path in _ANCHORS.items() if path in self._parts}
        self._blocks = _token_blocks(module.config)
        self._names = _arguments(module)

    @property
    def _module(self) -> Any:
        module = self._reference()
        assert module is not None
        return module

    @property
    def number(self) -> int:
        return int(self._module.layer_number)

    @property
    def parts(self) -> Mapping[str, Module]:
        return self._parts

    @property
    def attention(self) -> str | None:
        return _ATTENTION if _ATTENTION in self._parts else None

    @property
    def anchors(self) -> Mapping[str, str]:
        return self._anchors

    @property
    def experts(self) -> str | None:
        return self._experts

    def saver(self, path: str) -> str:
        # Tiles save the input of their first linear layer.
        return _ANCHORS["fc1"] if self._tiled and path == TILED else path

    @property
    def token_blocks(self) -> int:
        return self._blocks

    @property
    def has_dropout(self) -> bool:
        config = self._module.config
        return bool(self._module.training and (self._module.hidden_dropout > 0 or config.attention_dropout > 0))

    @property
    def can_replay(self) -> bool:
        return not compat.uses_low_precision(self._module.config)  # FP8 keeps a history of every tensor's largest value

    def only_whole(self, args: Args, kwargs: Kwargs) -> str | None:
        if self.has_dropout:
            return "dropout draws its random numbers for all tokens at once"
        if self._named(args, kwargs).get("packed_seq_params") is not None:
            return "packed sequences number their tokens from the start of each sequence"
        return None

    def must_stay(self, tensor: Tensor) -> bool:
        return transformer_engine.must_stay(tensor)

    def take_apart(self, tensor: Tensor) -> tuple[list[Tensor | None], PutTogether] | None:
        return transformer_engine.take_apart(tensor)

    def parameter_storages(self) -> frozenset[int]:
        module = self._module
        plain = [t for t in (*module.parameters(), *module.buffers()) if not transformer_engine.is_quantized(t)]
        buffers = transformer_engine.weight_buffers(module)
        return frozenset(t.untyped_storage().data_ptr() for t in (*plain, *buffers))

    def hidden(self, args: Args, kwargs: Kwargs) -> Tensor:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return hidden

    def without_hidden(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        named = self._named(args, kwargs)
        del named["hidden_states"]
        return (), named

    def cut(self, args: Args, kwargs: Kwargs, hidden: Tensor, start: int, stop: int) -> tuple[Args, Kwargs]:
        named = self._named(args, kwargs)
        named["hidden_states"] = hidden
        rotary = named.get("rotary_pos_emb")
        if isinstance(rotary, tuple):
            named["rotary_pos_emb"] = tuple(self._cut_rotary(part, start, stop) for part in rotary)
        elif rotary is not None:
            named["rotary_pos_emb"] = self._cut_rotary(rotary, start, stop)
        return (), named

    def output(self, result: Any) -> Tensor:
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def random_state(self) -> Any:
        return compat.random_state()

    def set_random_state(self, state: Any) -> None:
        compat.set_random_state(state)

    @contextmanager
    def replaying(self) -> Iterator[None]:
        with compat.balanced_ranges(), nullcontext() if self._around is None else self._around(self._module):
            yield

    def _named(self, args: Args, kwargs: Kwargs) -> Kwargs:
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def _cut_rotary(self, rotary: Tensor, start: int, stop: int) -> Tensor:
        """Rotary angles [tokens of all blocks, 1, 1, d] of a token range."""
        per_block = rotary.shape[0] // self._blocks
        if stop > per_block:
            raise UnsupportedError(
                f"layer {self.number}: rotary embedding for {rotary.shape[0]} positions does not cover "
                f"{self._blocks} x {stop} tokens"
            )
        if start == 0 and stop == per_block:
            return rotary
        return torch.unflatten(rotary, 0, (self._blocks, per_block))[:, start:stop].flatten(0, 1)


def _token_blocks(config: Any) -> int:
    return int(config.tensor_model_parallel_size) if config.sequence_parallel else 1


def _arguments(layer: Any) -> list[str]:
    """Names of what the layer's forward takes, in order; it passes everything on to this."""
    return list(inspect.signature(layer._forward_attention).parameters)


def _parts(layer: Module, closed: str | None) -> Iterator[tuple[str, Module]]:
    """The submodules worth watching: two levels of them, and nothing inside the one that is closed."""
    for path, module in layer.named_modules():
        inside = closed is not None and path.startswith(closed + ".")
        if path and path.count(".") < _DEPTH and not inside and not _is_identity(module):
            yield path, module


def _is_identity(module: Module) -> bool:
    return type(module).__name__ in ("IdentityOp", "IdentityFuncOp")


class UnpatchedForward:
    """A layer's unpatched forward: not a bound method, so that whoever holds it for a replay can be told apart."""

    __slots__ = ("forward", "layer")

    def __init__(self, forward: Callable[..., Any], layer: Module) -> None:
        self.forward, self.layer = forward, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(self.layer, *args, **kwargs)
