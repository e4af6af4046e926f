"""Which layer's backward pass comes next.

Within one forward pass of a model chunk the answer is the layer before. From one such *segment* to the next it depends
on the pipeline schedule, which we do not ask: the order in which segments' backward passes start is noted in each step
and expected again in the next one. Microbatches of one chunk come back first in, first out, in every schedule that
Megatron has. A wrong guess costs only a fetch that comes early.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megamem.runtime.activations.run import LayerRun


class BackwardOrder:
    """Learns the order of the backward passes of a rank's segments.

    A segment is known by its first layer: the same for all microbatches of a chunk.
    """

    def __init__(self) -> None:
        # The last run of each segment, oldest first.
        self._open: dict[int, deque[weakref.ref[LayerRun]]] = defaultdict(deque)
        self._expected: list[int] = []
        self._seen: list[int] = []

    def on_forward(self, run: LayerRun, previous: LayerRun | None) -> None:
        """A layer's forward is over; `previous` is the one before it in the same segment."""
        run.segment = id(run.layer) if previous is None else previous.segment
        line = self._open[run.segment]
        if previous is not None and line and line[-1]() is previous:
            line[-1] = weakref.ref(run)
        else:
            line.append(weakref.ref(run))

    def next_after(self, run: LayerRun) -> list[LayerRun]:
        """The run whose backward pass is expected after that of `run`, or one further on if it has nothing to fetch."""
        self._note(run)
        later = run.previous
        while later is not None and not later.has_parcels:
            later = later.previous
        if later is not None:
            return [later]
        tail = self._expected_segment()
        while tail is not None and not tail.has_parcels:
            tail = tail.previous
        return [] if tail is None else [tail]

    def end_step(self) -> None:
        """The next segment to start will be the first of a step."""
        if self._seen:
            self._expected = self._seen
        self._seen = []
        for line in self._open.values():
            line.clear()

    def _note(self, run: LayerRun) -> None:
        line = self._open[run.segment]
        for position, known in enumerate(line):
            if known() is run:  # the last layer of its segment: a segment's backward pass starts
                del line[position]
                self._seen.append(run.segment)
                return

    def _expected_segment(self) -> LayerRun | None:
        """The last layer of the segment whose backward pass is expected next; None if it has not run forward yet."""
        place = len(self._seen)
        if place < len(self._expected):
            chunks = [self._expected[place]]
        elif len(self._open) == 1:
            chunks = list(self._open)
        else:
            return None  # the first step of an interleaved schedule
        for chunk in chunks:
            for known in self._open.get(chunk, ()):
                tail = known()
                if tail is not None and not tail.has_begun:
                    return tail
        return None
