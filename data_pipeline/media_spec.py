"""The properties of the model that the data pipeline needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import DataConfigError, SampleError

Grid = tuple[int, int, int]
"""Patches of one item along (time, height, width)."""

QuerySizes = tuple[tuple[int, int], ...]
"""Pairs (side, number), ascending: a crop whose longer side has at most ``side`` patches has ``number`` features."""


class SquarePooling(NamedTuple):
    """Squares of patches that become one feature each, in grids whose sides may be no multiple of a square's side.

    Attributes:
        side: Side of a square in patches.
        pads_rows: Whether the rows below the last whole square make further squares; otherwise they make no feature.
        pads_columns: The same for the columns to the right of the last whole square.
    """

    side: int
    pads_rows: bool = False
    pads_columns: bool = False

    def features(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of features of a grid of patches; 0 if it has no square."""
        rows, columns = (
            (length + (self.side - 1) * pads) // self.side
            for length, pads in ((height, self.pads_rows), (width, self.pads_columns))
        )
        return rows, columns


def num_queries(sizes: QuerySizes, grid: Grid) -> int:
    """Return the number of features of each frame of a crop of ``grid`` patches.

    Raises:
        SampleError: the crop is larger than the last of ``sizes``.
    """
    _, height, width = grid
    for side, number in sizes:
        if max(height, width) <= side:
            return number
    raise SampleError(
        f"a crop of {height}x{width} patches; the model takes at most {sizes[-1][0]} patches a side "
        "(connector.projector.queries)"
    )


IMAGE = "image"
"""Name of the modality of images and videos, whose inputs ``MediaSpec`` itself describes."""
VIDEO = "video"
"""Name of the kind of items that videos are for a model with a video projector (``MediaSpec.videos``)."""


class ModalitySpec(ABC):
    """Base class of the inputs of a modality besides images.

    To add a modality, derive a frozen dataclass from this class and give ``MediaSpec`` a field for it, with the name of
    the modality. Every feature of such a modality is written into a token slot. Its tokens take one position each. The
    names of fields with a cost begin with ``cost``.
    """

    dtype: ClassVar[npt.DTypeLike]
    """Number format of the values of an item."""
    noun: ClassVar[str]
    """One item in plain words, for messages: ``clip of sound``."""

    @property
    @abstractmethod
    def cost_per_patch(self) -> float:
        """Time of one row of values in tower and projector relative to one token in the decoder."""

    @property
    @abstractmethod
    def patch_dim(self) -> int:
        """Number of values of one row of an item."""

    @property
    @abstractmethod
    def minimal_grid(self) -> Grid:
        """Grid of the smallest valid item, which a dummy document uses."""

    @property
    @abstractmethod
    def typical_grid(self) -> Grid:
        """Grid of a typical item, for estimates where the data are not known."""

    @abstractmethod
    def num_features(self, grid: Grid) -> int:
        """Return the number of features that tower and projector make of one item; its rows are ``prod(grid)``.

        Raises:
            SampleError: the grid does not fit the model.
        """


Reductions = tuple[tuple[int, int, int], ...]
"""Convolutions or poolings in order, each as (kernel, stride, padding): n rows become (n + 2 p - k) // s + 1."""


