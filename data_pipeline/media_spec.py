"""What the data side must know of the model, and nothing more."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from data_pipeline.errors import DataConfigError, SampleError

Grid = tuple[int, int, int]
"""Patches of one item along (time, height, width)."""


class Placement(str, Enum):
    """Where the features of an image go."""

    NONE = "none"
    """The model has no image tower: samples with images are refused."""
    EMBEDDING = "embedding"
    """Every view is written into token slots of the decoder."""
    CROSS_ATTENTION = "cross_attention"
    """Every view is attended by cross-attention blocks; one anchor token marks its place."""
    HYBRID = "hybrid"
    """The overview is written into token slots, the tiles are attended (NVLM-H)."""
    PAIR = "pair"
    """No text sees it: image and text of a document are compared (CLIP). A document has exactly one image."""


@dataclass(frozen=True)
class MediaSpec:
    """The whole coupling between data and model.

    Args:
        placement: Where image features go.
        patch_size: Side of a square patch, pixels.
        merge: Side of the square of patches that becomes one feature; grids must be multiples of it.
        channels: Colour channels of a patch.
        cost_per_patch: Time of one patch in the tower relative to one token in the decoder (alpha).
        fixed_grid: Patches (height, width) of every view, for towers with a fixed position
            table; None at native resolution.
        class_features: Features of a view (of each of its frames) before those of its patches: 1 where the class token
            is kept.
        max_tiles: Tiles of an image that the tower sees together, and has no view of the whole beside them; None if
            every view is by itself.
        computes_absent: Whether an image costs ``max_tiles`` tiles, however many it has.
        position_axes: 1 for plain positions, 3 for (time, height, width) positions (Qwen2-VL).
        max_document_tokens: Positions that the decoder knows; None: any number.
        padding: Whether the model wants to know which patches show padding (Molmo).
        pooled_side: Side of the square of features that each view becomes whatever its grid (MM1.5); None: one feature
            for each merged square.
    """

    placement: Placement = Placement.NONE
    patch_size: int = 14
    merge: int = 1
    channels: int = 3
    cost_per_patch: float = 1.0
    fixed_grid: tuple[int, int] | None = None
    position_axes: int = 1
    max_document_tokens: int | None = None
    class_features: int = 0
    max_tiles: int | None = None
    computes_absent: bool = False
    padding: bool = False
    pooled_side: int | None = None

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.merge < 1 or self.channels < 1:
            raise DataConfigError(f"patch_size, merge and channels must be at least 1, got {self}")
        if self.position_axes not in (1, 3):
            raise DataConfigError(f"position_axes={self.position_axes}: must be 1 or 3")
        if self.class_features and self.placement not in (Placement.CROSS_ATTENTION, Placement.PAIR):
            raise DataConfigError(f"class_features={self.class_features}: only where features are attended or compared")

    @cached_property
    def patch_dim(self) -> int:
        """Values of one flattened patch, order (channel, row, column)."""
        return self.channels * self.patch_size**2

    @cached_property
    def size_multiple(self) -> int:
        """Image sides must be multiples of this many pixels."""
        return self.patch_size * self.merge

    @property
    def needs_embedded(self) -> bool:
        """Whether each batch must hold an item that is written into token slots."""
        return self.placement in (Placement.EMBEDDING, Placement.HYBRID)

    @property
    def needs_attended(self) -> bool:
        """Whether each batch must hold an item that is attended."""
        return self.placement in (Placement.CROSS_ATTENTION, Placement.HYBRID)

    @property
    def needs_apart(self) -> bool:
        """Whether each batch must hold an item that has no token slots: it is attended, or compared."""
        return self.needs_attended or self.placement is Placement.PAIR

    @cached_property
    def patches_per_image(self) -> int | None:
        """Patches that the tower computes for any image; None: those that its views have."""
        if self.max_tiles is None or not self.computes_absent:
            return None
        _, height, width = self.minimal_grid
        return self.max_tiles * height * width

    @property
    def minimal_grid(self) -> Grid:
        """The smallest legal view: what a null document carries."""
        height, width = self.fixed_grid or (self.merge, self.merge)
        return (1, height, width)

    def feature_grid(self, grid: Grid) -> Grid:
        """Features along (time, height, width) of one view of ``grid`` patches.

        Raises:
            SampleError: the grid does not fit ``merge`` or ``fixed_grid``.
        """
        time, height, width = grid
        if height % self.merge or width % self.merge or min(grid) < 1:
            raise SampleError(f"a view of {height}x{width} patches cannot be merged by {self.merge}x{self.merge}")
        if self.fixed_grid is not None and (height, width) != self.fixed_grid:
            raise SampleError(f"a view of {height}x{width} patches; the vision tower takes {self.fixed_grid} only")
        if self.pooled_side is not None:
            return time, self.pooled_side, self.pooled_side
        return time, height // self.merge, width // self.merge

    def num_features(self, grid: Grid) -> int:
        """Features that one view of ``grid`` patches hands to the decoder.

        Raises:
            SampleError: as ``feature_grid``.
        """
        time, rows, columns = self.feature_grid(grid)
        return time * (rows * columns + self.class_features)
