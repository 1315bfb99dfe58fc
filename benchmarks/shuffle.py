"""Quality of the order against a full permutation, and what it asks of the disk or the server.

    python -m benchmarks.shuffle --json

No data are read: the order is a function of integers. A set of 2^19 samples in equal shards is drawn by 64 lanes for an
epoch; a *step* is what the lanes draw at one time, one sample each. For each block size, window and number of shards:

    rank correlation     Spearman's, between place on the disk and place in the epoch: size of what is left of the order
    same block, batch    samples of a step that share their block with another of the step
    same shard, batch    the same for shards; a full permutation has some too, the fewer the more shards there are
    same shard, lane     draws of a lane whose shard is that of the draw before
    samples a read       neighbours on the disk that one stretch of a block covers: reads fall as it grows

The peer is numpy's permutation of all samples, dealt to the same lanes, measured in the same way; for it a read is one
sample. Figures do not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from benchmarks.figures import Case, main
from data_pipeline.lanes import Cursor, LaneOrder

SAMPLES = 2**19
LANES = 64
SHARDS = (16, 512)
BLOCK_SIZES = (1, 16, 256, 1024)
WINDOWS = (1, 8, 64)
SEED = 3

Drawn = npt.NDArray[np.int64]
"""(steps, lanes): the sample that a lane draws in a step; -1 where a lane has ended its epoch."""


def ours(block_size: int, window_blocks: int) -> Drawn:
    """An epoch of all lanes."""
    lanes = [list(_epoch(LaneOrder(SAMPLES, block_size, window_blocks, SEED, lane, LANES))) for lane in range(LANES)]
    drawn = np.full((max(map(len, lanes)), LANES), -1, np.int64)
    for lane, samples in enumerate(lanes):
        drawn[: len(samples), lane] = samples
    return drawn


def _epoch(order: LaneOrder) -> list[int]:
    samples: list[int] = []
    place, cursor = order.resolve(Cursor())
    while place.epoch == 0:
        samples.append(place.sample)
        place, cursor = order.resolve(cursor)
    return samples


def permuted() -> Drawn:
    """A full permutation, dealt to the lanes."""
    return np.random.default_rng(SEED).permutation(SAMPLES).reshape(-1, LANES)


def rank_correlation(drawn: Drawn) -> float:
    """Spearman's: both places are ranks already, so it is the plain correlation of them."""
    samples = drawn[drawn >= 0]
    return float(np.corrcoef(np.arange(len(samples)), samples)[0, 1])


def share_together(drawn: Drawn, size: int) -> float:
    """Samples of a step that share their group of ``size`` neighbours on the disk with another one of the step."""
    shared, counted = 0, 0
    for step in drawn:
        _, counts = np.unique(step[step >= 0] // size, return_counts=True)
        shared += int(counts[counts > 1].sum())
        counted += int(counts.sum())
    return shared / counted


def share_again(drawn: Drawn, size: int) -> float:
    """Draws of a lane in the same group of ``size`` neighbours as the draw before."""
    both = (drawn[1:] >= 0) & (drawn[:-1] >= 0)
    return float((drawn[1:] // size == drawn[:-1] // size)[both].mean())


@dataclass(frozen=True)
class Quality:
    """One row of the table."""

    name: str
    block_size: int
    shards: int
    drawn: Drawn

    def figures(self) -> dict[str, float]:
        """All measures."""
        per_shard = SAMPLES // self.shards
        return {
            "rank correlation": round(abs(rank_correlation(self.drawn)), 4),
            "same block, batch": round(share_together(self.drawn, self.block_size), 4),
            "same shard, batch": round(share_together(self.drawn, per_shard), 4),
            "same shard, lane": round(share_again(self.drawn, per_shard), 4),
        }


def measure() -> list[Case]:
    """All cases."""
    full, cases = permuted(), []
    for block_size, window in product(BLOCK_SIZES, WINDOWS):
        drawn = ours(block_size, window)
        for shards in SHARDS:
            name = f"block_size {block_size}, window_blocks {window}, {shards} shards"
            peers = Quality("permutation", block_size, shards, full).figures()
            for figure, value in Quality(name, block_size, shards, drawn).figures().items():
                cases.append(Case(f"{name}: {figure}", value, {"permutation": peers[figure]}, "share"))
        cases.append(_reads(block_size, window))
    return cases


def _reads(block_size: int, window: int) -> Case:
    name = f"block_size {block_size}, window_blocks {window}: samples a read"
    return Case(name, float(block_size), {"permutation": 1.0}, "samples", lower_is_better=False)


if __name__ == "__main__":
    main("shuffle", measure)
