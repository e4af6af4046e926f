"""Shards of a vocabulary: every word once, equal rows, padding at the end only."""

import random

import pytest

from megamem.errors import ScheduleError
from megamem.ir.vocabulary import VocabShard, shard_number, shard_vocabulary


@pytest.mark.parametrize("seed", range(60))
def test_every_word_is_in_one_shard_and_padding_is_behind_all_words(seed: int) -> None:
    rng = random.Random(seed)
    size, ranks, multiple = rng.randint(1, 200), rng.randint(1, 40), rng.choice([1, 1, 2, 8])
    shards = shard_vocabulary(size, ranks, multiple=multiple)
    assert len(shards) == ranks
    assert len({shard.num_rows for shard in shards}) == 1
    rows = shards[0].num_rows
    assert rows % multiple == 0
    assert rows - multiple < size / ranks <= rows  # no larger than equal shards must be
    assert [shard.first_row for shard in shards] == [rank * rows for rank in range(ranks)]
    for word in range(size):
        holders = [shard for shard in shards if word in shard]
        assert len(holders) == 1
        assert word - holders[0].start < holders[0].num_words
        assert word == holders[0].first_row + (word - holders[0].start)  # the rows in turn are the whole weight
    assert size not in shards[-1]
    assert sum(shard.num_words for shard in shards) == size


def test_the_published_example_needs_no_padding_to_the_ranks() -> None:
    shards = shard_vocabulary(256008, 24)
    assert {shard.num_rows for shard in shards} == {10667}
    assert shard_vocabulary(256008, 24, multiple=2)[0].num_rows * 24 == 256032  # as in 2411.05288, 6.1


def test_ranks_without_a_word_hold_padding_only() -> None:
    assert shard_vocabulary(5, 4) == (
        VocabShard(first_row=0, start=0, stop=2),
        VocabShard(first_row=2, start=2, stop=4),
        VocabShard(first_row=4, start=4, stop=5, padding=1),
        VocabShard(first_row=6, start=5, stop=5, padding=2),
    )


def test_neighbours_in_tensor_parallelism_hold_neighbouring_shards() -> None:
    numbers = [
        shard_number(pipeline_rank=pipeline, tensor_rank=tensor, tensor_size=3)
        for pipeline in range(2)
        for tensor in range(3)
    ]
    assert numbers == list(range(6))


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ScheduleError, match="at least 1 is needed"):
        shard_vocabulary(sizes[0], sizes[1], multiple=sizes[2])


def test_ranks_that_are_none_and_shards_that_cannot_be_are_refused() -> None:
    with pytest.raises(ScheduleError, match="no rank 2 of 2"):
        shard_number(pipeline_rank=0, tensor_rank=2, tensor_size=2)
    with pytest.raises(ScheduleError, match="not 3 to 2"):
        VocabShard(first_row=3, start=3, stop=2)
