"""Estimated numbers of copies agree with exact counts."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.prepare.stats.copies import CopyCount, image_keys


def keys_of(contents: list[int]) -> np.ndarray:
    return image_keys(np.array(contents, np.uint32), np.full(len(contents), 1000, np.int64))


@given(parts=st.lists(st.lists(st.integers(0, 30), max_size=30), max_size=6))
def test_few_images_are_counted_exactly(parts: list[list[int]]) -> None:
    copies = CopyCount()
    for part in parts:
        copies.add(keys_of(part))
    every = [content for part in parts for content in part]
    assert copies.summary()["images"] == len(every) - len(set(every))
    assert copies.summary()["error_95"] == 0


def test_many_images_are_estimated_within_the_stated_error() -> None:
    right, trials = 0, 40
    for trial in range(trials):
        draw = np.random.default_rng(trial)
        contents = draw.integers(0, 2**31, 12_000)
        contents = np.concatenate([contents, contents[: draw.integers(1, 6000)], contents[:500], contents[:500]])
        copies = CopyCount(limit=1000)
        for part in np.array_split(draw.permutation(contents), 7):
            copies.add(keys_of(part.tolist()))
        summary = copies.summary()
        true = 1 - len(np.unique(contents)) / len(contents)
        assert 0 < summary["error_95"] < 0.1
        right += abs(summary["share"] - true) <= summary["error_95"]
    assert right >= 0.85 * trials  # 95 % are expected; fewer than 34 of 40 have probability 1e-3.


def test_parts_in_any_order_give_one_answer() -> None:
    contents = np.random.default_rng(3).integers(0, 3000, 9000)
    answers = []
    for seed in range(3):
        copies = CopyCount(limit=500)
        for part in np.array_split(np.random.default_rng(seed).permutation(contents), 5 + seed):
            copies.add(keys_of(part.tolist()))
        answers.append(copies.summary())
    assert answers[0] == answers[1] == answers[2]
