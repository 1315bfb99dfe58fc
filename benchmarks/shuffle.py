"""Quality of the order against a full permutation, and what it asks of the disk or the server.

    python -m benchmarks.shuffle --json

No data are read: the order is a function of integers. A set of 2^18 samples in equal shards is drawn by 64 lanes for an
epoch, 16 samples a lane and step. For each block size, window and number of shards:

    rank correlation     Spearman's, between place on the disk and place in the epoch: what is left of the stored order
    same block, batch    samples of a global batch that share their block with another one of it
    same shard, batch    the same for shards: with fewer shards than samples in a batch nearly all do, however shuffled
    same shard, lane     draws of a lane in the same shard as the draw before

The peer is numpy's permutation of all samples, dealt to the same lanes, measured in the same way. A read fetches a
whole block, ``block_size`` neighbours on the disk; for the permutation it is one sample. Figures depend on no machine.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt

from benchmarks.figures import Case, main
from data_pipeline.order.lanes import LaneOrder
from data_pipeline.order.state import Cursor

SAMPLES = 2**18
LANES, DRAWS = 64, 16
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
    """Samples of a batch that share their group of ``size`` neighbours on the disk with another one of the batch."""
    shared = 0
    for first in range(0, len(drawn), DRAWS):
        batch = drawn[first : first + DRAWS]
        _, counts = np.unique(batch[batch >= 0] // size, return_counts=True)
        shared += int(counts[counts > 1].sum())
    return shared / SAMPLES


def share_again(drawn: Drawn, size: int) -> float:
    """Draws of a lane in the same group of ``size`` neighbours as the draw before."""
    both = (drawn[1:] >= 0) & (drawn[:-1] >= 0)
    return float((drawn[1:] // size == drawn[:-1] // size)[both].mean())


def figures(drawn: Drawn, block_size: int, shards: int) -> dict[str, float]:
    """All measures; shares of 0 are given as one sample in the set."""
    per_shard = SAMPLES // shards
    found = {
        "rank correlation": abs(rank_correlation(drawn)),
        "same block, batch": share_together(drawn, block_size) if block_size > 1 else 0.0,
        "same shard, batch": share_together(drawn, per_shard),
        "same shard, lane": share_again(drawn, per_shard),
    }
    return {name: round(max(value, 1 / SAMPLES), 6) for name, value in found.items()}


def measure() -> list[Case]:
    """All cases."""
    full, cases = permuted(), []
    for block_size, window in product(BLOCK_SIZES, WINDOWS):
        drawn = ours(block_size, window)
        for shards in SHARDS:
            name = f"block_size {block_size}, window_blocks {window}, {shards} shards"
            peers = figures(full, block_size, shards)
            for figure, value in figures(drawn, block_size, shards).items():
                cases.append(Case(f"{name}: {figure}", value, {"permutation": peers[figure]}, "share"))
    return cases


if __name__ == "__main__":
    main("shuffle", measure)
