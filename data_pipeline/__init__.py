"""From tars of image-text samples to packed batches, in an order that is a pure function of the step.

The package imports no model, no training engine and no process group: rank and world size are integers, and
:class:`data_pipeline.media_spec.MediaSpec` describes the model's inputs. To use it without mmscale, call
``open_loader`` for packed batches or ``open_samples`` for single samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.loader.iterable import PackedBatches, open_loader
    from data_pipeline.loader.single_samples import OrderedSamples, open_samples

__all__ = ["OrderedSamples", "PackedBatches", "open_loader", "open_samples"]


def __getattr__(name: str) -> Any:
    """Import the public names on first access, so that importing the package does not import torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from data_pipeline.loader import iterable, single_samples

    return getattr(single_samples if hasattr(single_samples, name) else iterable, name)
