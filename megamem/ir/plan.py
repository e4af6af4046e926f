"""A plan: what it was made for, and what it predicts. In a file it stands beside the settings that it explains.

    megamem:
      activations: {...}      the settings: the ordinary sections of a configuration, with no `auto` left
      schedule: {...}
      vocabulary: {...}
      made_for: {...}         `MadeFor`: the model, layout and versions without which the settings mean nothing
      predicted: {...}        `Prediction`: memory, time, reasons, and what else was considered

`megamem plan` writes such a file, `load_config` reads it (`Config.plan` holds the two parts here), and every trainer
runs it like any other configuration. The settings may be edited by hand; `MadeFor.settings` tells whether they were,
and then the predictions are of something else (`Plan.predicts`).

Sizes are bytes, times seconds, shares 0..1 everywhere, in this module and in the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from megamem.ir.job import Job
from megamem.ir.model import differences
from megamem.ir.pipeline_split import Split, layout_text
from megamem.ir.record import RecordError, from_plain, to_plain
from megamem.ir.schedule import Action, Kind, TimedAction

PARTS = ("made_for", "predicted")
"""The keys of a configuration file that hold a plan."""

MEMORY_KINDS = (
    "weights",
    "gradients",
    "optimizer",
    "kept",
    "at_work",
    "staging",
    "weight_gradients",
    "output_layer",
    "transients",
    "buffers",
    "fragmentation",
    "context",
)
"""What device memory is for, at the moment of a rank's peak:

weights           parameters, in the training dtype
gradients         the main gradients that Megatron's DDP accumulates into
optimizer         fp32 copies of the weights and Adam's two moments, this rank's share
kept              what layers saved for backward passes that have not begun
at_work           the layer whose backward pass runs: everything it saved, back or rebuilt
staging           sources of copies to host memory that are under way, and what has come back ahead of time
weight_gradients  inputs and output gradients of linear layers between B and W, where a schedule divides the two
output_layer      logits and loss: the logits, or the statistics and chunk that replace them
transients        the most that one layer's forward or backward pass has besides what it saves
buffers           receive buffers of the pipeline, gathered weights or gradients, embeddings under way
fragmentation     what the allocator cannot use: the difference of reserved and allocated, or the arena's gap
context           the CUDA context and the communicators
"""

TIME_KINDS = (
    "gemm",
    "attention",
    "elementwise",
    "output_layer",
    "recompute",
    "exposed_copies",
    "tensor_parallel",
    "context_parallel",
    "expert_parallel",
    "bubble",
    "data_parallel",
    "optimizer",
)
"""What the time of a step goes into, on the pipeline rank that computes longest; they add up to the step:

