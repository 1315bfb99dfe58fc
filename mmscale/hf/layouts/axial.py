"""Rotations of patches by row and column: where their base stands, in towers that take images of any size."""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.models.vision_config import VisionConfig
from mmscale.nn.rope import FrequencyLayout, Rotary2dConfig


def to_model(keys: Keys, layout: FrequencyLayout) -> dict[str, Any]:
    """``vision.positions``; ``rope_parameters`` is of version 5, ``rope_theta`` of the time before it."""
    theta = keys.take("rope_theta", float)
    if (block := keys.block("rope_parameters")) is not None:
        theta = block.take("rope_theta", float, theta)
        block.must_be("rope_type", "axial")
        block.finish()
    return {"kind": "rotary_2d", "theta": theta, "layout": layout.value}


def to_keys(vision: VisionConfig) -> dict[str, Any]:
    """Of their vision configuration, what says the base.

    Raises:
        CheckpointError: the tower has a table of positions.
    """
    if not isinstance(vision.positions, Rotary2dConfig):
        raise CheckpointError(f"towers of any image size have no words for vision.positions={vision.positions.kind}")
    return {"rope_parameters": {"rope_type": "axial", "rope_theta": vision.positions.theta}}
