"""Which data set a lane draws from next: weighted, deterministic, exact.

    weights of the step --Schedule--> phase --Mixture--> data set of the next draw

Draws of a phase follow Tijdeman's sequence: after any number of them every count is within one draw of its exact share,
not within the square root as with dice. A phase begins where weights change or a data set is used up, and counts anew.
The state is the number of draws of each data set in its phase. Not for: order inside a data set (``lanes``).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

from data_pipeline.errors import DataConfigError

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
