"""The model families. To add one, add a module to this package that defines ``LAYOUT``; it is found automatically."""

from __future__ import annotations

import importlib
import pkgutil

from mmscale.errors import CheckpointError
from mmscale.hf.layout import FamilyLayout
from mmscale.models.config import AnyModelConfig


def _found() -> tuple[FamilyLayout, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(module.LAYOUT for module in modules if hasattr(module, "LAYOUT"))  # The others are shared code.


LAYOUTS: tuple[FamilyLayout, ...] = _found()
"""All families, ordered by module name."""


def layout_of(model_type: str) -> FamilyLayout:
    """Return the family of a ``model_type``.

    Raises:
        CheckpointError: no family has this ``model_type``; the message lists the known ones.
    """
    for layout in LAYOUTS:
        if layout.model_type == model_type:
            return layout
    known = ", ".join(layout.model_type for layout in LAYOUTS)
    raise CheckpointError(f"model_type={model_type!r} is not supported, only {known}")


def layout_for(config: AnyModelConfig) -> FamilyLayout:
    """Return the first family that can express a model. Families that transformers cannot open are tried last.

    Raises:
        CheckpointError: no family can express the model; the message has the reason of each.
    """
    reasons = []
    for layout in sorted(LAYOUTS, key=lambda layout: layout.auto_class is None):
        try:
            layout.config_values(config)
        except CheckpointError as error:
            reasons.append(str(error))
        else:
            return layout
    raise CheckpointError("no Hugging Face family can express this model: " + " | ".join(dict.fromkeys(reasons)))
