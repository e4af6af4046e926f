"""How the tokens of an MLP are cut into tiles (`mlp.tiles`): by those who run them and by those who plan them."""

from __future__ import annotations

from itertools import pairwise

LEAST_ROWS = 1024
"""Of a tile's matrix products, with `auto`."""


def spans(tokens: int, tiles: int, stored: int) -> list[tuple[int, int]]:
    """Cut `tokens` into about `tiles` ranges [start, stop) of nearly equal length, one of which begins at `stored`.

    All are as long as those of an even cut at most; ranks with equally many tokens cut alike.
    """
    longest = -(-tokens // max(tiles, 1))
    found = []
    for start, stop in ((0, stored), (stored, tokens)):
        count = -(-(stop - start) // longest)
        cuts = [start + (stop - start) * i // count for i in range(count + 1)] if count else []
        found += list(pairwise(cuts))
    return found


def automatic_tiles(rows: int, *, width: int, hidden: int, gathered: int) -> int:
    """How many tiles `auto` makes of an MLP's tokens.

    rows:      of its matrix products, the tokens of all ranks that gather them
    width:     numbers that linear_fc1 makes of a token on this rank
    hidden:    numbers of a token of its input
    gathered:  ranks whose tokens are gathered: those of tensor parallelism with sequence parallelism, else 1
    """
    wanted = max(-(-width * gathered // hidden), gathered)
    return max(min(wanted, rows // LEAST_ROWS), 1)
