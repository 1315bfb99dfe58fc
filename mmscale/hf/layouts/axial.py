"""Read and write the RoPE base of vision towers with 2D rotary positions (images of any size)."""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.models.vision_config import VisionConfig
from mmscale.nn.rope import FrequencyLayout, Rotary2dConfig


def to_model(keys: Keys, layout: FrequencyLayout) -> dict[str, Any]:
    """Return ``vision.positions``. Version 5 of transformers writes ``rope_parameters``, older ones ``rope_theta``."""
    theta = keys.read("rope_theta", float)
    if (block := keys.optional_object("rope_parameters")) is not None:
        theta = block.read("rope_theta", float, theta)
        block.must_be("rope_type", "axial")
        block.raise_on_unread()
    return {"kind": "rotary_2d", "theta": theta, "layout": layout.value}


def to_keys(vision: VisionConfig) -> dict[str, Any]:
    """Return ``rope_parameters`` of the vision configuration.

    Raises:
        CheckpointError: the tower has no 2D rotary positions.
    """
    if not isinstance(vision.positions, Rotary2dConfig):
        raise CheckpointError(f"towers of any image size cannot express vision.positions={vision.positions.kind}")
    return {"rope_parameters": {"rope_type": "axial", "rope_theta": vision.positions.theta}}
