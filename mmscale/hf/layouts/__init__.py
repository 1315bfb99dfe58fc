"""The families. A further one is a file beside these, and a line here."""

from __future__ import annotations

from mmscale.errors import CheckpointError
from mmscale.hf.layout import Layout
from mmscale.hf.layouts import llama, mistral, olmo2, qwen2
from mmscale.models.config import ModelConfig

LAYOUTS: tuple[Layout, ...] = (llama.LAYOUT, qwen2.LAYOUT, mistral.LAYOUT, olmo2.LAYOUT)
"""Where several have words for a model, the first is taken."""


def layout_of(model_type: str) -> Layout:
    """The family of a ``model_type``.

    Raises:
        CheckpointError: it is not known here.
    """
    for layout in LAYOUTS:
        if layout.model_type == model_type:
            return layout
    known = ", ".join(layout.model_type for layout in LAYOUTS)
    raise CheckpointError(f"model_type={model_type!r} is not known; models of {known} can be exchanged")


def layout_for(config: ModelConfig) -> Layout:
    """The first family that has words for a model.

    Raises:
        CheckpointError: none has; says why not.
    """
    reasons = []
    for layout in LAYOUTS:
        try:
            layout.config_values(config)
        except CheckpointError as error:
            reasons.append(str(error))
        else:
            return layout
    raise CheckpointError("no family can hold this model: " + " | ".join(dict.fromkeys(reasons)))
