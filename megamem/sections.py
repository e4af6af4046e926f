"""The sections of the configuration: each option declared once, in the dataclass that owns it.

`megamem.config` makes of these declarations the loader, the flags, `--help`, the docs table and the JSON Schema. A
capability that does not exist yet has no section: what cannot be done cannot be asked for.

The first option of a section is its *key*: it switches the section on, and decides which of the others are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megamem.errors import ConfigError
from megamem.ir.activation import TENSORS
from megamem.options import (
    Auto,
    Bytes,
    Choice,
    Count,
    Duration,
    File,
    Limit,
    Share,
    Switch,
    option,
    options_of,
    parse_values,
)
from megamem.table import Table, TableRow

OFF = ("off", "false")


class Section:
    """What every section of the configuration has. Sections are dataclasses whose fields are all options.

    KEY:      the first option, one of several words or a switch; `off` or `false` switches the section off
    SWITCHES: further options that switch the section on, whatever the key is
    READERS:  for options that only some values of the key read, these values; `off` and `false` read none
    """

    NAME: ClassVar[str]
    KEY: ClassVar[str]
    SWITCHES: ClassVar[tuple[str, ...]] = ()
    READERS: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # (key, option, value) that say what is so anyway
    HARMLESS: ClassVar[tuple[tuple[str, str, object], ...]] = ()

    def __post_init__(self) -> None:
        """Check every field of a section made in Python by the parser that reads files."""
        items = options_of(type(self))
        values, problems = parse_values(items, {item.name: getattr(self, item.name) for item in items}, self.NAME)
        changed = [item.name for item in items if values.get(item.name, item.default) != item.default]
        problems += self.contradictions(values, changed)
        if problems:
            raise ConfigError(problems)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def key(self) -> str:
        """The value of the option that decides which others are read."""
        return word(getattr(self, self.KEY))

    @property
    def is_on(self) -> bool:
        """Whether this capability does anything."""
        return not self.is_off({name: getattr(self, name) for name in self.switches()})

    @classmethod
    def switches(cls) -> tuple[str, ...]:
        """The options that switch the section on."""
        return (cls.KEY, *cls.SWITCHES)

    @classmethod
    def is_off(cls, values: Mapping[str, object]) -> bool:
        """Whether these values of options, typed or as text, switch the section off; those that are missing are off."""
        return all(word(values.get(name, "off")) in OFF for name in cls.switches())

    def given(self) -> dict[str, object]:
        """The options that differ from their defaults, as plain values."""
        return {
            item.name: item.kind.plain(getattr(self, item.name))
            for item in options_of(type(self))
            if getattr(self, item.name) != item.default
        }

    def to_dict(self) -> dict[str, object]:
        """Every option that the key's value reads, as plain values; the others would be contradictions in a file."""
        return {
            item.name: item.kind.plain(getattr(self, item.name))
            for item in options_of(type(self))
            if self.reads(item.name, self.key)
        }

    @classmethod
    def readers(cls, name: str) -> tuple[str, ...]:
        """The values of the key under which the option `name` has an effect."""
        key = options_of(cls)[0].kind
        words = key.words if isinstance(key, Choice) else ("true",)
        return cls.READERS.get(name, tuple(word for word in words if word not in OFF))

    @classmethod
    def reads(cls, name: str, key: str) -> bool:
        """Whether the option `name` has an effect when the section's key is `key`."""
        return name == cls.KEY or (key not in OFF and key in cls.readers(name))

    @classmethod
    def contradictions(cls, values: Mapping[str, Any], given: Iterable[str]) -> list[str]:
        """What does not go together among the `given` options; `values` holds those that are valid by themselves."""
        if values.get(cls.KEY) is None:  # its own problem is reported already
            return []
        key = word(values[cls.KEY])
        return [
            f"{cls.NAME}.{name}: has no effect with {cls.KEY} {key!r}; "
            f"set {cls.NAME}.{cls.KEY} to one of {', '.join(cls.readers(name))}, or remove {name}"
            for name in given
            if not cls.reads(name, key) and (key, name, values[name]) not in cls.HARMLESS
        ]


