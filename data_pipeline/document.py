"""A document: one sample as token ids and image patches, before packing.

Sample --template, transforms, tokenizer--> Document --packing--> Pack --collate--> MultimodalBatch
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.media_spec import IMAGE, Grid, MediaSpec
from data_pipeline.sample import Provenance

IGNORE = -100
"""Label of a position without loss."""


IndexRange = tuple[int, int]
"""First index and number of consecutive indices."""


class Region(NamedTuple):
    """A rectangle in a grid of features or patches: first row, first column, number of rows and of columns."""

    top: int
    left: int
    height: int
    width: int


class ContentArea(NamedTuple):
    """The patches of a crop that contain image pixels rather than padding.

    Attributes:
        touched: Patches with at least one image pixel.
        filled: Patches without padding; a part of ``touched``.
    """

    touched: Region
    filled: Region

    @classmethod
    def whole(cls, rows: int, columns: int) -> ContentArea:
        """Return the area of a crop of ``rows`` x ``columns`` patches without padding."""
        return cls(Region(0, 0, rows, columns), Region(0, 0, rows, columns))


class ImageExtent(NamedTuple):
    """Tokens and items of one image, video or clip of sound of a document. Cutting a document never cuts one.

    Attributes:
        start: Its first token: a placeholder, an anchor, or a layout token (such as a tile tag or a row end).
        first_item: Index of its first crop in ``Document.items``; its crops end where the next image's begin. An image
            as tokens of the decoder (``Document.drawn``) has no crops.
        stop: End of its tokens, exclusive. Equal to ``start`` with ``Placement.PAIR``, where images have no tokens.
        is_video: Whether it is a video, with or without its sound.
    """

    start: int
    first_item: int
    stop: int
    is_video: bool = False


@dataclass(frozen=True)
class MediaItem:
    """One crop for a tower: a whole image, an overview or a tile, or all frames of a video; or one chunk of sound.

    Attributes:
        values: uint8 ``(P, patch_dim)``, patches row-major, each in order (channel, row, column). Of another modality
            ``(P, patch_dim)`` of ``ModalitySpec.dtype``: of sound float32 ``(frames, num_bins)``.
        grid: Patches along (time, height, width); their product is P.
        embedded: Whether its features are written into token slots. Otherwise they are attended by cross-attention, or
            compared with the text of the document (``Placement.PAIR``).
        kept_region: The features that the decoder gets if crops overlap; None: all of them.
        cell: Row and column of a tile in the tiling of its image; None if the crop shows the whole image.
        content_area: The patches that contain image pixels, for models with ``MediaSpec.padding``; None: all patches.
        tiles: Rows and columns of tiles that its image is cut into; (1, 1) if the image is not tiled.
        image: Number of its image in the document before any cut; the crops of one image are consecutive.
        tag: Tokens whose embeddings are attended before its features; empty for an embedded crop.
        later_values: uint8 ``(P, (frames_per_patch - 1) * patch_dim)``: of a video, the second and later frames of each
            patch in order, if patches span several frames; ``values`` has the first. None for a still image, which
            counts as identical frames.
        is_video: Whether it is a video, or a crop of one of its frames.
        seconds_per_step: Of a video, the seconds between consecutive groups of frames; None for a still image.
        modality: Name of its modality. Items of other modalities than ``image`` are embedded, and have only ``values``,
            ``grid`` and ``image``.
    """

    values: npt.NDArray[Any]
    grid: Grid
    embedded: bool
    kept_region: Region | None = None
    cell: tuple[int, int] | None = None
    content_area: ContentArea | None = None
    tiles: tuple[int, int] = (1, 1)
    image: int = 0
    tag: tuple[int, ...] = ()
    later_values: npt.NDArray[np.uint8] | None = None
    seconds_per_step: float | None = None
    modality: str = IMAGE
    is_video: bool = False

    def kept_features(self, spec: MediaSpec, first: int = 0) -> list[IndexRange]:
        """Return the ranges of the crop's feature rows that the decoder gets, ascending.

        Args:
            spec: The model's inputs.
            first: Index of the crop's first feature row.

        Raises:
            SampleError: as ``MediaSpec.num_features``.
        """
        if self.kept_region is None:
            return [(first, self.num_features(spec))]
        frames, rows, columns = spec.of_frames(self.is_video).feature_grid(self.grid)
        top, left, height, width = self.kept_region
        corner, frame_size = first + spec.class_features + top * columns + left, rows * columns + spec.class_features
        return [
            (corner + frame * frame_size + row * columns, width) for frame in range(frames) for row in range(height)
        ]

    def num_features(self, spec: MediaSpec) -> int:
        """Return the number of features that the decoder gets, which ``kept_features`` lists.

        Raises:
            SampleError: as ``MediaSpec.num_features``.
        """
        inputs = spec.of_frames(self.is_video) if self.modality == IMAGE else spec.inputs_of(self.modality)
        made = inputs.num_features(self.grid)
        return made if self.kept_region is None else self.grid[0] * self.kept_region.height * self.kept_region.width


class Span(NamedTuple):
    """Tokens from ``start`` to the next span's start attend ``items`` (indices into ``Document.items``)."""

    start: int
    items: tuple[int, ...]


