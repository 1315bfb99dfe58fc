"""The measures of the order benchmark equal straightforward counts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from benchmarks import shuffle


def test_measures_agree_with_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "SAMPLES", 240)
    monkeypatch.setattr(shuffle, "LANES", 4)
    monkeypatch.setattr(shuffle, "DRAWS", 3)
    drawn = shuffle.ours(block_size=5, window_blocks=3)
    assert sorted(drawn[drawn >= 0]) == list(range(240))

    together = 0
    for first in range(0, len(drawn), 3):
        batch = [s for s in drawn[first : first + 3].ravel() if s >= 0]
        together += sum(any(a // 5 == b // 5 and a != b for b in batch) for a in batch)
    assert shuffle.share_together(drawn, 5) == together / 240

    again, pairs = 0, 0
    for lane in drawn.T:
        for a, b in pairwise(lane):
            if a >= 0 and b >= 0:
                pairs += 1
                again += a // 30 == b // 30
    assert shuffle.share_again(drawn, 30) == again / pairs

    flat = drawn[drawn >= 0]
    n = len(flat)
    squares = sum((place - sample) ** 2 for place, sample in enumerate(flat.tolist()))
    assert shuffle.rank_correlation(drawn) == pytest.approx(1 - 6 * squares / (n * (n * n - 1)))  # Spearman's formula.


def test_order_on_the_disk_correlates_wholly() -> None:
    assert shuffle.rank_correlation(np.arange(100).reshape(-1, 4)) == pytest.approx(1)
