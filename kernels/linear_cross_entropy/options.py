"""What loss is meant, and what of a token the passes keep for it.

**Statistics.** For every token a pass over the vocabulary keeps a few fp32 numbers, packed as `statistics_NT`; the
names of the N rows are `LossOptions.rows`. With l the logits of one token after scale and softcap:

    maximum    m = max l            as in the online softmax (Milakov and Gimelshein, arXiv 1805.02867)
    sum        s = sum exp(l - m)
    label      the logit of the token's label, 0 where this shard does not hold it
    total      sum l                with label smoothing
    weighted   sum exp(l - m) (l - m)    with entropy: H = log s - weighted / s
    arg_max    vocabulary id of m   with arg-max; exact in fp32 up to 2^24 rows

That is 12 bytes a token, 16 with label smoothing; entropy and arg-max cost 4 more each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

LARGEST_EXACT_ID = 1 << 24  # above it fp32 has no odd integers


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Which loss, over which vocabulary. With z = hidden @ weight.T, l = cap(logit_scale * z), lse = logsumexp(l):

        loss = (1 - label_smoothing) (lse - l[label]) + label_smoothing (lse - mean l) + z_loss lse^2

    * `vocab_size`: real rows of the whole vocabulary. Rows from there on are padding: they take no part in the softmax
      and get no gradient. Megatron-Core itself counts its padding as vocabulary; to reproduce its loss, pass the padded
      size.
    * `ignore_index`: tokens with this label have loss, log-probability and entropy 0 and no gradient; it may be a word
      (the padding token, say). None: all tokens count.
    * `label_smoothing`: in [0, 1), over the global vocabulary at every layout, as `torch.nn.functional.cross_entropy`.
      Megatron-Core's formula puts the mass on the other V - 1 words: it is this one with V / (V - 1) times the value.
    * `z_loss`: factor of lse^2 (PaLM, arXiv 2204.02311, section 5).
    * `softcap`: cap(x) = softcap * tanh(x / softcap) (Gemma 2, arXiv 2408.00118, section 2); None: none.
    * `logit_scale`: factor before the cap (muP's output multiplier, arXiv 2203.03466).
    * `fp32_logits`: 16-bit GEMMs write fp32 logits, for vocabularies where the rounding of the logits shows.
    * `entropy`, `arg_max`: compute these outputs too.

    Raises ValueError, naming the option, for a value out of range.
    """

    vocab_size: int
    ignore_index: int | None = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    fp32_logits: bool = False
    entropy: bool = False
    arg_max: bool = False

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}; a vocabulary has at least one word")
        if self.arg_max and self.vocab_size > LARGEST_EXACT_ID:
            raise ValueError(
                f"arg_max counts in fp32 and needs vocab_size <= {LARGEST_EXACT_ID}, not {self.vocab_size}"
            )
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing lies in [0, 1), not {self.label_smoothing}")
        if not self.z_loss >= 0.0:
            raise ValueError(f"z_loss is not negative, but it is {self.z_loss}")
        if self.softcap is not None and not self.softcap > 0.0:
            raise ValueError(f"softcap is positive, or None for no cap; not {self.softcap}")
        if self.logit_scale == 0.0:
            raise ValueError("logit_scale is 0: every logit would be the same")

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows of `statistics_NT`, in order."""
        wanted = {"total": self.label_smoothing > 0.0, "weighted": self.entropy, "arg_max": self.arg_max}
        return ("maximum", "sum", "label", *(name for name, is_wanted in wanted.items() if is_wanted))

    @property
    def coefficients(self) -> tuple[str, ...]:
        """Names of the rows of `coefficients_MT` (`passes.gradient_coefficients`), in order."""
        wanted = {"uniform": self.label_smoothing > 0.0, "entropy": self.entropy}
        return ("maximum", "softmax", "label", *(name for name, is_wanted in wanted.items() if is_wanted))

    def num_valid(self, first_row: int, num_rows: int) -> int:
        """How many of a shard's rows are vocabulary; the rest, at its end, is padding."""
        return min(max(self.vocab_size - first_row, 0), num_rows)


class TokenOutputs(NamedTuple):
    """What is known of each token, fp32, in the shape of the labels.

    `loss` is not reduced. `log_probability` is of the label, without smoothing and z-loss. `entropy` is of the softmax
    in nats; `arg_max` holds the word with the largest logit, int64, the lowest if several have it; both None unless
    asked for. All but `arg_max` are differentiable.
    """

    loss: torch.Tensor
    log_probability: torch.Tensor
    entropy: torch.Tensor | None
    arg_max: torch.Tensor | None
