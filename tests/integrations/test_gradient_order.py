"""Orders of gradients that would spoil them are refused, and no others."""

from __future__ import annotations

import pytest

from megamem.ir.schedule import Action, Placement, Schedule

pytest.importorskip("megatron.core", reason="pip install 'megamem[train]'")

from megamem.errors import UnsupportedError
from megamem.integrations.gradient_sync import check_order


def schedule(text: str) -> Schedule:
    """One rank that runs these actions, as "F0 B0 W0"."""
    actions = tuple(Action(word.rstrip("0123456789"), 0, int(word.lstrip("FBW"))) for word in text.split())
    placement = Placement(shape="round-robin", num_ranks=1, num_chunks=1)
    return Schedule(name="mine", placement=placement, num_microbatches=2, ranks=(actions,))


@pytest.mark.parametrize("text", ["F0 F1 BW0 BW1", "F0 F1 B0 B1 W0 W1", "F0 B0 F1 B1 W0 W1"])
@pytest.mark.parametrize("overwrites", [False, True])
def test_microbatches_in_order(text: str, overwrites: bool) -> None:
    check_order(schedule(text), reduces=True, overwrites=overwrites)


@pytest.mark.parametrize("text", ["F0 F1 BW1 BW0", "F0 F1 B0 B1 W1 W0"])
def test_the_last_microbatch_must_come_last_where_gradients_are_reduced_meanwhile(text: str) -> None:
    check_order(schedule(text), reduces=False, overwrites=False)
    with pytest.raises(UnsupportedError, match="after a later microbatch's"):
        check_order(schedule(text), reduces=True, overwrites=False)


@pytest.mark.parametrize("text", ["F0 F1 BW1 BW0", "F0 F1 B0 B1 W1 W0", "F1 F0 B0 B1 W0 W1"])
def test_the_first_microbatch_must_come_first_where_it_replaces_gradients(text: str) -> None:
    with pytest.raises(UnsupportedError, match="takes the gradients of the first microbatch for the first ones"):
        check_order(schedule(text), reduces=False, overwrites=True)
    check_order(schedule("F1 F0 BW1 BW0"), reduces=False, overwrites=True)
