"""The families. A further one is a file beside these that defines ``LAYOUT``; nothing else has to know of it."""

from __future__ import annotations

import importlib
import pkgutil

from mmscale.errors import CheckpointError
from mmscale.hf.layout import Layout
from mmscale.models.config import AnyModelConfig


def _found() -> tuple[Layout, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(module.LAYOUT for module in modules if hasattr(module, "LAYOUT"))  # Others are shared parts.


LAYOUTS: tuple[Layout, ...] = _found()
"""By name of the file. Where several have words for a model, the first is taken."""


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


def layout_for(config: AnyModelConfig) -> Layout:
    """The first family that has words for a model; those that transformers cannot open come last.

    Raises:
        CheckpointError: none has; says why not.
    """
    reasons = []
    for layout in sorted(LAYOUTS, key=lambda layout: layout.auto_class is None):
        try:
            layout.config_values(config)
        except CheckpointError as error:
            reasons.append(str(error))
        else:
            return layout
    raise CheckpointError("no family can hold this model: " + " | ".join(dict.fromkeys(reasons)))
