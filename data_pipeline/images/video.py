"""Convert a video to an item of frame patches: choose frames, decode them, resize, and cut them into patches.

    VideoSize --VideoTransform.dry_run--> item (time, rows, columns), without pixels
    bytes --VideoTransform.decode_task, decode--> the same item with pixels

Number, size and grid of the frames depend on the index alone, so a document is planned without decoding, as with
images. A tower whose patches span several frames (Qwen2-VL: 2) gets groups of consecutive chosen frames; the last one
is repeated to fill its group. With ``tiling`` or ``scaled``, each frame becomes the crops that an image of its size
becomes, and each crop of each frame is an item. Nothing is random: the same video gives the same item in every epoch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from data_pipeline.document import MediaItem
from data_pipeline.errors import DataConfigError, FaultKind, SampleError
from data_pipeline.images.crops import ImagePlan, patchify, render, resize_all
from data_pipeline.images.decode import Pixels
from data_pipeline.images.frame_choice import FrameChoice, RateChoice, frame_rate
from data_pipeline.images.image_tokens import ImageLayout
from data_pipeline.images.native_sizes import Size, area_size
from data_pipeline.images.stored_frames import open_video
from data_pipeline.images.tilings import Idefics3Tiling, TilingConfig
from data_pipeline.images.transforms import ImageTransform, ScaledTransform, TilesTransform
from data_pipeline.images.video_layout import VideoLayout, check_intro, check_pattern, filled, group_times, introduced
from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import Grid, MediaSpec, Placement
from data_pipeline.sample import MediaPart, StoredFrames, VideoPart, VideoSize
from data_pipeline.shards.video_file import MAX_FRAME_PIXELS, video_size
from data_pipeline.text.tokenizer import Tokenizer

_BLACK = np.uint8(0)
_PIXELS_TOGETHER = 1 << 19
"""Decoded frames of at most this many pixels together are resized in one call, which takes a third less time than one
call for each frame of 320x240 pixels. Larger ones do not stay in the processor's cache."""
_FLOOR = 1.05
"""With ``max_tokens``, a frame keeps at least this multiple of ``min_pixels``, and one merged patch."""


class ScaledFrames(StrictConfig):
    """Sides of frames with one length of the longer side; see ``ScaledTransform``."""

    longer: int = Field(default=490, ge=1, le=1 << 16)
    """Longer side of a frame in pixels, 1 to 65536, a multiple of patch size times merge. The aspect is kept."""
    shorter: int = Field(default=336, ge=1, le=1 << 16)
    """Least shorter side in pixels, from 1, at most ``longer``. A narrower frame is stretched to it."""

    @model_validator(mode="after")
    def _ordered(self) -> ScaledFrames:
        if self.shorter > self.longer:
            raise ValueError(f"shorter={self.shorter} is above longer={self.longer}")
        return self