@dataclass(frozen=True, kw_only=True)
class Activations(Section):
    """Token-wise swap and recompute of what transformer layers save for their backward pass."""

    NAME: ClassVar[str] = "activations"
    KEY: ClassVar[str] = "policy"
    READERS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "swap_fraction": ("memo", "ordered"),
        "residual_every": ("recompute", "memo", "ordered"),
        "keep_last_layers": ("memo", "ordered"),
        "compress": ("memo", "ordered", "auto"),
        "experts": ("recompute", "memo", "ordered"),
        "table": ("recompute", "memo", "ordered"),
    }
    HARMLESS: ClassVar[tuple[tuple[str, str, object], ...]] = (
        ("recompute", "keep_last_layers", 0),
        ("recompute", "compress", "none"),
    )

    policy: Literal["off", "recompute", "memo", "ordered", "auto"] = option(
        Choice(("off", "recompute", "memo", "ordered", "auto")),
        "off",
        "recompute: keep layer input and attention output in device memory and rebuild the rest, without running "
        "attention again. memo: swap both to host memory, and swap_fraction of the tokens of every other tensor; the "
        "last layers are kept (MEMO, arXiv 2407.12117). ordered: swap both, and swap_fraction of the outputs of the "
        "linear layers (qkv, projection, fc1); outputs of element-wise operations are always rebuilt. auto: the "
        "planner decides for this job, tensor by tensor; off where everything fits.",
    )
    swap_fraction: float | Literal["auto"] = option(
        Auto(Share()),
        1.0,
        "Share of the tokens that is swapped to host memory; the rest is recomputed. At 1 memo recomputes nothing. "
        "auto: the largest whose copies hide behind computing and fit into host memory, MEMO's own rule.",
    )
    residual_every: int = option(
        Count(least=1),
        1,
        "Store the layer input of every k-th layer only; the others are rebuilt from stored attention outputs.",
    )
    keep_last_layers: int = option(
        Count(),
        2,
        "Leave this many layers at the end of the model untouched: their backward pass follows at once.",
    )
    host_memory: int | Literal["auto"] = option(
        Bytes(),
        "auto",
        "Pinned host memory per rank. auto: half of what is available to the process, divided by the ranks on this "
        "machine. What does not fit is recomputed instead.",
    )
    compress: Literal["none", "fp8"] = option(
        Choice(("none", "fp8")),
        "none",
        "fp8: the inputs of the linear layers qkv, fc1 and fc2, and what the MLP's activation function is given, go "
        "to host memory in 8.25 bits a number (E4M3, a scale for 128). The table can ask it of others too (swap/fp8), "
        "or spare these (swap/none). Query and key are never compressed.",
    )
    experts: Literal["keep", "swap", "recompute"] = option(
        Choice(("keep", "swap", "recompute")),
        "keep",
        "What becomes of the tensors that the expert part of an MoE layer saves; always of all of them.",
    )
    table: tuple[TableRow, ...] = option(
        Table(),
        (),
        'Explicit fates, a list of rows such as {layers: "1-4", fc1: 0.5, qkv: keep, mlp.linear_fc2: recompute}; later '
        f"rows win. Tensors: {', '.join(TENSORS)}, or the path of a module inside the layer. Fates: keep (device "
        "memory), swap (host memory), recompute, or the stored share of tokens with its tier: 0.5@host, 0.25@hbm. "
        "What is swapped can be compressed: swap/fp8, 0.5/fp8.",
    )
    verify: bool = option(
        Switch(),
        True,
        "In the first step compare every layer's replay with what was really saved, and stop if they differ.",
    )


SCHEDULES = (
    *("1f1b", "interleaved", "zb-h1", "zb-h2", "zb-1p", "zb-2p", "gis", "gis-h", "po-h", "po-f"),
    *("zb-v", "v-half", "v-min", "v-adaptive", "1f1b-v", "dualpipe-v"),
)
"""The pipeline schedules that a training job can ask for by name; `megamem simulate` knows more."""

_ON_TEXT = (*SCHEDULES, "auto", "file")


