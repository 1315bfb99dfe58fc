"""A document: one sample ready for the model, in token and patch form, and still alone.

Sample --template, transforms, tokenizer--> Document --packing--> Pack --collate--> MultimodalBatch
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.media_spec import Grid, MediaSpec
from data_pipeline.sample import Provenance

IGNORE = -100
"""Label of a token that carries no loss."""


Run = tuple[int, int]
"""Neighbours: the first of them, and how many they are."""


class Region(NamedTuple):
    """A rectangle of a grid of features: its first row and column, its rows and columns."""

    top: int
    left: int
    height: int
    width: int


class Coverage(NamedTuple):
    """What of a view the image covers; the rest is padding.

    Attributes:
        touched: Patches with any pixel of the image.
        filled: Patches with nothing else; within ``touched``.
    """

    touched: Region
    filled: Region

    @classmethod
    def whole(cls, rows: int, columns: int) -> Coverage:
        """No padding in so many rows and columns of patches."""
        return cls(Region(0, 0, rows, columns), Region(0, 0, rows, columns))


class ImageExtent(NamedTuple):
    """Where an image lies in a document.

    Attributes:
        start: Its first token: a placeholder, an anchor, or a token of its layout.
        first_item: Its first view; the others follow, up to the next image's.
        stop: The token behind its last one. An image stays whole when a document is cut.
    """

    start: int
    first_item: int
    stop: int


@dataclass(frozen=True)
class MediaItem:
    """One view for a tower: a whole image, an overview or a tile.

    Attributes:
        values: uint8 ``(P, patch_dim)``, patches row-major, each in order (channel, row, column).
        grid: Patches along (time, height, width); their product is P.
        embedded: Written into token slots (True) or attended by cross-attention (False).
        kept: Part of its grid of features that is handed on, of views that overlap; None hands on all.
        place: Row and column of a tile in the grid of its image; None if the view shows the whole image.
        coverage: What of it is no padding, for models that want to know (``MediaSpec.padding``); None: all.
        tiles: Rows and columns of tiles that its image is cut into; (1, 1) if it is in one piece.
        image: Number of its image in the sample; views of one image stand together.
        tag: Tokens whose embeddings are attended in front of its features; none of an embedded view.
    """

    values: npt.NDArray[np.uint8]
    grid: Grid
    embedded: bool
    kept: Region | None = None
    place: tuple[int, int] | None = None
    coverage: Coverage | None = None
    tiles: tuple[int, int] = (1, 1)
    image: int = 0
    tag: tuple[int, ...] = ()

    def kept_features(self, spec: MediaSpec, first: int = 0) -> list[Run]:
        """Which of the features that the tower makes of it are handed on: row-major numbers from ``first``, ascending.

        Raises:
            SampleError: as ``MediaSpec.num_features``.
        """
        frames, rows, columns = spec.feature_grid(self.grid)
        if self.kept is None:
            return [(first, spec.num_features(self.grid))]
        top, left, height, width = self.kept
        corner, frame_size = first + spec.class_features + top * columns + left, rows * columns + spec.class_features
        return [
            (corner + frame * frame_size + row * columns, width) for frame in range(frames) for row in range(height)
        ]

    def num_features(self, spec: MediaSpec) -> int:
        """Features that it hands on.

        Raises:
            SampleError: as ``MediaSpec.num_features``.
        """
        made = spec.num_features(self.grid)
        return made if self.kept is None else self.grid[0] * self.kept.height * self.kept.width


class Span(NamedTuple):
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
        dest: int32 ``(M,)``: token slot of each feature that the embedded items hand on, item after item.
        spans: Cross-attention spans, by ascending start; the first starts at 0 (with no items if text comes first).
        provenance: Origin; None for a null document.
        images: The images it shows, in reading order; an image may give several items.
        branches: First token of each branch, ascending; none, or at least two. A branch attends the tokens before the
            first branch and itself, no other branch; its positions go on where those before the first branch end.
        is_cut: Whether this is a part of a sample that no pack can hold whole.
        num_tokens, num_patches, num_images: T, the rows of all ``items.values``, and the length of ``images``.
        is_null: Whether it is a null document, which no sample gave.
    """

    token_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    loss_weights: npt.NDArray[np.float32]
    position_ids: npt.NDArray[np.int32]
    items: tuple[MediaItem, ...]
    dest: npt.NDArray[np.int32]
    spans: tuple[Span, ...]
    provenance: Provenance | None = None
    images: tuple[ImageExtent, ...] = ()
    is_cut: bool = False
    branches: tuple[int, ...] = ()
    num_tokens: int = field(init=False, repr=False)
    num_patches: int = field(init=False, repr=False)
    num_images: int = field(init=False, repr=False)
    is_null: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # ``object.__setattr__``: the dataclass is frozen.
        object.__setattr__(self, "num_tokens", len(self.token_ids))
        object.__setattr__(self, "num_patches", sum(len(item.values) for item in self.items))
        object.__setattr__(self, "num_images", len(self.images))
        object.__setattr__(self, "is_null", self.provenance is None)

    def cost(self, spec: MediaSpec) -> float:
        """Time of its tokens and patches; the unit is the time of one token in the decoder."""
        return self.num_tokens + spec.cost_per_patch * self.computed_patches(spec)

    def computed_patches(self, spec: MediaSpec) -> int:
        """Patches that the tower computes: its own, or more where absent tiles are computed too."""
        per_image = spec.patches_per_image
        return self.num_patches if per_image is None else per_image * len({item.image for item in self.items})
