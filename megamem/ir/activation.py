"""What happens to the activations of a transformer layer between its forward and its backward pass.

A layer saves tensors for its backward pass. megamem speaks of them by these names (`Tensors`):

    layer_input        [s, b, h]   input of the layer
    attention_output   [s, b, q]   output of core attention; the only tensor whose recomputation costs O(s) a byte
    qkv                [s, b, q+2kv]  output of the linear layer that makes query, key and value
    projection         [s, b, h]   output of the linear layer behind attention
    fc1                [s, b, f]   output of the first linear layer of the MLP (gate and up together)
    saved              everything else that autograd saves: norm outputs, query, key, value, activation output ...
    experts            whatever the expert part of an MoE layer saves; only as a whole

The first two are the *base*: with them every other tensor can be rebuilt without running attention again.
`qkv`, `projection` and `fc1` are *anchors*: module outputs which, where stored, save the replay their GEMM,
so that only element-wise operations are left to run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Literal

Tier = Literal["hbm", "host"]
Codec = Literal["none", "fp8"]

BASE = ("layer_input", "attention_output")
ANCHORS = ("qkv", "projection", "fc1")
SAVED = "saved"
EXPERTS = "experts"
TENSORS: tuple[str, ...] = (*BASE, *ANCHORS, SAVED, EXPERTS)

_FATE = re.compile(r"^(?P<fraction>[0-9.eE+-]+)(?:@(?P<tier>hbm|host))?$")
_CODECS: tuple[Codec, ...] = ("none", "fp8")
_WORDS: dict[str, tuple[float, Tier]] = {"keep": (1.0, "hbm"), "swap": (1.0, "host"), "recompute": (0.0, "host")}


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What becomes of one named tensor: the first `fraction` of its tokens is stored in `tier`, the rest is recomputed.

    `codec` is how it travels to host memory and lies there: as it is, or in FP8; None: as `activations.compress` says.

    Text form, both ways: `keep` (all, in device memory), `swap` (all, in host memory), `recompute` (nothing),
    `0.5` or `0.5@host`, `0.25@hbm`; the codec behind a slash, `swap/fp8`, `0.5@host/none`.
    """

    fraction: float
    tier: Tier = "host"
    codec: Codec | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.fraction <= 1.0:
            raise ValueError(f"a fraction lies between 0 and 1, not {self.fraction}")
        if self.tier not in ("hbm", "host"):
            raise ValueError(f"tier is hbm or host, not {self.tier!r}")
        if self.codec not in (None, *_CODECS):
            raise ValueError(f"a codec is none or fp8, not {self.codec!r}")
        if self.codec == "fp8" and (self.tier != "host" or self.fraction == 0):
            raise ValueError("only what is swapped to host memory is compressed on the way")

    @classmethod
    def parse(cls, text: str | float) -> Fate:
        """Read the text form. Raises ValueError, naming the text, when it is none."""
        words, slash, ending = str(text).strip().partition("/")
        codec = next((known for known in _CODECS if known == ending), None)
        if slash and codec is None:
            raise ValueError(f"{text!r}: behind the slash stands none or fp8")
        if words in _WORDS:
            fraction, tier = _WORDS[words]
            return cls(fraction=fraction, tier=tier, codec=codec)
        match = _FATE.match(words)
        try:
            value = float(match["fraction"]) if match else None
        except ValueError:
            value = None
        if match is None or value is None:
            raise ValueError(f"{words!r} is none of keep, swap, recompute, or a fraction such as 0.5 or 0.5@hbm")
        return cls(fraction=value, tier="hbm" if match["tier"] == "hbm" else "host", codec=codec)

    def __str__(self) -> str:
        words = next((word for word, value in _WORDS.items() if (self.fraction, self.tier) == value), None)
        if words is None:
            words = f"{self.fraction:g}" + ("" if self.tier == "host" else "@hbm")
        return words if self.codec is None else f"{words}/{self.codec}"

    @property
    def is_partial(self) -> bool:
        """Whether some tokens are stored and others are not."""
        return 0.0 < self.fraction < 1.0

    def num_tokens(self, total: int) -> int:
        """How many of `total` tokens are stored; rounded down, but exact for 0 and 1."""
        return _share(self.fraction, total)


@cache
def _share(fraction: float, total: int) -> int:
    return int(Fraction(fraction).limit_denominator(1 << 20) * total)


KEEP = Fate(fraction=1.0, tier="hbm")
SWAP = Fate(fraction=1.0, tier="host")
RECOMPUTE = Fate(fraction=0.0)


@dataclass(frozen=True, kw_only=True)
class LayerRule:
    """The fates of one layer's tensors.

    `untouched` layers are left to autograd: everything stays where it was saved, at no cost.
    `fates` holds an entry for every name of `TENSORS`; further keys are module paths inside the layer
    (`mlp.linear_fc2`), which refine `saved` for the tensors that this module saves.
    `store_input` is False where the layer's input is rebuilt from the layer before (sparse residuals).
    """

    untouched: bool = False
    fates: Mapping[str, Fate] = field(default_factory=dict)
    store_input: bool = True

    def __post_init__(self) -> None:
        missing = [name for name in TENSORS if name not in self.fates]
        if missing and not self.untouched:
            raise ValueError(f"a layer rule needs a fate for {', '.join(missing)}")

    def fate_of(self, module_path: str) -> Fate:
        """The fate of a tensor saved by the module at `module_path`: the longest key that is a prefix of it."""
        parts = module_path.split(".")
        for length in range(len(parts), 0, -1):
            fate = self.fates.get(".".join(parts[:length]))
            if fate is not None:
                return fate
        return self.fates[SAVED]

    @property
    def is_partial(self) -> bool:
        """Whether any tensor is stored for some tokens and recomputed for others."""
        return not self.untouched and any(fate.is_partial for fate in self.fates.values())

    @property
    def recomputes(self) -> bool:
        """Whether anything is recomputed. Anchors say nothing of it: they are stored to make recomputation cheap."""
        saved = [fate for name, fate in self.fates.items() if name == SAVED or name not in TENSORS]
        return not self.untouched and (not self.store_input or any(fate.fraction < 1 for fate in saved))


@dataclass(frozen=True, kw_only=True)
class ActivationPlan:
    """One rule per layer of the model; `rules[i]` is for the layer with Megatron's `layer_number` i + 1.

    experts_again:  the experts of all layers are recomputed, by Megatron's own checkpoint around them
    """

    rules: tuple[LayerRule, ...]
    experts_again: bool = False

    def rule(self, layer_number: int) -> LayerRule:
        """The rule of a layer, by Megatron's 1-based global number; layers past the end use the last rule."""
        return self.rules[min(layer_number, len(self.rules)) - 1]
