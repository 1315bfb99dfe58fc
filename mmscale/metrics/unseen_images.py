"""Warn once about a model with a vision tower whose data hold no image.

A look at the first samples finds this before a run starts (``run_config.check_files``), but it does not read streamed
and remote data. There the first steps of a stage tell.
"""

from __future__ import annotations

from collections.abc import Callable

PATIENCE_STEPS = 20
"""Steps of a stage without any image before the warning; a mixture with few images has one by then."""


class UnseenImages:
    """The steps of one stage and how many of them held an image.

    Args:
        stage: Name of the stage.
        has_tower: Whether its model has a vision tower; without one nothing is ever printed.
        note: Prints a line; does nothing on ranks other than 0.
    """

    def __init__(self, stage: str, has_tower: bool, note: Callable[[str], object]) -> None:
        self._stage = stage
        self._steps_left = PATIENCE_STEPS if has_tower else 0
        self._note = note

    def step(self, num_images: int) -> None:
        """Count one step with ``num_images`` images over all ranks."""
        if not self._steps_left:
            return
        self._steps_left = 0 if num_images else self._steps_left - 1
        if not self._steps_left and not num_images:
            self._note(
                f"warning: stage {self._stage}: the model has a vision tower, and its first {PATIENCE_STEPS} steps "
                "held no image, so the tower and the connector learn nothing; check the data sets, or set model.vision "
                "and model.connector to null"
            )