gemm              matrix products of the layers, forward and both gradients, once
attention         attention, forward and backward, once
elementwise       norms, activations, residuals, and what else reads and writes memory
output_layer      embedding, logits and loss
recompute         whatever is computed a second time
exposed_copies    waits for copies to or from host memory
tensor_parallel   all-gathers and reduce-scatters of tensor parallelism that nothing hides
context_parallel  exchange of keys and values that attention does not hide
expert_parallel   exchange of tokens between experts
bubble            waits for other pipeline ranks, their messages included
data_parallel     gradient reduction and weight gathering that nothing hides
optimizer         the optimizer's own step
"""


@dataclass(frozen=True, kw_only=True)
class MadeFor:
    """What a plan was made for.

    job:            model, layout, sequence length and batch
    megamem:        version of megamem, to be met exactly
    megatron_core:  release of Megatron-Core, of which major and minor number are to be met; empty: any
    hardware:       name of the GPU's row in the hardware table, or the path of the measured profile
    settings:       digest of the settings that the predictions are about
    """

    job: Job
    megamem: str
    megatron_core: str = ""
    hardware: str = ""
    settings: str = ""

    def version_problems(self, megamem: str, megatron_core: str | None) -> list[str]:
        """Why installed versions (Megatron-Core None: not installed) cannot run the plan; one sentence each."""
        problems = []
        if megamem != self.megamem:
            problems.append(f"made_for.megamem: the plan is of megamem {self.megamem}, this is {megamem}; {_AGAIN}")
        if megatron_core is not None and self.megatron_core and _series(megatron_core) != _series(self.megatron_core):
            problems.append(
                f"made_for.megatron_core: the plan is for Megatron-Core {_series(self.megatron_core)}, "
                f"{megatron_core} is installed; {_AGAIN}"
            )
        return problems

    def layout_problems(self, found: Mapping[str, int]) -> list[str]:
        """Why ranks laid out as `found` cannot run it: any of `world_size` and the fields of `Layout`."""
        planned = {**vars(self.job.layout), "world_size": self.job.layout.world_size}
        return [f"made_for.layout: {text}; {_AGAIN}" for text in differences(planned, found)]

    def split_problems(self, found: Split) -> list[str]:
        """Why a model whose layers are divided so among the stages cannot run it."""
        job = self.job
        if found == job.layout.split:
            return []
        words = [
            layout_text(split, job.model.mtp_num_layers) if split else "evenly" for split in (found, job.layout.split)
        ]
        return [
            f"made_for.layout.split: the layers are divided {words[0]}, in the plan {words[1]} "
            f"(pipeline_model_parallel_layout); {_AGAIN}"
        ]

    def model_problems(self, found: Mapping[str, Any]) -> list[str]:
        """Why a model of these sizes, any of `Model.sizes`, cannot run it."""
        return [f"made_for.model: {text}; {_AGAIN}" for text in differences(self.job.model.sizes(), found)]


_AGAIN = "make the plan again with megamem plan, or remove made_for and predicted to use its settings as they are"


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Device memory of one pipeline rank; the ranks that share its stages over other dimensions are all alike.

    kinds:     bytes at the moment of the peak, by `MEMORY_KINDS`; what is not named is 0
    limit:     bytes that the device has for training
    host:      the most pinned host memory
    timeline:  activation memory (kept + at_work + staging + weight_gradients + output_layer) over one step, as text:
               `seconds:bytes` pairs, each holding until the next; `curve` reads it
    """

    rank: int
    kinds: Mapping[str, int] = field(default_factory=dict)
    limit: int = 0
    host: int = 0
    timeline: str = ""

    @property
    def peak(self) -> int:
        """All kinds together."""
        return sum(self.kinds.values())

    def curve(self) -> list[tuple[float, int]]:
        """The timeline as (seconds, bytes from then on)."""
        pairs = (pair.partition(":") for pair in self.timeline.split())
        return [(float(time), int(nbytes)) for time, _, nbytes in pairs]


