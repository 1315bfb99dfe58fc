"""Which sample a lane draws next over several data sets: a pure function of its position, weighted and exact.

    weights of the step --Schedule--> phase --Mixture--> data set of the next draw --its order--> sample

Draws of a phase follow Tijdeman's sequence: after any number of them every count is within one draw of its exact share,
not within the square root as with dice. A phase begins where weights change or a data set is used up, and counts anew.
The state is the number of draws of each data set in its phase. Not for: order inside a data set (``lanes``), reading
what is drawn (``sample_source``).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Protocol

from data_pipeline.errors import DataConfigError
from data_pipeline.order.lanes import Cursor, Place
from data_pipeline.order.state import Drawn, StreamPosition

# 0.1 must mean 1/10 exactly, or proportions drift over 10^10 draws.
_MAX_DENOMINATOR = 10**9
# Lanes start at as many different places of the sequence; more would only take longer to find.
_MAX_HEAD_START = 1024


class Mixture:
    """The choices of one lane in one phase.

    The sequence itself never strays by a whole draw. Lanes start at different places of it, so that one step over all
    lanes is mixed too: counted from a lane's start, a count is off by less than two, and over as many lanes as the
    sequence has places it is not off at all.

    Args:
        weights: Relative weight of each data set, from 0 up; one of weight 0 is never drawn.
        lane: Places by which this lane is ahead in the sequence.

    Raises:
        DataConfigError: no weight above 0, or one that cannot be kept exactly.

    Source: Tijdeman 1980, "The chairman assignment problem", theorem 1: the error is at most 1 - 1 / (2k - 2).
    """

    def __init__(self, weights: Sequence[float], lane: int = 0) -> None:
        if any(not 0 <= weight < float("inf") for weight in weights):
            raise DataConfigError(f"data set weights must be finite and not below 0, got {list(weights)}")
        exact = [Fraction(weight).limit_denominator(_MAX_DENOMINATOR) for weight in weights]
        if any(weight and not share for weight, share in zip(weights, exact, strict=True)):
            raise DataConfigError(f"data set weights below 1e-9 cannot be kept, got {list(weights)}")
        if not any(exact):
            raise DataConfigError(f"no data set has a weight above 0: {list(weights)}")
        scale = lcm(*(share.denominator for share in exact))
        self._shares = [int(share * scale) for share in exact]
        self._total = sum(self._shares)
        self._drawn = [i for i, share in enumerate(self._shares) if share]
        self._history = [0] * len(weights)
        for _ in range(lane % min(self._total, _MAX_HEAD_START)):  # The sequence repeats after ``total`` draws.
            self._history[self.choose([0] * len(weights))] += 1

    def choose(self, draws: Sequence[int]) -> int:
        """Index of the data set to draw from, after ``draws[i]`` draws of each in this phase."""
        if len(self._drawn) == 1:
            return self._drawn[0]
        counts = [before + drawn for before, drawn in zip(self._history, draws, strict=True)]
        coming = sum(counts) + 1
        # In units of 1 / (total * slack): how far each is behind after the coming draw if it is not chosen.
        slack = 2 * len(self._drawn) - 2
        best, best_wait = -1, Fraction(0)
        for i in self._drawn:
            behind = (self._shares[i] * coming - self._total * counts[i]) * slack
            if behind < self._total:
                continue
            # Draws until it would be too far behind; the most urgent is next, of equals the first.
            wait = Fraction(self._total * (slack - 1) - behind, self._shares[i])
            if best < 0 or wait < best_wait:
                best, best_wait = i, wait
        return best


@dataclass(frozen=True)
class Schedule:
    """Weights over steps.

    Attributes:
        starts: First step of each phase, ascending; the first is 0.
        weights: Weights of all data sets in each phase.
    """

    starts: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, changes: Sequence[Sequence[tuple[int, float]]]) -> Schedule:
        """From (first step, weight) of each data set, ascending; before its first step a data set has weight 0."""
        starts = sorted({0, *(start for dataset in changes for start, _ in dataset)})
        rows = [tuple(_weight_at(dataset, start) for dataset in changes) for start in starts]
        kept = [i for i in range(len(starts)) if i == 0 or rows[i] != rows[i - 1]]
        return cls(tuple(starts[i] for i in kept), tuple(rows[i] for i in kept))

    def phase(self, step: int) -> int:
        """Number of the phase that ``step`` belongs to."""
        return bisect_right(self.starts, step) - 1


def _weight_at(changes: Sequence[tuple[int, float]], step: int) -> float:
    weight = 0.0
    for start, value in changes:
        if start <= step:
            weight = value
    return weight


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