def reduced(rows: int, reductions: Reductions) -> int:
    """Return the number of rows after ``reductions``; 0 if there are too few for one of the kernels."""
    for kernel, stride, padding in reductions:
        rows = max(0, (rows + 2 * padding - kernel) // stride + 1)
    return rows


@dataclass(frozen=True)
class AudioSpec(ModalitySpec):
    """The audio inputs of a model: log-mel spectrograms. An item is a chunk of a clip.

    Args:
        num_bins: Mel bins of a frame.
        sample_rate: Samples of sound in a second, Hz.
        window: Samples of the window of a frame.
        hop: Samples between the starts of two frames.
        max_frames: Largest number of frames of a chunk. A longer clip becomes several chunks.
        padded: Whether each chunk is filled with silence up to ``max_frames`` (Whisper); False: chunks have the length
            of the sound.
        extra_frames: Frames of silence that follow the frames of a chunk in its values. The tower's convolutions read
            them, but they give no feature.
        reductions: Convolutions and poolings of tower and projector, which determine the number of features.
        cost_per_frame: Time of one frame in tower and projector relative to one token in the decoder.

    Raises:
        DataConfigError: a number is out of its range, or a chunk of ``max_frames`` frames has no feature.
    """

    dtype: ClassVar[npt.DTypeLike] = np.float32
    noun: ClassVar[str] = "clip of sound"

    num_bins: int = 128
    sample_rate: int = 16000
    window: int = 400
    hop: int = 160
    max_frames: int = 3000
    padded: bool = True
    extra_frames: int = 0
    reductions: Reductions = ()
    cost_per_frame: float = 1.0

    def __post_init__(self) -> None:
        if min(self.num_bins, self.sample_rate, self.hop, self.max_frames) < 1 or self.window < self.hop:
            raise DataConfigError(f"bins, rate, hop and frames must be at least 1, and window at least hop: {self}")
        if self.window % 2:
            raise DataConfigError(f"window={self.window}: must be even, because frames are centred on a sample")
        if self.extra_frames < 0 or (self.padded and self.extra_frames):
            raise DataConfigError(f"extra_frames={self.extra_frames}: needs padded=False, and at least 0")
        if reduced(self.max_frames, self.reductions) < 1:
            raise DataConfigError(f"max_frames={self.max_frames}: a chunk has no feature after {self.reductions}")

    @property
    def features_per_second(self) -> float:
        """Features of a second of sound, by the strides of ``reductions``."""
        return self.sample_rate / self.hop / math.prod(stride for _, stride, _ in self.reductions)

    @property
    def cost_per_patch(self) -> float:
        """Alias of ``cost_per_frame``."""
        return self.cost_per_frame

    @property
    def patch_dim(self) -> int:
        """Number of values of a frame: ``num_bins``."""
        return self.num_bins

    @cached_property
    def minimal_grid(self) -> Grid:
        """Grid of the shortest chunk with a feature."""
        if self.padded:
            return (self.max_frames, 1, 1)
        frames = next(each for each in range(1, self.max_frames + 1) if reduced(each, self.reductions))
        return (frames + self.extra_frames, 1, 1)

    @property
    def typical_grid(self) -> Grid:
        """Grid of a chunk of 10 seconds, or of the longest chunk if that is shorter."""
        typical = 10 * self.sample_rate // self.hop
        frames = self.max_frames if self.padded else min(self.max_frames, typical)
        return (max(frames + self.extra_frames, self.minimal_grid[0]), 1, 1)

    def num_features(self, grid: Grid) -> int:
        """Return the number of features of a chunk of ``grid[0]`` frames, of which ``extra_frames`` are silence.

        Raises:
            SampleError: the chunk is longer than ``max_frames``, or too short for one feature, or not as long as
                ``padded`` requires.
        """
        frames = grid[0] - self.extra_frames
        if grid[1:] != (1, 1) or frames > self.max_frames or (self.padded and frames != self.max_frames):
            raise SampleError(
                f"a chunk of {frames} mel frames; the model takes up to {self.max_frames} (padded={self.padded})"
            )
        features = reduced(frames, self.reductions)
        if features < 1:
            raise SampleError(f"a clip of {frames} mel frames is too short: the model makes no feature of it")
        return features


class Placement(str, Enum):
    """How the decoder uses the features of an image."""

    NONE = "none"
    """The model has no image tower; a sample whose template uses its image is a bad sample."""
    EMBEDDING = "embedding"
    """The features of every crop are written into token slots of the decoder."""
    CROSS_ATTENTION = "cross_attention"
    """The features of every crop are attended by cross-attention; one anchor token marks the position of an image."""
    HYBRID = "hybrid"
    """The features of the overview are written into token slots, those of the tiles are attended (NVLM-H)."""
    PAIR = "pair"
    """No token attends them: the image and the text of a document are compared (CLIP). A document has exactly one
    image."""


@dataclass(frozen=True)
class MediaSpec:
    """The model's inputs, as far as the data pipeline must know them. The pipeline knows nothing else of the model.

    Args:
        placement: How the decoder uses image features.
        patch_size: Side of a square patch, pixels.
        merge: Side of the square of patches that becomes one feature; grids must be multiples of it.
        channels: Colour channels of a patch.
        cost_per_patch: Time of one patch in the tower relative to one token in the decoder (alpha).
        fixed_grid: Patches (height, width) of every crop, for towers with a fixed position table; None at native
            resolution.
        class_features: Features of each frame of a crop before those of its patches: 1 if the class token is kept.
        max_tiles: Largest number of tiles of an image, for towers that process all tiles of an image together and take
            no overview; None if the tower processes each crop alone.
        computes_absent: Whether the tower computes ``max_tiles`` tiles for every image, however many tiles it has.
        position_axes: 1 for plain positions, 3 for (time, height, width) positions (Qwen2-VL).
        max_document_tokens: Number of positions that the decoder supports; None: any number.
        padding: Whether the model needs to know which patches are padding (Molmo).
        pooled_side: Side of the square of features that each crop is pooled to, whatever its grid (MM1.5); None: one
            feature for each merged square.
        query_sizes: Numbers of features of crops by their size, for models with learned queries (Aria); empty for other
            models.
        code_size: Pixels of a code, a side, if batches hold the pixels of images as tokens and the model encodes them
            (``image_tokens.encoded: in_step``); None if they hold stored codes, or no images as tokens.
        pooling: Squares of patches that become one feature, whatever the grid (Baichuan-Omni); None: ``merge`` applies.
        frames_per_patch: Consecutive frames of a video that become one patch (Qwen2-VL: 2).
        videos: The inputs of videos, if a projector of their own makes their features; only ``merge``, ``pooled_side``,
            ``query_sizes`` and ``pooling`` differ. None: a video has the features of an image with several frames.
        tokens_per_second: Time positions for a second of a video, on three axes; None: one for each group of
            ``frames_per_patch`` frames.
        text_after_video: Position of what follows a video on three axes: after its largest position on ``all_axes``, or
            after its largest row or column (``space``).
        audio: The inputs of the modality audio; None if the model takes no sound.

    Raises:
        DataConfigError: ``patch_size``, ``merge`` or ``channels`` is below 1, ``position_axes`` is neither 1 nor 3, or
            ``class_features`` is set and the features are neither attended nor compared. Other values are not checked.
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
    query_sizes: QuerySizes = ()
    code_size: int | None = None
    # Not in ``repr``, from which checkpoints have a fingerprint: it changes no document without videos.
    frames_per_patch: int = field(default=1, repr=False)
    tokens_per_second: float | None = field(default=None, repr=False)
    text_after_video: Literal["all_axes", "space"] = field(default="all_axes", repr=False)
    # ``__repr__`` leaves out what the model lacks.
    pooling: SquarePooling | None = field(default=None, repr=False)
    videos: MediaSpec | None = field(default=None, repr=False)
    audio: AudioSpec | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.merge < 1 or self.channels < 1:
            raise DataConfigError(f"patch_size, merge and channels must be at least 1, got {self}")
        if self.position_axes not in (1, 3):
            raise DataConfigError(f"position_axes={self.position_axes}: must be 1 or 3")
        if self.class_features and self.placement not in (Placement.CROSS_ATTENTION, Placement.PAIR):
            raise DataConfigError(f"class_features={self.class_features}: only where features are attended or compared")

    def __repr__(self) -> str:
        # Checkpoints have a fingerprint of it, so what a model lacks is left out: modalities, and rules of videos.
        shown = [(each.name, getattr(self, each.name)) for each in fields(self) if each.repr]
        rules = {"pooling": None, "videos": None, "tokens_per_second": None, "text_after_video": "all_axes"}
        shown += [(name, getattr(self, name)) for name, usual in rules.items() if getattr(self, name) != usual]
        shown += self.modalities.items()
        return f"MediaSpec({', '.join(f'{name}={value!r}' for name, value in shown)})"

    @cached_property
    def modalities(self) -> dict[str, ModalitySpec]:
        """The inputs of each modality besides images that the model takes, by name."""
        values: list[tuple[str, Any]] = [(each.name, getattr(self, each.name)) for each in fields(self)]
        return {name: value for name, value in values if isinstance(value, ModalitySpec)}

    def inputs_of(self, modality: str) -> MediaSpec | ModalitySpec:
        """Return the inputs of a modality; those of images are this object. Both give ``num_features`` and costs."""
        return self if modality == IMAGE else self.modalities[modality]

    def of_frames(self, is_video: bool) -> MediaSpec:
        """Return the inputs of a video or an image: ``videos`` if it is a video and has a projector of its own."""
        return self.videos if is_video and self.videos is not None else self

    @cached_property
    def needed_kinds(self) -> frozenset[tuple[str, bool]]:
        """(modality or ``VIDEO``, embedded) of each kind of item that every batch must hold.

        All ranks then run all modules.
        """
        images = {(IMAGE, True)} if self.needs_embedded else set()
        images |= {(IMAGE, False)} if self.needs_unembedded else set()
        images |= {(VIDEO, True)} if self.videos is not None else set()
        return frozenset(images | {(name, True) for name in self.modalities})

    @property
    def dtype(self) -> npt.DTypeLike:
        """Number format of pixels."""
        return np.uint8

    @cached_property
    def patch_dim(self) -> int:
        """Number of values of one flattened patch, in order (channel, row, column)."""
        return self.channels * self.patch_size**2

    @property
    def of_codes(self) -> MediaSpec:
        """The inputs of the image tokenizer: a patch is the square of pixels of one code.

        Raises:
            DataConfigError: ``code_size`` is None.
        """
        if self.code_size is None:
            raise DataConfigError(
                "image_tokens.encoded=in_step: the model has no image tokenizer (model.image_tokenizer); add it, or "
                "store token grids with: mmscale data encode, and set encoded: stored"
            )
        return MediaSpec(Placement.EMBEDDING, patch_size=self.code_size)

    @cached_property
    def size_multiple(self) -> int:
        """Number of pixels of which both sides of a crop must be a multiple."""
        return self.patch_size * self.merge

    @property
    def largest_side(self) -> int | None:
        """Largest side of a crop in pixels, with learned queries; None for no limit."""
        return self.query_sizes[-1][0] * self.patch_size if self.query_sizes else None

    @property
    def needs_embedded(self) -> bool:
        """Whether each batch must hold an item that is written into token slots."""
        return self.placement in (Placement.EMBEDDING, Placement.HYBRID)

    @property
    def needs_attended(self) -> bool:
        """Whether each batch must hold an item that cross-attention attends."""
        return self.placement in (Placement.CROSS_ATTENTION, Placement.HYBRID)

    @property
    def needs_unembedded(self) -> bool:
        """Whether each batch must hold an item without token slots, which is attended or compared with a text."""
        return self.needs_attended or self.placement is Placement.PAIR

    @cached_property
    def patches_per_image(self) -> int | None:
        """Number of patches that the tower computes for any image; None if it computes only those of its crops."""
        if self.max_tiles is None or not self.computes_absent:
            return None
        _, height, width = self.minimal_grid
        return self.max_tiles * height * width

    @property
    def minimal_grid(self) -> Grid:
        """Grid of the smallest valid crop, which a dummy document uses."""
        least = self.merge if self.pooling is None else self.pooling.side
        height, width = self.fixed_grid or (least, least)
        return (1, height, width)

    def feature_grid(self, grid: Grid) -> Grid:
        """Return the features along (time, height, width) of one crop of ``grid`` patches, without class features.

        Raises:
            SampleError: the grid does not fit ``merge`` or ``fixed_grid``, exceeds the largest of ``query_sizes``, or
                has no square of ``pooling``.
        """
        time, height, width = grid
        if height % self.merge or width % self.merge or min(grid) < 1:
            raise SampleError(f"a crop of {height}x{width} patches cannot be merged by {self.merge}x{self.merge}")
        if self.fixed_grid is not None and (height, width) != self.fixed_grid:
            raise SampleError(f"a crop of {height}x{width} patches; the vision tower takes {self.fixed_grid} only")
        if self.pooled_side is not None:
            return time, self.pooled_side, self.pooled_side
        if self.query_sizes:
            return time, 1, num_queries(self.query_sizes, grid)
        if self.pooling is not None:
            rows, columns = self.pooling.features(height, width)
            if min(rows, columns) < 1:
                raise SampleError(
                    f"a crop of {height}x{width} patches has no whole square of {self.pooling.side} patches a side"
                )
            return time, rows, columns
        return time, height // self.merge, width // self.merge

    def num_features(self, grid: Grid) -> int:
        """Return the number of features that tower and projector make of one crop of ``grid`` patches.

        Raises:
            SampleError: as ``feature_grid``.
        """
        time, rows, columns = self.feature_grid(grid)
        return time * (rows * columns + self.class_features)