@dataclass(frozen=True, kw_only=True)
class Scheduling(Section):
    """Pipeline schedules with controllable memory, in place of Megatron's own."""

    NAME: ClassVar[str] = "schedule"
    KEY: ClassVar[str] = "name"
    READERS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "group": ("interleaved", "gis"),
        "chunks": (*SCHEDULES, "auto"),
        "file": ("file",),
    }

    name: str = option(
        Choice(("off", *_ON_TEXT)),
        "off",
        "1f1b and interleaved: Megatron's own orders. zb-h1, zb-h2, zb-1p, zb-2p: input and weight gradients apart, "
        "less bubble at equal or more memory (arXiv 2401.10241). gis, gis-h: the same on Megatron's interleaved layer "
        "placement, at the memory of 1F1B and at little more than half of it; po-h, po-f: half of the chunks, or all, "
        "wait in host memory between F and B, whole unless the activations section says how (2503.01328). zb-v, "
        "v-half, v-min, v-adaptive, 1f1b-v, dualpipe-v: V placement, two chunks per rank (2405.15362). auto: the "
        "fastest that megamem can find within memory_limit. file: an order of your own.",
    )
    chunks: int | Literal["auto"] = option(
        Auto(Count(least=1)),
        "auto",
        "Model chunks per pipeline rank, Megatron's virtual pipeline size. auto: as many as the model has, or else the "
        "fewest that the schedule works with.",
    )
    group: int | Literal["auto"] = option(
        Auto(Count(least=1)),
        "auto",
        "Microbatches that go through a chunk before the next chunk's turn. Fewer need less memory: half the pipeline "
        "ranks, rounded up, is the least for gis. auto: as many as there are pipeline ranks.",
    )
    memory_limit: float | int | Literal["auto"] = option(
        Limit(),
        "auto",
        "Activation memory that no pipeline rank may exceed: in bytes, with a unit, where costs are given in bytes; "
        "else a number, in activations of one microbatch on one rank (1F1B needs as many as there are ranks). "
        "auto: no limit for auto, the published limit for zb-1p, zb-2p and zb-v.",
    )
    costs: str | Literal["none"] = option(
        File(),
        "none",
        "Times and bytes of the stages or layers, as `megamem profile` writes them. none: equal stages, F = B = W.",
    )
    file: str | Literal["none"] = option(
        File(), "none", "With name: file, the schedule in its text form (see `megamem simulate --text`)."
    )
    trace: str | Literal["none"] = option(
        File(),
        "none",
        "Write the measured times of the third step's actions, beside those predicted from the same costs, as a Chrome "
        "trace that ui.perfetto.dev opens; FILE.costs.json gets the measured costs, which schedule.costs takes.",
    )

    @classmethod
    def contradictions(cls, values: Mapping[str, Any], given: Iterable[str]) -> list[str]:
        """As for every section; and `name: file` needs the file."""
        problems = super().contradictions(values, given)
        if values.get("name") == "file" and values.get("file", "none") == "none":
            problems.append("schedule.file: name is file, and there is none; give the path of a schedule's text form")
        return problems


@dataclass(frozen=True, kw_only=True)
class Vocabulary(Section):
    """Embeddings, output layer and loss of large vocabularies."""

    NAME: ClassVar[str] = "vocabulary"
    KEY: ClassVar[str] = "fused_loss"
    SWITCHES: ClassVar[tuple[str, ...]] = ("parallel",)

    fused_loss: bool | Literal["auto"] = option(
        Auto(Switch()),
        False,
        "Compute output layer and cross entropy together, chunk by chunk of the vocabulary, so that the logits are "
        "never in memory; one matrix product of three is done twice. Requests for logits are answered as before. auto: "
        "as the planner weighs it for this job.",
    )
    parallel: bool | Literal["auto"] = option(
        Auto(Switch()),
        False,
        "Share input embedding, output layer and loss over all pipeline ranks, so that the first and the last are no "
        "slower and no fuller than the others (arXiv 2411.05288); the loss is computed as with fused_loss. Needs a "
        "schedule; where none is named, 1f1b or interleaved. With one pipeline rank: as fused_loss. auto: as the "
        "planner weighs it.",
    )
    barriers: Literal[1, 2] = option(
        Count(least=1, most=2),
        1,
        "With parallel: how often the pipeline ranks meet between forward and backward pass of a microbatch. 1: "
        "activations of one microbatch more than the schedule alone, and tokens x hidden size in fp32 for each that "
        "is between the passes. 2: of two microbatches more.",
    )
    keep_logits: bool = option(
        Switch(),
        False,
        "With parallel: keep a rank's logits, tokens x vocabulary / ranks in the model's dtype, for each microbatch "
        "that is between the passes, and make them once: three matrix products instead of four.",
    )
    loss_chunk: int | Literal["auto"] = option(
        Auto(Count(least=1)),
        "auto",
        "Vocabulary entries per chunk, counted on one rank; tokens x loss_chunk logits are in memory at a time. auto: "
        "96 MiB of logits, but at least 2048 entries, and always less than a quarter of the vocabulary.",
    )

    @classmethod
    def reads(cls, name: str, key: str) -> bool:
        """Both switches always; loss_chunk with either, barriers with parallel: see `contradictions`."""
        return True

    def to_dict(self) -> dict[str, object]:
        """As for every section; options that no switch reads are left out."""
        unread = {name for name, readers in _READ_BY.items() if not any(getattr(self, reader) for reader in readers)}
        return {name: value for name, value in super().to_dict().items() if name not in unread}

    @classmethod
    def contradictions(cls, values: Mapping[str, Any], given: Iterable[str]) -> list[str]:
        """Options that no switch reads."""
        return [
            f"vocabulary.{name}: has no effect without {' or '.join(f'vocabulary.{reader}' for reader in readers)}; "
            f"set {'one of them' if len(readers) > 1 else 'it'} to true, or remove {name}"
            for name, readers in _READ_BY.items()
            if name in given and not any(values.get(reader, True) for reader in readers)  # invalid ones are absent
        ]


_READ_BY: Mapping[str, tuple[str, ...]] = {
    "barriers": ("parallel",),
    "keep_logits": ("parallel",),
    "loss_chunk": ("fused_loss", "parallel"),
}
"""The options of `Vocabulary` that are no switches, and the switches that read them."""