def timeline_text(curve: Iterable[tuple[float, float]]) -> str:
    """The text form of `RankMemory.timeline`, with what does not change left out."""
    words, last = [], None
    for time, nbytes in curve:
        if (amount := round(nbytes)) != last:
            words.append(f"{time:.6g}:{amount}")
            last = amount
    return " ".join(words)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one rank, the busiest, copies in a step.

    to_host, from_host:  bytes
    link_seconds:        how long the busier direction of its link works
    exposed_seconds:     of which computing waits
    """

    to_host: int = 0
    from_host: int = 0
    link_seconds: float = 0.0
    exposed_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Utilization:
    """Model FLOPs utilization. `formula` says what is counted; `model_flops` are those of one step on all ranks."""

    mfu: float
    formula: str
    model_flops: float
    peak_flops_per_gpu: float


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One row of the table of reasons: what becomes of one tensor in some layers, or the value of one option.

    subject:   the tensor (a name of `ir.activation.TENSORS`) or the option (`schedule.name`)
    layers:    which layers, as in the rows of `activations.table`; empty for options
    fate:      keep, swap or recompute for tensors, the value for options
    fraction:  share of the tokens with this fate
    nbytes:    of this share, of one layer and microbatch on one rank
    seconds:   that recomputing it would take (keep, swap) or takes (recompute), per layer and microbatch
    hidden:    swap: whether the copies are hidden behind computation; true where there is nothing to hide
    reason:    one sentence
    """

    subject: str
    fate: str
    reason: str
    layers: str = ""
    fraction: float = 1.0
    nbytes: int = 0
    seconds: float = 0.0
    hidden: bool = True


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another plan that was priced.

    name:          what is different, in a few words
    settings:      the options that differ from the chosen plan's (`schedule.name`, `layout.tensor`, ...)
    step_seconds, peak_memory, host_memory:  of the fullest rank
    fits:          whether memory suffices
    verdict:       why it is not the plan, and by how much
    """

    name: str
    step_seconds: float
    peak_memory: int
    fits: bool
    verdict: str
    host_memory: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a plan is expected to need and to take.

    step_seconds:  one training step, optimizer included
    time:          its parts by `TIME_KINDS`, on the pipeline rank that computes longest
    memory:        one entry per pipeline rank, in order
    traffic:       of the rank that copies most
    utilization:   MFU and how it is counted
    tokens_per_second_per_gpu:  throughput
    decisions:     the table of reasons
    alternatives:  what lost, the best first
    front:         the Pareto front of peak device memory against step time, by rising memory; the plan is on it
    hardware:      where its numbers come from: the table's sources, or the measured profile
    pipeline:      per pipeline rank, its actions in time, as text: `F0@0-1.25` (kind and microbatch, with `.c` for a
                   chunk above 0, start and end in seconds), as the report draws them; empty where there are too many
    notes:         what the prediction leaves out or takes for granted, one sentence each
    """

    step_seconds: float
    utilization: Utilization
    tokens_per_second_per_gpu: float = 0.0
    time: Mapping[str, float] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    memory: tuple[RankMemory, ...] = ()
    decisions: tuple[Decision, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    front: tuple[Alternative, ...] = ()
    hardware: str = ""
    notes: tuple[str, ...] = ()
    pipeline: tuple[str, ...] = ()

    @property
    def peak_memory(self) -> int:
        """Device memory of the fullest rank."""
        return max((rank.peak for rank in self.memory), default=0)

    def timeline(self) -> list[TimedAction]:
        """The actions of `pipeline`, rank by rank. Raises ValueError that names a word that is no action."""
        return [
            TimedAction(rank, Action(cast(Kind, span.kind), span.chunk, span.microbatch), span.start, span.end)
            for rank, line in enumerate(self.pipeline)
            for span in parse_spans(line)
        ]

    def activation_peak(self, rank: int) -> int:
        """Bytes that layers of pipeline rank `rank` hold for their backward passes at most: what a meter measures."""
        kinds = self.memory[rank].kinds
        return sum(kinds.get(kind, 0) for kind in ("kept", "at_work", "staging", "weight_gradients"))


_SPAN = re.compile(
    r"^(?P<kind>[A-Z]+)(?P<microbatch>\d+)(?:\.(?P<chunk>\d+))?@(?P<start>[0-9.e+-]+)-(?P<end>[0-9.e+]+)$"
)


@dataclass(frozen=True, kw_only=True)
class Span:
    """One action of `Prediction.pipeline`."""

    kind: str
    microbatch: int
    chunk: int
    start: float
    end: float

    def __str__(self) -> str:
        chunk = f".{self.chunk}" if self.chunk else ""
        return f"{self.kind}{self.microbatch}{chunk}@{self.start:.6g}-{self.end:.6g}"


def parse_spans(text: str) -> list[Span]:
    """The actions of one rank. Raises ValueError that names the word that is none."""
    spans = []
    for word in text.split():
        match = _SPAN.match(word)
        if match is None:
            raise ValueError(f"{word!r} is no action such as F0@0-1.25 or F3.1@2-4")
        spans.append(
            Span(
                kind=match["kind"],
                microbatch=int(match["microbatch"]),
                chunk=int(match["chunk"] or 0),
                start=float(match["start"]),
                end=float(match["end"]),
            )
        )
    return spans


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a configuration was made for, and what it is expected to do; see the module's text."""

    made_for: MadeFor
    predicted: Prediction | None = None

    def predicts(self, settings: Mapping[str, object]) -> bool:
        """Whether the predictions are about these settings (`Config.to_dict` without the plan)."""
        return self.predicted is not None and digest(settings) == self.made_for.settings

    def to_dict(self) -> dict[str, Any]:
        """The two keys beside the sections, as plain values."""
        return {name: to_plain(part) for name in PARTS if (part := getattr(self, name)) is not None}


def parse_plan(content: Mapping[str, Any]) -> Plan:
    """Read what `Plan.to_dict` writes. Raises RecordError with every fault and its place."""
    if "made_for" not in content:
        raise RecordError([("predicted", "stands alone; a plan has made_for beside it, or neither")])
    return from_plain(Plan, content)


def digest(settings: Mapping[str, object]) -> str:
    """Twelve characters that change when any setting does."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _series(version: str) -> str:
    """`0.16` of `0.16.1`."""
    return ".".join(version.split(".")[:2])
