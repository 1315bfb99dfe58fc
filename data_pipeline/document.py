"""A document: one sample ready for the model, in token and patch form, and still alone.

Sample --template, transforms, tokenizer--> Document --packing--> Pack --collate--> MultimodalBatch
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.media_spec import Grid, MediaSpec
from data_pipeline.sample import Provenance

IGNORE = -100
"""Label of a token that carries no loss."""


@dataclass(frozen=True)
class MediaItem:
    """One view for a tower: a whole image, a thumbnail or a tile.

    Attributes:
        values: uint8 ``(P, patch_dim)``, patches row-major, each in order (channel, row, column).
        grid: Patches along (time, height, width); their product is P.
        embedded: Written into token slots (True) or attended by cross-attention (False).
    """

    values: npt.NDArray[np.uint8]
    grid: Grid
    embedded: bool

    @property
    def num_patches(self) -> int:
        return int(self.values.shape[0])


@dataclass(frozen=True)
class Span:
    """Tokens from ``start`` to the next span's start attend ``items`` (indices into ``Document.items``)."""

    start: int
    items: tuple[int, ...]


@dataclass(frozen=True)
class Document:
    """One sample, tokenised. A document is a segment: it never attends another one.

    Attributes:
        token_ids: int32 ``(T,)``.
        labels: int32 ``(T,)``: the token to predict *at* this position (already shifted), or ``IGNORE``.
        loss_weights: float32 ``(T,)``; 0 wherever ``labels`` is ``IGNORE``.
        position_ids: int32 ``(T,)`` or ``(T, 3)``, from 0.
        items: Views in reading order.
        dest: int32 ``(M,)``: token slot of each feature of the embedded items, item after item.
        spans: Cross-attention spans, by ascending start; the first starts at 0 (with no items if text comes first).
        provenance: Origin; None for a null document.
        images: (first token, first item) of each image it shows, in reading order; an image may give several items.
    """

    token_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    loss_weights: npt.NDArray[np.float32]
    position_ids: npt.NDArray[np.int32]
    items: tuple[MediaItem, ...]
    dest: npt.NDArray[np.int32]
    spans: tuple[Span, ...]
    provenance: Provenance | None = None
    images: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def num_images(self) -> int:
        return len(self.images)

    @property
    def num_patches(self) -> int:
        return sum(item.num_patches for item in self.items)

    @property
    def is_null(self) -> bool:
        return self.provenance is None

    def cost(self, spec: MediaSpec) -> float:
        """Time units: tokens plus alpha times patches."""
        return self.num_tokens + spec.cost_per_patch * self.num_patches
