"""Which kernels compute a transformer layer, as far as they differ in what they keep for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

DEVICES = ("cuda", "cpu")
ATTENTIONS = ("flash", "unfused")
NORMS = ("fused", "composed")


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Defaults are Transformer Engine's on a GPU.

    device:     whose PyTorch kernels run. On a CPU a dropout mask has its tensor's own type, dropout inside flash
                attention has no kernel, and LayerNorm's two numbers a token have their input's type
    attention:  `flash`, or `unfused`: the scores of all pairs of tokens are written out (Megatron-Core's
                DotProductAttention, Transformer Engine's UnfusedDotProductAttention)
    fused_softmax:     unfused attention has a kernel for scale, mask and softmax, where it takes the shape
    softmax_fp32:      without it, softmax is computed in fp32 rather than in the scores' own type
    mask:       without it, too, a mask of one byte a pair of tokens is kept where it comes with the data; all layers
                share it. One that ranks make for themselves is made once
    norm:       `fused` keeps its input and a number a token or two; `composed` is PyTorch's RMSNorm on a CPU, which
                keeps its input and the normalised input in fp32
    fused_activation:  SwiGLU is one kernel and keeps its input alone
    fused_rope:        rotary positions are one kernel and keep nothing of their own
    """

    device: str = "cuda"
    attention: str = "flash"
    fused_softmax: bool = True
    softmax_fp32: bool = False
    mask: bool = False
    norm: str = "fused"
    fused_activation: bool = True
    fused_rope: bool = True

    @classmethod
    def of_spec(cls, spec: str) -> Kernels:
        """Megatron-Core's as they are unless told otherwise, on a GPU; `spec` is one of `ir.job.SPECS`."""
        return cls(attention="unfused", mask=True) if spec == "local" else cls()

    def __post_init__(self) -> None:
        for name, known in (("device", DEVICES), ("attention", ATTENTIONS), ("norm", NORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(known)}")

    @property
    def is_unfused(self) -> bool:
        """Whether attention writes its scores out."""
        return self.attention == "unfused"

    @property
    def is_cpu(self) -> bool:
        """Whether PyTorch's CPU kernels run."""
        return self.device == "cpu"
