"""The warning about a vision tower that sees no image."""

from __future__ import annotations

import pytest

from mmscale.metrics.unseen_images import PATIENCE_STEPS, UnseenImages


@pytest.mark.parametrize(
    ("has_tower", "images", "warnings"),
    [
        (True, [0] * (3 * PATIENCE_STEPS), 1),
        (True, [0] * (PATIENCE_STEPS - 1), 0),
        (True, [0] * (PATIENCE_STEPS - 1) + [1] + [0] * (3 * PATIENCE_STEPS), 0),
        (False, [0] * (3 * PATIENCE_STEPS), 0),
    ],
)
def test_a_stage_without_an_image_is_named_once(has_tower: bool, images: list[int], warnings: int) -> None:
    said: list[str] = []
    unseen = UnseenImages("align", has_tower, said.append)
    for count in images:
        unseen.step(count)
    assert len(said) == warnings
    assert all("stage align" in line and "no image" in line for line in said)