@dataclass(frozen=True)
class Document:
    """One sample, tokenised. A document becomes one segment of a batch: its tokens attend no other document.

    Attributes:
        token_ids: int32 ``(T,)``.
        labels: int32 ``(T,)``: the token to predict *at* this position (already shifted), or ``IGNORE``.
        loss_weights: float32 ``(T,)``; 0 wherever ``labels`` is ``IGNORE``.
        position_ids: int32 ``(T,)`` or ``(T, 3)``, from 0.
        items: Crops and chunks of all modalities in reading order.
        scatter_index: int32 ``(M,)``: token slot of each kept feature of the embedded items, item by item.
        spans: Cross-attention spans, by ascending start; the first starts at 0 (with no items if text comes first).
        provenance: Origin; None for a dummy document.
        images: The images, videos and clips of sound of the sample in reading order; each may have several items.
        branches: First token of each branch, ascending; none, or at least two. A branch attends itself and the tokens
            before the first branch. The positions of every branch start where those before the first branch end.
        is_cut: Whether this is a part of a sample that does not fit into a pack.
        drawn: bool ``(T,)``: whether each token is a code of an image, see ``MultimodalBatch.drawn``; None if none is.
        reference: Log-probability of each branch under a stored reference model; empty without.
        uncoded: The images as tokens whose codes the model computes, in order: all of the document or none. A patch is
            the square of pixels of one code, and the codes of all images are the tokens of ``drawn``, in order.
        num_tokens, num_patches, num_images: T, the rows of all ``items.values``, and the length of ``images``.
        is_dummy: Whether it is a dummy document, which is made without a sample.
    """

    token_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    loss_weights: npt.NDArray[np.float32]
    position_ids: npt.NDArray[np.int32]
    items: tuple[MediaItem, ...]
    scatter_index: npt.NDArray[np.int32]
    spans: tuple[Span, ...]
    provenance: Provenance | None = None
    images: tuple[ImageExtent, ...] = ()
    is_cut: bool = False
    branches: tuple[int, ...] = ()
    drawn: npt.NDArray[np.bool_] | None = None
    reference: tuple[float, ...] = ()
    uncoded: tuple[MediaItem, ...] = ()
    num_tokens: int = field(init=False, repr=False)
    num_patches: int = field(init=False, repr=False)
    num_images: int = field(init=False, repr=False)
    is_dummy: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # ``object.__setattr__``: the dataclass is frozen.
        object.__setattr__(self, "num_tokens", len(self.token_ids))
        object.__setattr__(self, "num_patches", sum(len(item.values) for item in self.items))
        object.__setattr__(self, "num_images", len(self.images))
        object.__setattr__(self, "is_dummy", self.provenance is None)

    def cost(self, spec: MediaSpec) -> float:
        """Return the estimated compute time of its tokens and patches, in units of one token in the decoder."""
        cost = self.num_tokens + spec.cost_per_patch * self.computed_patches(spec)
        for name, inputs in spec.modalities.items():
            cost += inputs.cost_per_patch * sum(len(item.values) for item in self.items if item.modality == name)
        return cost

    def uncoded_at(self, kept: npt.NDArray[np.integer] | slice) -> tuple[MediaItem, ...]:
        """Return the images of ``uncoded`` among the tokens ``kept`` (indices or a slice), which divide no image."""
        if self.drawn is None or not self.uncoded:
            return ()
        chosen = np.zeros(self.num_tokens, np.bool_)
        chosen[kept] = True
        first = np.cumsum([0, *(len(item.values) for item in self.uncoded[:-1])])
        return tuple(itertools.compress(self.uncoded, chosen[np.flatnonzero(self.drawn)[first]]))

    def computed_patches(self, spec: MediaSpec) -> int:
        """Return the patches of images that the tower computes: its own, or more if absent tiles are computed too."""
        items = [item for item in self.items if item.modality == IMAGE] if spec.modalities else self.items
        if spec.patches_per_image is None:
            return sum(len(item.values) for item in items)
        return spec.patches_per_image * len({item.image for item in items})
