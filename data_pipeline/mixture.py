"""Which data set a lane draws from next: weighted, deterministic, as even as possible.

The data set furthest behind its share is next, so after n draws every count is within a draw or so of ``weight * n``,
not within the square root of n as with dice. The state is the number of draws of each data set. Not for: order inside
a data set (``lanes``).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

from data_pipeline.errors import DataConfigError

# 0.1 must mean 1/10 exactly, or proportions drift over 10^10 draws.
_MAX_DENOMINATOR = 10**9


class Mixture:
    """The choice of one lane.

    Args:
        weights: Relative weight of each data set, above 0.
        lane: Lanes start at different places of the sequence, so that one step over all lanes is mixed too.

    Raises:
        DataConfigError: no data set, or a weight that is not above 0.
    """

    def __init__(self, weights: Sequence[float], lane: int = 0) -> None:
        if not weights:
            raise DataConfigError("data.datasets is empty: name at least one data set")
        if any(not 0 < weight < float("inf") for weight in weights):
            raise DataConfigError(f"data set weights must be finite and above 0, got {list(weights)}")
        exact = [Fraction(weight).limit_denominator(_MAX_DENOMINATOR) for weight in weights]
        if not all(exact):
            raise DataConfigError(f"data set weights below 1e-9 cannot be kept, got {list(weights)}")
        scale = lcm(*(share.denominator for share in exact))
        self._shares = [int(share * scale) for share in exact]
        self._total = sum(self._shares)
        self._history = [0] * len(weights)
        for _ in range(lane):
            self._history[self.choose([0] * len(weights))] += 1

    def choose(self, draws: Sequence[int]) -> int:
        """Index of the data set to draw from, after ``draws[i]`` draws of each."""
        counts = [before + drawn for before, drawn in zip(self._history, draws, strict=True)]
        coming = sum(counts) + 1
        behind = [share * coming - self._total * count for share, count in zip(self._shares, counts, strict=True)]
        return behind.index(max(behind))
