"""Quality of the sample order compared with a full permutation.

    python -m benchmarks.shuffle --json

No data are read: the order is a function of integers. 64 lanes draw a set of 2^18 samples in equal shards for an epoch,
16 samples per lane and step. For each block size, window and number of shards:

    rank correlation     Spearman's, between position on the disk and position in the epoch; 0 for a perfect shuffle
    same block, batch    share of samples of a global batch whose block has another sample of the batch
    same shard, batch    the same for shards. With fewer shards than samples in a batch it is near 1 for any order.
    same shard, lane     share of a lane's draws from the same shard as the draw before

The peer is numpy's permutation of all samples, distributed to the same lanes. Reads are not measured: our
order reads whole blocks of ``block_size`` neighbours on the disk, the permutation single samples. The values do not
depend on the machine.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt

from benchmarks.report import Case, main
from data_pipeline.order.lanes import LaneOrder
from data_pipeline.order.state import Cursor

SAMPLES = 2**18
LANES, DRAWS = 64, 16
SHARDS = (16, 512)
BLOCK_SIZES = (1, 16, 256, 1024)
WINDOWS = (1, 8, 64)
SEED = 3

Drawn = npt.NDArray[np.int64]
"""(steps, lanes): the sample that a lane draws in a step; -1 after the lane has finished its epoch."""


def ours(block_size: int, window_blocks: int) -> Drawn:
    """Return an epoch of all lanes."""
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
    """Return a full permutation, distributed to the lanes."""
    return np.random.default_rng(SEED).permutation(SAMPLES).reshape(-1, LANES)


def rank_correlation(drawn: Drawn) -> float:
    """Return Spearman's rank correlation. Both positions are ranks, so it is their plain correlation."""
    samples = drawn[drawn >= 0]
    return float(np.corrcoef(np.arange(len(samples)), samples)[0, 1])


def share_together(drawn: Drawn, size: int) -> float:
    """Return the share of samples whose group of ``size`` neighbours on the disk has another sample of the batch."""
    shared = 0
    for first in range(0, len(drawn), DRAWS):
        batch = drawn[first : first + DRAWS]
        _, counts = np.unique(batch[batch >= 0] // size, return_counts=True)
        shared += int(counts[counts > 1].sum())
    return shared / SAMPLES


def share_again(drawn: Drawn, size: int) -> float:
    """Return the share of a lane's draws in the same group of ``size`` neighbours as the draw before."""
    both = (drawn[1:] >= 0) & (drawn[:-1] >= 0)
    return float((drawn[1:] // size == drawn[:-1] // size)[both].mean())


def figures(drawn: Drawn, block_size: int, shards: int) -> dict[str, float]:
    """Return all measures. Values below one sample of the set (1 / ``SAMPLES``) are raised to it."""
    per_shard = SAMPLES // shards
    found = {
        "rank correlation": abs(rank_correlation(drawn)),
        "same block, batch": share_together(drawn, block_size) if block_size > 1 else 0.0,
        "same shard, batch": share_together(drawn, per_shard),
        "same shard, lane": share_again(drawn, per_shard),
    }
    return {name: round(max(value, 1 / SAMPLES), 6) for name, value in found.items()}


def measure() -> list[Case]:
    """Return all cases."""
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