@dataclass(frozen=True, kw_only=True)
class LowPrecision(Section):
    """What norms and activation functions save for the backward pass, in 8 bits or not at all."""

    NAME: ClassVar[str] = "fp8"
    KEY: ClassVar[str] = "saved_activations"
    READERS: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(
        ("format", "group", "power_of_two_scales"), ("mlp", "all")
    )

    saved_activations: Literal["off", "rebuild", "mlp", "all", "regelu2"] = option(
        Choice(("off", "rebuild", "mlp", "all", "regelu2")),
        "off",
        "rebuild: outputs of norms and activation functions are not kept, but made again in the backward pass, from "
        "the same inputs; values of attention hold no more than themselves. mlp: besides, inputs of activation "
        "functions (the output of fc1) are kept in 8 bits. all: inputs of norms too. The forward pass is exact; "
        "gradients carry the error of the 8 bits. regelu2, experimental: norms as with rebuild, and of GELU without a "
        "gate the input is kept in 2 bits (arXiv 2406.16282); its gradient is off by tens of percent, and its output "
        "stays. It saves more than mlp only where fc2 is frozen.",
    )
    format: Literal["e4m3", "int8", "e5m2"] = option(
        Choice(("e4m3", "int8", "e5m2")),
        "e4m3",
        "e4m3: error 2.6 %, whatever the spread of values. int8: less where values are of one size, more where a few "
        "are large. e5m2: twice the error of e4m3.",
    )
    group: int = option(Count(least=1), 128, "Neighbouring channels that share a scale of 4 bytes. At most 4096.")
    power_of_two_scales: bool = option(
        Switch(), False, "Round scales up to powers of two, so that scaling itself is exact; a little more error."
    )

    @classmethod
    def contradictions(cls, values: Mapping[str, Any], given: Iterable[str]) -> list[str]:
        """As for every section; and no group is larger than the kernels take."""
        problems = super().contradictions(values, given)
        if values.get("group", 1) > 4096:
            problems.append(f"fp8.group: {values['group']} is more than 4096; give 32 to 256")
        return problems


@dataclass(frozen=True, kw_only=True)
class Mlp(Section):
    """The dense MLP of a layer, one tile of its tokens at a time."""

    NAME: ClassVar[str] = "mlp"
    KEY: ClassVar[str] = "tiles"

    tiles: int | Literal["off", "auto"] = option(
        Auto(Count(least=1), ("off", "auto")),
        "off",
        "Run the MLP in this many tiles of its tokens, so that what lies between its linear layers, and the gathered "
        "input under sequence parallelism, is in memory for one tile at a time. No matrix product is done twice: the "
        "output of linear_fc1 stays, or goes where the activation policy says, tile by tile. auto: so many that a tile "
        "needs no more than the MLP's input takes, with at least 1024 rows in each.",
    )


@dataclass(frozen=True, kw_only=True)
class Allocator(Section):
    """An exact plan for the memory of a training step, and an arena that keeps to it."""

    NAME: ClassVar[str] = "allocator"
    KEY: ClassVar[str] = "mode"

    mode: Literal["off", "static", "auto"] = option(
        Choice(("off", "static", "auto")),
        "off",
        "static: record some steps, plan where each of their requests for memory lies, and serve the steps that follow "
        "from one reserved arena. What the plan does not foresee goes to PyTorch's own allocator and is counted. auto: "
        "where the memory that it saves is worth time.",
    )
    profile_steps: int = option(
        Count(least=1),
        2,
        "Steps to record before the plan is made, after one to warm up. Of several, the latest end of each buffer "
        "counts: Python frees some of them a little earlier or later each time.",
    )
    solver: Literal["auto", "greedy", "bilevel", "exact", "mip"] = option(
        Choice(("auto", "greedy", "bilevel", "exact", "mip")), "auto", "As of `megamem solve`."
    )
    time_limit: float = option(
        Duration(),
        60.0,
        "For the plan of one kind of step. All ranks wait; most plans are within 0.1 % of the lower bound, which is "
        "enough, in less than a second.",
    )
    min_size: int | Literal["auto"] = option(
        Bytes(),
        "auto",
        "Smaller requests are left to PyTorch's own allocator. auto: 1 MiB on GPUs, which is where its pool of small "
        "blocks ends; 1 KiB on CPUs.",
    )
    plans: str | Literal["none"] = option(
        File("FOLDER|none"),
        "none",
        "Keep the plans in this folder, and use those that are there already, so that a restarted job need not record.",
    )
    poison: bool = option(
        Switch(),
        False,
        "For debugging: fill what is free of the arena with NaN, so that a read of memory that nobody wrote to shows.",
    )


def word(value: object) -> str:
    """The value of a key, typed or as text, as files write it."""
    return str(value).strip().lower()
