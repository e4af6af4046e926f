"""A vocabulary over the ranks of pipeline and tensor parallelism: who holds which words.

    VocabShard         the words of one rank, and the rows of padding behind them
    shard_vocabulary   the shards of all ranks
    shard_number       which of them is whose

The shards are consecutive and have equally many rows, ceil(V / n) for V words on n ranks, so that all ranks work for
equally long and what lies behind the last word is padding, in the last shards only. Nothing has to divide anything: a
rank may have fewer words than rows, or none. The rows of all shards one after the other are the weight as a rank alone
would hold it, padded at its end; so a checkpoint has a global shape, and shards can be loaded for any other layout.
Papers pad the vocabulary to a multiple of 2p for speed (arXiv 2411.05288, section 6.1); here that is `multiple`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamem.errors import ScheduleError


@dataclass(frozen=True, kw_only=True)
class VocabShard:
    """Rows of a weight on one rank: the words start .. stop-1, then `padding` rows that are no words.

    first_row is the place of its first row in the whole weight; it is `start`, unless no word is left for the rank.
    """

    first_row: int
    start: int
    stop: int
    padding: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop or self.padding < 0 or self.first_row < self.start:
            raise ScheduleError(
                f"a shard holds words from 0 on and rows of padding; not {self.start} to {self.stop} from row "
                f"{self.first_row} with {self.padding} of padding"
            )

    @property
    def num_words(self) -> int:
        """Words of the vocabulary."""
        return self.stop - self.start

    @property
    def num_rows(self) -> int:
        """Words and padding: the rows of the weight on this rank."""
        return self.num_words + self.padding

    def __contains__(self, word: int) -> bool:
        return self.start <= word < self.stop


def shard_vocabulary(vocab_size: int, num_ranks: int, *, multiple: int = 1) -> tuple[VocabShard, ...]:
    """The shards of a vocabulary on `num_ranks` ranks, in the order of `shard_number`.

    multiple: of the rows of a shard; 1 for no more padding than equal shards need

    Raises ScheduleError for sizes below 1.
    """
    for name, value in (("vocab_size", vocab_size), ("num_ranks", num_ranks), ("multiple", multiple)):
        if value < 1:
            raise ScheduleError(f"{name} is {value}; at least 1 is needed")
    rows = -(-vocab_size // (num_ranks * multiple)) * multiple
    shards = []
    for first in range(0, rows * num_ranks, rows):
        start, stop = min(first, vocab_size), min(first + rows, vocab_size)
        shards.append(VocabShard(first_row=first, start=start, stop=stop, padding=rows - (stop - start)))
    return tuple(shards)


def shard_number(*, pipeline_rank: int, tensor_rank: int, tensor_size: int) -> int:
    """Which shard a rank holds: the ranks of a tensor-parallel group hold neighbours."""
    if not 0 <= tensor_rank < tensor_size or pipeline_rank < 0:
        raise ScheduleError(f"no rank {tensor_rank} of {tensor_size} for tensor, {pipeline_rank} for pipeline")
    return pipeline_rank * tensor_size + tensor_rank