class VideoConfig(StrictConfig):
    """How a video becomes frames, patches and tokens."""

    frames: FrameChoice = RateChoice()
    """Which frames are used: a ``rate`` in frames per second, a ``uniform`` number, the frames at given ``times``, or a
    rate up to a largest number, ``trimmed`` at both ends (SmolVLM)."""
    min_pixels: int = Field(default=128 * 28 * 28, ge=1)
    """Frames with fewer pixels are enlarged to at least this many; at least 1. A tower with a fixed size has frames of
    that size, and ignores this key, ``max_pixels`` and ``max_tokens``."""
    max_pixels: int = Field(default=768 * 28 * 28, ge=1)
    """Frames with more pixels are reduced to at most this many. At least ``min_pixels`` and one merged patch."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Largest number of tokens of a video: its frames are reduced to it, but to no less than 1.05 times ``min_pixels``
    (Qwen2-VL's authors: 115200). null for no limit but ``max_pixels``."""
    tiling: TilingConfig | None = None
    """Rule by which every frame is cut into tiles of the tower's size, most with an overview, as in ``transforms``
    (Baichuan-Omni). Each crop of each frame is then an item. Needs a tower with a fixed square size that reads single
    frames. null: a frame is one crop."""
    tile_size: int | None = Field(default=None, ge=1, le=1 << 16)
    """Side of a tile of ``tiling`` in pixels, 1 to 65536, as ``transforms.size``; null uses the tower's fixed size."""
    scaled: ScaledFrames | None = None
    """Resize and pad each frame as ``transforms.kind: scaled`` does an image (Aria), instead of by ``min_pixels`` and
    ``max_pixels``. Each frame is then an item. Needs a tower that reads single frames of any size. null: do not."""
    max_aspect: float = Field(default=200.0, ge=1)
    """Largest ratio of the longer side to the shorter side, at least 1. A sample above it is a bad sample."""
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    """Resize filter, always antialiased."""
    max_frame_pixels: int = Field(default=1 << 24, ge=1, le=MAX_FRAME_PIXELS)
    """Largest number of pixels of a stored frame, at most 67108864. A larger one is a bad sample, found before
    decoding."""
    max_decoded_frames: int = Field(default=1 << 16, ge=1)
    """Largest number of stored frames to decode for one video, at least 1. Decoding starts at the key frame before each
    used frame. A video that needs more is a bad sample."""
    start: str | tuple[str, ...] | None = None
    """Token before each video: ``<|vision_start|>`` (Qwen2-VL), or a list of them. null for none."""
    end: str | None = None
    """Token after each video: ``<|vision_end|>``. null for none."""
    placeholder: str | None = None
    """Token that stands for each feature: ``<|video_pad|>``. null for the tokenizer's image token."""
    timestamps: str | None = None
    """Text before each frame, or group of frames that share a patch: ``<{seconds:.1f} seconds>`` (Qwen3-VL),
    ``Frame{n}: `` (InternVL). ``{seconds}`` and ``{clock}`` (01:05) are its time, ``{n}`` is its number from 1.
    ``start`` and ``end`` then enclose each of them. Positions on three axes begin anew with each of them. null for no
    text."""
    frame_break: str | None = None
    """Text between two frames, or groups; needs ``timestamps``, which may be empty: a line break (InternVL). null for
    none."""
    intro: str | None = None
    """Text before the first frame; needs ``timestamps``. ``{frames}`` is the number of frames, ``{words}`` the same in
    English words, and ``{duration}`` that of the video in hours, minutes and seconds: 0:01:05 (SmolVLM). null for
    none."""
    outro: str | None = None
    """Text after the last frame; needs ``timestamps``: two line breaks (SmolVLM). null for none."""

    def names_of(self, key: str) -> tuple[str, ...]:
        """Return the names of the tokens of ``start``, ``end`` or ``placeholder``."""
        value = getattr(self, key)
        return (value,) if isinstance(value, str) else value or ()

    @model_validator(mode="after")
    def _ordered(self) -> VideoConfig:
        if self.max_pixels < self.min_pixels:
            raise ValueError(f"max_pixels={self.max_pixels} is below min_pixels={self.min_pixels}")
        check_pattern(self.timestamps or "")
        check_intro(self.intro or "")
        for name in ("frame_break", "intro", "outro"):
            if getattr(self, name) is not None and self.timestamps is None:
                raise ValueError(f"{name} needs timestamps; for no text before each frame, set them to ''")
        one_crop = self.tiling is None or (isinstance(self.tiling, Idefics3Tiling) and not self.tiling.split)
        if self.timestamps is not None and not one_crop:
            raise ValueError("timestamps and tiling exclude each other: texts before the tiles of a frame are unknown")
        if self.tile_size is not None and self.tiling is None:
            raise ValueError("tile_size needs tiling")
        if self.scaled is not None and self.tiling is not None:
            raise ValueError("scaled and tiling exclude each other: both resize a frame")
        return self


