"""Which sample a lane draws next: mixture, epochs and order as one pure function of a position.

Not for: reading it (``lane_stream``), the order inside a data set (``lanes``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from data_pipeline.order.lanes import Cursor, Place
from data_pipeline.order.mixture import Mixture, Schedule
from data_pipeline.order.state import Drawn, StreamPosition


class Ordered(Protocol):
    """The samples of one lane of a data set in order."""

    def resolve(self, cursor: Cursor) -> tuple[Place, Cursor]:
        """The sample at ``cursor`` and the cursor after it."""


class LaneSequence:
    """The samples of one lane over all data sets.

    Args:
        sources: Order of the lane in each data set.
        max_epochs: Of each data set; None goes on for ever.
        schedule: Weights of the data sets over steps.
        lane: This lane.
    """

    def __init__(
        self, sources: Sequence[Ordered], max_epochs: Sequence[int | None], schedule: Schedule, lane: int
    ) -> None:
        self._sources, self._max_epochs = sources, max_epochs
        self._schedule, self._lane = schedule, lane
        self._mixtures: dict[tuple[int, int], Mixture | None] = {}

    def draw(self, position: StreamPosition, step: int) -> tuple[Drawn | None, StreamPosition]:
        """The sample that is drawn for ``step``, and the position behind it; None when every data set is used up."""
        position = _in_phase(position, self._schedule.phase(step), position.exhausted)
        while (mixture := self._mixture(position.phase, position.exhausted)) is not None:
            chosen = mixture.choose(position.draws)
            place, after = self._sources[chosen].resolve(position.cursors[chosen])
            most = self._max_epochs[chosen]
            if most is not None and place.epoch >= most:
                position = _in_phase(position, position.phase, position.exhausted | 1 << chosen)
                continue
            draws, cursors = position.draws, position.cursors
            behind = StreamPosition(
                (*draws[:chosen], draws[chosen] + 1, *draws[chosen + 1 :]),
                (*cursors[:chosen], after, *cursors[chosen + 1 :]),
                position.phase,
                position.exhausted,
            )
            return Drawn(chosen, place.epoch, place.sample), behind
        return None, position

    def is_current(self, position: StreamPosition, step: int) -> bool:
        """Whether what was drawn up to ``position`` would be drawn for ``step`` too."""
        return position.phase == self._schedule.phase(step)

    def _mixture(self, phase: int, exhausted: int) -> Mixture | None:
        """The mixture of what is left in a phase; None if nothing is."""
        key = (phase, exhausted)
        if key not in self._mixtures:
            weights = [0.0 if exhausted >> i & 1 else w for i, w in enumerate(self._schedule.weights[phase])]
            self._mixtures[key] = Mixture(weights, self._lane) if any(weights) else None
        return self._mixtures[key]


def _in_phase(position: StreamPosition, phase: int, exhausted: int) -> StreamPosition:
    """The position, its draws counted anew if the mixture is another one now."""
    if (phase, exhausted) == (position.phase, position.exhausted):
        return position
    return StreamPosition((0,) * len(position.draws), position.cursors, phase, exhausted)
