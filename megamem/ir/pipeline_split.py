"""How many layers each pipeline stage has, where they do not divide evenly; and Megatron-Core's own words for it.

split      (3, 4, 4, 2)       layers of every stage, pipeline ranks x chunks of them, in the order of the model;
                              empty: evenly
layout     Et*3|(t*4|)*2t*2L  `--pipeline-model-parallel-layout`, which Megatron-Core has since 0.13
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Sequence

Split = tuple[int, ...]

_LETTERS = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
_GROUP, _LETTER = re.compile(r"\(([^()]+)\)\*(\d+)"), re.compile(r"([EtmL|])\*(\d+)")
_MOST = 100_000  # letters: more is a slip of the keyboard


def parse_layout(text: str) -> Split:
    """The split of a layout as Megatron-Core takes it: `Et*3|(t*4|)*2t*2L`, or a list of lists of words.

    Raises ValueError with what is wrong.
    """
    stages = _of_list(text) if text.lstrip().startswith("[") else _of_letters(text)
    whole = "".join(stages)
    if not re.fullmatch(r"Et*m*L", whole):
        raise ValueError(f"{text}: the embedding (E), layers (t), multi-token prediction (m) and the loss (L) in turn")
    if any("m" in stage for stage in stages[:-1]):
        raise ValueError(f"{text}: multi-token prediction (m) outside the last stage is not planned for; put it there")
    return tuple(stage.count("t") for stage in stages)


def _of_letters(text: str) -> list[str]:
    plain = re.sub(r"[,\s]", "", text)  # commas are for the eye
    for pattern in (_GROUP, _LETTER):
        if sum(len(m[1]) * int(m[2]) for m in pattern.finditer(plain)) > _MOST:
            raise ValueError(f"{text}: more than {_MOST} layers")
        plain = pattern.sub(lambda m: m[1] * int(m[2]), plain)
    if unknown := sorted(set(plain) - set("EtmL|")):
        raise ValueError(f"{text}: {unknown[0]!r} is none of E, t, m, L, |, and what repeats them: t*4, (tt|)*3")
    return plain.split("|")


def _of_list(text: str) -> list[str]:
    try:
        rows = ast.literal_eval(text)
        return ["".join(_LETTERS[str(word).strip().lower()] for word in row) for row in rows]
    except (ValueError, SyntaxError, TypeError, KeyError):
        words = ", ".join(_LETTERS)
        raise ValueError(f"{text}: no list of lists of {words}") from None


def layout_text(split: Split, mtp_num_layers: int = 0) -> str:
    """The layout of a split, with multi-token prediction in the last stage: what `parse_layout` reads."""
    stages = ["E" * (n == 0) + _times("t", layers) for n, layers in enumerate(split)]
    stages[-1] += _times("m", mtp_num_layers) + "L"
    groups = [(stage, len([*same])) for stage, same in itertools.groupby(stages[:-1])]
    front = "".join(f"({stage}|)*{count}" if stage and count > 1 else f"{stage}|" * count for stage, count in groups)
    return front + stages[-1]


def _times(letter: str, count: int) -> str:
    return f"{letter}*{count}" if count > 1 else letter * count


def ends_split(
    num_layers: int, pipeline: int, chunks: int = 1, *, first: int | None = None, last: int | None = None
) -> Split:
    """The split where the first or the last rank has a number of layers of its own, over all its chunks.

    first, last:  `--decoder-first-pipeline-num-layers`, `--decoder-last-pipeline-num-layers`; None: as the others

    Raises ValueError where the layers do not divide so, or a rank would have none, which Megatron takes in a pipeline
    layout only.
    """
    if 0 in (first, last):
        raise ValueError(
            "0 layers for the first or the last pipeline rank: Megatron-Core takes a stage without layers from "
            "pipeline_model_parallel_layout only (Et*4|L)"
        )
    counts: list[int | None] = [first, *[None] * (pipeline - 2), last] if pipeline > 1 else [first or last]
    open_ranks = counts.count(None)
    rest = num_layers - sum(count for count in counts if count is not None)
    each, over = divmod(rest, open_ranks) if open_ranks else (0, rest)
    if rest < 0 or over:
        raise ValueError(f"{rest} of {num_layers} layers cannot be divided by the other {open_ranks} pipeline ranks")
    ranks = [each if count is None else count for count in counts]
    if uneven := [count for count in ranks if count % chunks]:
        raise ValueError(f"{uneven[0]} layers of a pipeline rank cannot be divided by {chunks} chunks")
    return normal_split([count // chunks for count in ranks] * chunks)


def padded_split(num_layers: int, pipeline: int, chunks: int = 1, *, embedding: bool, loss: bool) -> Split:
    """The split where the embedding, the loss or both count as a layer: `--account-for-embedding-in-pipeline-split`.

    Raises ValueError where the layers do not divide so.
    """
    stages = pipeline * chunks
    each, over = divmod(num_layers + embedding + loss, stages)
    if over:
        raise ValueError(
            f"{num_layers} layers, with the embedding or the loss counted as one, cannot be divided by {stages} stages"
        )
    split = [each] * stages
    split[0] -= embedding
    split[-1] -= loss
    if min(split) < 0:
        raise ValueError(f"{num_layers} layers are too few for {stages} stages")
    return normal_split(split)


def normal_split(split: Sequence[int]) -> Split:
    """The split, empty where all stages are alike."""
    return () if len({*split}) <= 1 else tuple(split)


def balanced_split(costs: Sequence[float], stages: int, last: float = 0.0) -> Split:
    """The split whose slowest stage is fastest; of several that with the lightest front.

    The first ranks hold the most microbatches, so that what is left over goes to the back. Every stage has a layer, but
    for a last one that has enough to do besides (as in DeepSeek-V3's own recipes).

    costs:  of every layer, in the order of the model
    last:   of what the last stage has besides: multi-token prediction, output layer and loss

    Raises ValueError where there are fewer layers than stages.
    """
    if len(costs) < stages:
        raise ValueError(f"{len(costs)} layers are too few for {stages} stages")
    low, high = 0.0, (sum(costs) + last) * (1 + 1e-9)
    best = _fill(costs, stages, last, high)
    assert best is not None
    for _ in range(40):
        middle = (low + high) / 2
        found = _fill(costs, stages, last, middle)
        best, low, high = (best, middle, high) if found is None else (found, low, middle)
    return normal_split(best)


def _fill(costs: Sequence[float], stages: int, last: float, limit: float) -> list[int] | None:
    """Fill stages up to the limit, the last one first; None where that leaves too much for the first."""
    split, end = [0] * stages, len(costs)
    for stage in reversed(range(stages)):
        spent = last if stage == stages - 1 else 0.0
        start = end
        # Every stage before this one gets a layer; what is left at the end is the first one's.
        needs_one = not spent
        while start > stage and ((start == end and needs_one) or stage == 0 or spent + costs[start - 1] <= limit):
            start -= 1
            spent += costs[start]
        if spent > limit:
            return None
        split[stage], end = end - start, start
    return split


def dealt_split(num_layers: int, ranks: Sequence[int], last: float = 0.0) -> Split:
    """The split of equal layers whose busiest rank is as fast as it can be, and so are the stages of every rank.

    ranks:  the pipeline rank of every stage, in the order of the model
    last:   of what the last stage has besides, in layers

    Raises ValueError where there are fewer layers than stages.
    """
    if num_layers < len(ranks):
        raise ValueError(f"{num_layers} layers are too few for {len(ranks)} stages")
    split, spent = [1] * len(ranks), [0.0] * (max(ranks) + 1)
    for stage, rank in enumerate(ranks):
        spent[rank] += 1 + (last if stage == len(ranks) - 1 else 0.0)
    for _ in range(num_layers - len(ranks)):
        # One by one to whoever has least is best for equal layers; what is left over stays away from the first ranks.
        rank = min(range(len(spent)), key=lambda one: (spent[one], -one))
        mine = [stage for stage, owner in enumerate(ranks) if owner == rank]
        split[min(mine, key=lambda one: (split[one] + (last if one == len(ranks) - 1 else 0.0), -one))] += 1
        spent[rank] += 1
    return normal_split(split)