class VideoTransform:
    """Converts the encoded videos of one data set to items.

    Args:
        config: The videos of the data set.
        spec: Requirements of the model.

    Raises:
        DataConfigError: the model cannot use videos, ``tiling`` or ``scaled``, or ``max_pixels`` is below one merged
            patch.
    """

    def __init__(self, config: VideoConfig, spec: MediaSpec) -> None:
        if spec.placement is not Placement.EMBEDDING or spec.max_tiles is not None or spec.channels != 3:
            # Attended features have no position, so the order of frames would be lost.
            raise DataConfigError(
                "data.video: needs a model that writes the features of colour frames into token slots, whose positions "
                "are their times (connector.kind=embedding, without vision.tiles); leave it out"
            )
        self.config = config
        self.spec = spec = spec.of_frames(is_video=True)
        if config.max_pixels < spec.size_multiple**2:
            raise DataConfigError(
                f"data.video.max_pixels={config.max_pixels}: must be at least one merged patch, "
                f"{spec.size_multiple**2} pixels"
            )
        self.frames: ImageTransform | None = None
        if config.tiling is not None or config.scaled is not None:
            name = "data.video.scaled" if config.tiling is None else "data.video.tiling"
            if spec.frames_per_patch > 1:
                raise DataConfigError(
                    f"{name}: cuts single frames, and a patch of the model spans several (vision.temporal_patch); "
                    "leave it out"
                )
            try:
                self.frames = ImageTransform(_frame_transform(config), spec)
            except DataConfigError as error:
                raise DataConfigError(f"{name}: each frame is an image, and {error}") from error

    def decode_task(self, part: VideoPart) -> VideoTask:
        """Plan a video, and return a task that decodes it later.

        Raises:
            SampleError: as ``dry_run``; without a size from the index, also if the file is damaged.
        """
        size = video_size(part.data) if part.size is None else part.size
        count, grid = self._plan(size)
        if self.frames is not None:
            plan = self.frames.plan(size[2:])
            return VideoTask(self, part.data, size, count, self._tiles(count, plan, is_black=False), plan)
        return VideoTask(self, part.data, size, count, (self._item(size, count, grid, is_black=False),))

    def dry_run(self, size: VideoSize) -> tuple[MediaItem, ...]:
        """Return the items of a video of this size with black pixels, which take no memory.

        Raises:
            SampleError: the size is unknown (0), or the frames are too large or too elongated, or are missing.
        """
        count, grid = self._plan(size)
        if self.frames is not None:
            return self._tiles(count, self.frames.plan(size[2:]), is_black=True)
        return (self._item(size, count, grid, is_black=True),)

    def _plan(self, size: VideoSize) -> tuple[int, Grid]:
        """Return the number of frames, and the grid of their patches."""
        config, patch = self.config, self.spec.patch_size
        if size.num_frames < 1:
            raise SampleError(
                "the index has no size for this video: the file is damaged, its stored frames differ in size, or the "
                "index is old; then build it again with: mmscale data index",
                kind=FaultKind.DECODE,
            )
        if size.height * size.width > config.max_frame_pixels:
            raise SampleError(
                f"a video of {size.width}x{size.height} pixels, the limit is {config.max_frame_pixels} pixels "
                "(video.max_frame_pixels)",
                kind=FaultKind.DECODE,
            )
        if max(size[2:]) > config.max_aspect * min(size[2:]):
            raise SampleError(
                f"a video of {size.width}x{size.height} pixels, the largest aspect is {config.max_aspect:g} "
                "(video.max_aspect)",
                kind=FaultKind.DECODE,
            )
        count = config.frames.count(size, self.spec.frames_per_patch)
        height, width = self._frame_size(size, count)
        return count, (-(-count // self.spec.frames_per_patch), height // patch, width // patch)

    def _frame_size(self, size: VideoSize, count: int) -> Size:
        config, spec = self.config, self.spec
        if spec.fixed_grid is not None:
            return spec.fixed_grid[0] * spec.patch_size, spec.fixed_grid[1] * spec.patch_size
        most = config.max_pixels
        if config.max_tokens is not None:  # The tokens of all groups of frames together.
            num_groups = -(-count // spec.frames_per_patch)
            share = config.max_tokens * spec.size_multiple**2 // num_groups
            most = max(min(most, share), int(_FLOOR * config.min_pixels), spec.size_multiple**2)
        return area_size(size.height, size.width, spec.size_multiple, config.min_pixels, most)

    def _tiles(self, count: int, plan: ImagePlan, is_black: bool) -> tuple[MediaItem, ...]:
        """Return the crops of each frame in turn."""
        assert self.frames is not None, "only with tiling"
        frames = (self.frames.items(plan, is_black) for _ in range(count))
        return tuple(replace(crop, is_video=True) for frame in frames for crop in frame)

    def _item(self, size: VideoSize, count: int, grid: Grid, is_black: bool) -> MediaItem:
        num_later = self.spec.frames_per_patch - 1 if count > 1 else 0  # One frame is a still image.

        def patches(width: int) -> npt.NDArray[np.uint8]:
            shape = (math.prod(grid), width)
            return np.broadcast_to(_BLACK, shape) if is_black else np.empty(shape, np.uint8)

        later = patches(num_later * self.spec.patch_dim) if num_later else None
        # The mean rate of the chosen frames, in the order of operations of the authors' code.
        chosen_rate = count / size.num_frames * frame_rate(size)
        seconds = self.spec.frames_per_patch / chosen_rate if count > 1 else None
        return MediaItem(
            patches(self.spec.patch_dim),
            grid,
            embedded=True,
            later_values=later,
            seconds_per_step=seconds,
            is_video=True,
        )


def _frame_transform(config: VideoConfig) -> TilesTransform | ScaledTransform:
    """Return the transform by which each frame becomes the crops of an image."""
    if config.tiling is not None:
        return TilesTransform(tiling=config.tiling, size=config.tile_size, interpolation=config.interpolation)
    assert config.scaled is not None, "one of both is set"
    return ScaledTransform(**config.scaled.model_dump(), interpolation=config.interpolation)


@dataclass(frozen=True)
class VideoTask:
    """A planned video that is not decoded yet.

    Attributes:
        transform: The transform that planned it.
        data: The encoded video, or its encoded frames.
        size: The size that the plan is for.
        count: Number of its frames.
        crops: Its items, with uninitialised values until ``decode`` has run: one, or with ``tiling`` the crops of each
            frame in turn.
        plan: The plan of a frame, with ``tiling``.
    """

    transform: VideoTransform
    data: bytes | StoredFrames
    size: VideoSize
    count: int
    crops: tuple[MediaItem, ...]
    plan: ImagePlan | None = None

    @property
    def item(self) -> MediaItem:
        """The first item, which without ``tiling`` is the only one."""
        return self.crops[0]

    def decode(self) -> None:
        """Decode the frames and write the values of the item. Call it once, from any thread.

        Memory is bounded by the frames that the codec refers to, one decoded frame or ``_PIXELS_TOGETHER`` pixels, the
        item, and a copy of the encoded video.

        Raises:
            SampleError: the file is damaged, or its size is not the planned one, or too many frames must be decoded.
        """
        config, spec = self.transform.config, self.transform.spec
        _, rows, columns = self.item.grid
        frame_size = (rows * spec.patch_size, columns * spec.patch_size)
        with open_video(self.data, config.max_frame_pixels) as file:
            self._check(VideoSize(file.num_frames, file.microseconds, *self.size[2:]))
            numbers = config.frames.numbers(file.times, self.size, self.count)
            if (needed := file.num_decoded(numbers)) > config.max_decoded_frames:
                raise SampleError(
                    f"a video of which {needed} frames must be decoded, the limit is {config.max_decoded_frames} "
                    "(video.max_decoded_frames)",
                    kind=FaultKind.DECODE,
                )
            # The last frame fills its group.
            last = len(numbers) if self.item.later_values is None else self.item.grid[0] * spec.frames_per_patch
            places: dict[int, list[int]] = {}
            for place, number in enumerate([*numbers, *[numbers[-1]] * (last - len(numbers))]):
                places.setdefault(number, []).append(place)
            decoded = file.decode(numbers)
            num_together = max(1, _PIXELS_TOGETHER // (self.size.height * self.size.width))
            while some := list(itertools.islice(decoded, num_together)):
                frames: Sequence[Pixels] = [pixels for _, pixels in some]
                for pixels in frames:
                    self._check(VideoSize(file.num_frames, file.microseconds, *pixels.shape[:2]))
                if self.plan is None:
                    frames = resize_all(frames, frame_size, config.interpolation)
                for (number, _), pixels in zip(some, frames, strict=True):
                    for place in places[number]:
                        self._write(place, pixels)

    def _check(self, found: VideoSize) -> None:
        if found != self.size:
            raise SampleError(
                f"a video with {_words(found)}, the index says {_words(self.size)}; if the index is old, build it "
                "again with: mmscale data index",
                kind=FaultKind.DECODE,
            )

    def _write(self, place: int, pixels: Pixels) -> None:
        """Write the patches of the frame at ``place`` among the chosen frames.

        Args:
            place: Number among the chosen frames.
            pixels: The frame as it is stored with ``tiling``, otherwise resized.
        """
        if self.plan is not None:
            num_crops = len(self.plan.crops)
            values = [crop.values for crop in self.crops[place * num_crops : (place + 1) * num_crops]]
            render(pixels, self.plan, self.transform.spec.patch_size, self.transform.config.interpolation, values)
            return
        spec, (time, rows, columns) = self.transform.spec, self.item.grid
        if self.item.later_values is None:
            out = self.item.values.reshape(time, rows * columns, -1)[place]
        else:
            group, frame = divmod(place, spec.frames_per_patch)
            out = self.item.values.reshape(time, rows * columns, -1)[group]
            if frame > 0:
                later = self.item.later_values.reshape(time, rows * columns, spec.frames_per_patch - 1, -1)
                out = later[group, :, frame - 1]
        if out.flags.c_contiguous:
            patchify(pixels, spec.patch_size, out)
        else:  # More than two frames a patch.
            patches = np.empty(out.shape, np.uint8)
            patchify(pixels, spec.patch_size, patches)
            out[:] = patches


def _words(size: VideoSize) -> str:
    return f"{size.num_frames} frames of {size.width}x{size.height} pixels in {size.microseconds / 1e6:g} s"


class Videos:
    """The videos of a data set: their transform, and their tokens with ids instead of names.

    Attributes:
        placeholder: Id of the token that stands for each feature.
        start, end: Ids of the tokens before and after each video.

    Raises:
        DataConfigError: as ``VideoTransform``, or the tokenizer lacks a token.
    """

    def __init__(self, config: VideoConfig, tokenizer: Tokenizer, spec: MediaSpec) -> None:
        self.transform = VideoTransform(config, spec)
        named = {key: config.names_of(key) for key in ("start", "end", "placeholder")}
        ids = {
            key: tuple(tokenizer.special_id(name, f"data.video.{key}") for name in names)
            for key, names in named.items()
        }
        self.placeholder = next(iter(ids["placeholder"]), tokenizer.image_id)
        if {self.placeholder, tokenizer.image_id} & {*ids["start"], *ids["end"]}:
            raise DataConfigError("data.video: start and end must differ from the tokens that stand for features")
        self.start, self.end = ids["start"], ids["end"]
        self._layout = ImageLayout(self.start, self.end)
        self._encode = functools.lru_cache(maxsize=1 << 16)(lambda words: tuple(tokenizer.encode(words)))
        pairs = ((name, token) for key in ids for name, token in zip(named[key], ids[key], strict=True))
        self.reserved = {name: token for name, token in pairs if token != tokenizer.image_id}

    def dry_run(self, part: MediaPart) -> tuple[MediaItem, ...]:
        """Return the items of a video without decoding it; without a size from the index, its header is read.

        Raises:
            SampleError: as ``VideoTransform.dry_run``.
        """
        assert isinstance(part, VideoPart), "no other part is a video"
        return self.transform.dry_run(part.size or video_size(part.data))

    def decode_task(self, part: MediaPart) -> VideoTask:
        """Plan a video, as ``VideoTransform.decode_task``."""
        assert isinstance(part, VideoPart), "no other part is a video"
        return self.transform.decode_task(part)

    def layout_of(self, part: VideoPart) -> ImageLayout | VideoLayout:
        """Return the layout of a video. Times in it are those of a constant frame rate, which the index gives.

        Raises:
            SampleError: as ``VideoTransform.decode_task``.
        """
        config, transform = self.transform.config, self.transform
        if config.timestamps is None:
            return self._layout
        size = part.size or video_size(part.data)
        times = config.frames.planned_times(size, config.frames.count(size, transform.spec.frames_per_patch))
        groups = group_times(times, transform.spec.frames_per_patch)
        texts = [filled(config.timestamps, time, i) for i, time in enumerate(groups, 1)]
        if config.intro is not None or config.outro is not None:
            texts[0] = ""  # It belongs to ``texts_around``.
        # Neighbouring texts are encoded as one, because a tokenizer may join letters across their border.
        whole = [texts[0], *((config.frame_break or "") + text for text in texts[1:])]
        return VideoLayout(self._layout.start, self._layout.end, tuple(map(self._encode, whole)))

    def texts_around(self, part: VideoPart) -> tuple[str, str]:
        """Return the texts before and after a video with ``intro`` or ``outro``; empty without both.

        They are ordinary text, so that a template may join them with the text of a turn.

        Raises:
            SampleError: as ``VideoTransform.decode_task``.
        """
        config = self.transform.config
        if config.timestamps is None or (config.intro is None and config.outro is None):
            return "", ""
        size = part.size or video_size(part.data)
        times = config.frames.planned_times(size, config.frames.count(size, self.transform.spec.frames_per_patch))
        first = group_times(times, self.transform.spec.frames_per_patch)[0]
        intro = introduced(config.intro or "", len(times), size.microseconds / 1e6)
        return intro + filled(config.timestamps, first, 1), config.outro or ""
