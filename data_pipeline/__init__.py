"""From tars of image-text samples to packed batches, in an order that is a pure function of the step.

Knows no model, no training engine and no process group: rank and world size are integers. What it must know of the
model arrives as one value, :class:`data_pipeline.media_spec.MediaSpec`. ``open_loader`` is the door for people who want
the loader alone, ``open_samples`` for those who want samples and no packs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.loader.iterable import PackedBatches, open_loader
    from data_pipeline.loader.single_samples import OrderedSamples, open_samples

__all__ = ["OrderedSamples", "PackedBatches", "open_loader", "open_samples"]


def __getattr__(name: str) -> Any:
    """Imports what needs torch only when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from data_pipeline.loader import iterable, single_samples

    return getattr(single_samples if hasattr(single_samples, name) else iterable, name)
