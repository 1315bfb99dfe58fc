"""Images and videos as token ids of the decoder: codes of an image tokenizer, and the marks around them.

    start | size       | content | codes of row 1, row_end | codes of row 2, row_end | ... | frame_end | end
    start | video_size | content | rows of grid 1 | frame_end | rows of grid 2 | frame_end | ...       | end

``shards/token_grid`` stores the codes, or the model computes them in each step from the pixels; a template decides
whether the model learns them. Not for: images that a vision tower encodes (``transforms``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.images.transforms import ImageTransform, ScaledTransform, TilesTransform, TransformConfig
from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import MediaSpec
from data_pipeline.sample import ImagePart, VideoPart
from data_pipeline.shards.token_grid import GridTimes, decode_grid
from data_pipeline.text.tokenizer import Tokenizer

_MAX_ID = 2**31 - 1
_MARKS = ("start", "content", "row_end", "frame_end", "end")
"""Fields that name one token."""
_BRACES = re.compile(r"{[^}]*}?|}")
_VIDEO_FIELDS = frozenset({"{height}", "{width}", "{frames}", "{fps}", "{seconds}"})
"""Fields that ``video_size`` may contain."""

TokenId = Annotated[int, Field(ge=0, le=_MAX_ID)]
Side = Annotated[int, Field(ge=1, le=1 << 16)]


class ImageTokensConfig(StrictConfig):
    """The image tokenizer of a data set, the ids of its codes in the decoder, and the marks around an image.

    Source: Emu3 (arXiv 2409.18869), section 2.2, with all marks; Janus (arXiv 2410.13848), section 3.2, with ``start``
    and ``end`` alone.
    """

    tokenizer: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the image tokenizer, as ``mmscale data encode`` prints it. Data of another tokenizer are refused. null
    takes the tokenizer that the manifest names; without a manifest, that of each sample."""
    codebook_size: int = Field(ge=1, le=1 << 24)
    """Number of codes of the tokenizer: 32768 (Emu3), 16384 (Janus). A larger code makes a bad sample."""
    first_id: TokenId | None = None
    """Id of code 0 in the decoder; code k has the id ``first_id + k``. 151854 in Emu3, whose vocabulary has the codes.
    A model with a separate head for codes takes the first id after its text vocabulary. Give this or ``ids``."""
    ids: tuple[TokenId, ...] | None = None
    """Id of each code in the decoder, if they are not consecutive; ``codebook_size`` different ids."""
    grid: tuple[Side, Side] | None = None
    """Rows and columns of every image, and of every grid of a video, for models that draw one size: [24, 24] (Janus).
    null accepts any size."""
    encoded: Literal["stored", "in_step"] = "stored"
    """Where the codes come from. ``stored``: the shards hold token grids (``mmscale data encode``). ``in_step``: the
    frozen tokenizer of the model (``model.image_tokenizer``) encodes the pixels in each step, after ``transforms``.
    This needs no second copy of the data and allows augmentation, but every epoch pays for the encoder. Videos need
    ``stored``."""
    start: str | None = None
    """Token before each image or video: ``<|image start|>`` (Emu3), ``<begin_of_image>`` (Janus). null for none."""
    size: str | None = None
    """Text after ``start`` with the size of an image in codes: ``{height}*{width}`` (Emu3). null for none."""
    video_size: str | None = None
    """Text after ``start`` of a video: ``{height}*{width}*{frames} {fps}fps {seconds}s``. ``{height}``, ``{width}`` and
    ``{frames}`` are the size in codes, ``{fps}`` is the rate of the encoded frames and ``{seconds}`` the duration.
    Emu3 has such a text with resolution, rate and duration, whose form is not published. null for none."""
    content: str | None = None
    """Token between size and codes: ``<|image token|>`` (Emu3). null for none."""
    row_end: str | None = None
    """Token after each row of codes: ``<|extra_200|>`` (Emu3). null for none."""
    frame_end: str | None = None
    """Token after all rows of an image, or of each grid of a video: ``<|extra_201|>`` (Emu3). null for none."""
    end: str | None = None
    """Last token of an image or video: ``<|image end|>`` (Emu3), ``<end_of_image>`` (Janus). null for none."""

    @model_validator(mode="after")
    def _check_ids(self) -> ImageTokensConfig:
        if (self.first_id is None) == (self.ids is None):
            raise ValueError("give either first_id or ids, the decoder's ids of the codes")
        if self.ids is not None and len(set(self.ids)) != self.codebook_size:
            raise ValueError(f"ids: {len(set(self.ids))} different ids for codebook_size={self.codebook_size} codes")
        if self.num_ids - 1 > _MAX_ID:
            raise ValueError(f"first_id={self.first_id}: the last code has the id {self.num_ids - 1}, above {_MAX_ID}")
        if self.encoded == "in_step" and (self.first_id is None or self.tokenizer is not None):
            raise ValueError(
                "encoded=in_step: the model's own tokenizer encodes and gives code k the id first_id + k; set "
                "first_id, and leave out ids and tokenizer"
            )
        if self.size is not None and set(_BRACES.findall(self.size)) != {"{height}", "{width}"}:
            raise ValueError(f"size={self.size!r}: expected {{height}} and {{width}}, and nothing else in braces")
        if not set(_BRACES.findall(self.video_size or "")) <= _VIDEO_FIELDS:
            known = ", ".join(sorted(_VIDEO_FIELDS))
            raise ValueError(f"video_size={self.video_size!r}: only {known} are allowed in braces")
        return self

    @property
    def num_ids(self) -> int:
        """Smallest vocabulary that contains the ids of all codes."""
        return 1 + (max(self.ids) if self.ids is not None else (self.first_id or 0) + self.codebook_size - 1)


@dataclass(frozen=True)
class DrawnTokens:
    """The tokens of one image or video.

    Attributes:
        ids: int32 ``(T,)``, marks included.
        is_code: bool ``(T,)``: whether each token is a code; False for marks.
        is_video: Whether they are those of a video.
    """

    ids: npt.NDArray[np.int32]
    is_code: npt.NDArray[np.bool_]
    is_video: bool = False


class DrawnImages:
    """Converts token grids to ids of the decoder.

    Args:
        config: Tokenizer, ids and marks.
        tokenizer: The text tokenizer, which has the marks.

    Attributes:
        code_ids: int32 ``(codebook_size,)``: the decoder's id of each code.
        marks: Id of each mark by its field; a mark that is null is absent.

    Raises:
        DataConfigError: a mark is no token of the text tokenizer; or a mark, the image token or the end token has the
            id of a code.
    """

    def __init__(self, config: ImageTokensConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self._tokenizer = tokenizer
        first = config.first_id or 0
        listed = range(first, first + config.codebook_size) if config.ids is None else config.ids
        self.code_ids = np.array(listed, dtype=np.int32)
        self._reserved = frozenset(listed)
        named = {field: getattr(config, field) for field in _MARKS}
        self.marks = {
            field: tokenizer.special_id(name, f"image_tokens.{field}")
            for field, name in named.items()
            if name is not None
        }
        special = {"the image token": tokenizer.image_id, "the end token": tokenizer.eos_id} | self.marks
        for name, token_id in special.items():
            if token_id in self._reserved:
                raise DataConfigError(
                    f"image_tokens: the id {token_id} of {named.get(name, name)} is also the id of a code; "
                    "correct first_id or ids"
                )

    def spelled_by(self, ids: list[int]) -> bool:
        """Return whether the ids of a text contain a code of an image, which text must not produce."""
        return not self._reserved.isdisjoint(ids)

    def opening(self, height: int, width: int) -> list[int]:
        """Return the ids before the codes of an image of ``height`` rows and ``width`` columns."""
        size = self.config.size
        return self._opened("" if size is None else size.format(height=height, width=width))

    def _opened(self, size: str) -> list[int]:
        text = self._tokenizer.encode(size) if size else []
        return [*self._mark("start"), *text, *self._mark("content")]

    @property
    def row_end(self) -> list[int]:
        """The ids after each row of codes: one or none."""
        return self._mark("row_end")

    @property
    def closing(self) -> list[int]:
        """The ids after the last row of an image."""
        return [*self._mark("frame_end"), *self._mark("end")]

    def tokens(self, part: ImagePart | VideoPart) -> DrawnTokens:
        """Return the tokens of an image or a video.

        Raises:
            SampleError: the sample has no token grid of it, or a damaged one; the grid is of another tokenizer or does
                not have the size ``grid``; a code is outside the codebook; or the model itself encodes images, and this
                is a video.
        """
        config, name = self.config, f"{part.kind} {part.name}"
        if part.grid is None:
            raise SampleError(f"{name} has no token grid; write token grids with: mmscale data encode")
        if config.encoded == "in_step":
            raise SampleError(
                f"{name}: a step encodes images alone (image_tokens.encoded=in_step); set encoded: stored, and write "
                "token grids with: mmscale data encode"
            )
        grid = decode_grid(part.grid, part.name)
        if (grid.times is None) != isinstance(part, ImagePart):
            expected = 2 if isinstance(part, ImagePart) else 3
            raise SampleError(f"{name} has a token grid with {grid.codes.ndim} sides, expected {expected}")
        if config.tokenizer is not None and grid.tokenizer != config.tokenizer:
            raise SampleError(f"{name}: {other_tokenizer(grid.tokenizer, config.tokenizer)}")
        self._check_grid(name, *grid.codes.shape[-2:])
        if grid.codes.max() >= config.codebook_size:
            raise SampleError(
                f"{name} has the code {grid.codes.max()}, but codes end at {config.codebook_size - 1} "
                f"(image_tokens.codebook_size={config.codebook_size})"
            )
        ids = self.code_ids[grid.codes]
        return self._with_marks(ids[None] if grid.times is None else ids, grid.times)

    def uncoded_tokens(self, name: str, height: int, width: int) -> DrawnTokens:
        """Return the tokens of an image whose codes are not known yet: each is code 0 until the model encodes it.

        Args:
            name: Name of the image, for the error.
            height: Rows of codes.
            width: Columns of codes.

        Raises:
            SampleError: the image does not have the size ``grid``.
        """
        self._check_grid(f"image {name}", height, width)
        return self._with_marks(np.full((1, height, width), self.code_ids[0]))

    def _check_grid(self, name: str, height: int, width: int) -> None:
        if self.config.grid is not None and self.config.grid != (height, width):
            rows, columns = self.config.grid
            advice = "encode it at" if self.config.encoded == "stored" else "choose transforms that give"
            raise SampleError(
                f"{name} is a grid of {height}x{width} codes, but the model draws {rows}x{columns} "
                f"(image_tokens.grid); {advice} that size"
            )

    def _with_marks(self, code_ids: npt.NDArray[np.int32], times: GridTimes | None = None) -> DrawnTokens:
        """Return the tokens of an image or a video with the ids ``(time, height, width)`` of its codes.

        ``times`` are those of a video; None for an image, whose codes have one step in time.
        """
        frames, height, width = code_ids.shape
        if times is None:
            opening = self.opening(height, width)
        else:
            seconds, rate = (f"{value:g}" for value in times)
            size = self.config.video_size or ""
            opening = self._opened(size.format(height=height, width=width, frames=frames, fps=rate, seconds=seconds))
        row_end, frame_end, end = (np.array(self._mark(each), np.int32) for each in ("row_end", "frame_end", "end"))
        rows = np.concatenate([code_ids, np.tile(row_end, (frames, height, 1))], axis=2).reshape(frames, -1)
        grids = np.concatenate([rows, np.tile(frame_end, (frames, 1))], axis=1).reshape(-1)
        row = np.arange(width + len(row_end)) < width
        grid = np.pad(np.tile(row, height), (0, len(frame_end)))
        is_code = np.pad(np.tile(grid, frames), (len(opening), len(end)))
        ids = np.concatenate([np.array(opening, np.int32), grids, end])
        return DrawnTokens(ids, is_code, is_video=times is not None)

    def _mark(self, field: str) -> list[int]:
        return [self.marks[field]] if field in self.marks else []


def example_tokens(config: ImageTokensConfig, height: int, width: int) -> DrawnTokens:
    """Return the tokens of an image of ``height`` rows and ``width`` columns of codes, without a text tokenizer.

    All codes are code 0 and all marks have the id 0. The size in ``size`` counts as one token for each character.
    """
    first = (config.first_id or 0) if config.ids is None else config.ids[0]
    size = "" if config.size is None else config.size.format(height=height, width=width)
    before = sum(mark is not None for mark in (config.start, config.content)) + len(size)
    after = sum(mark is not None for mark in (config.frame_end, config.end))
    row = [True] * width + [False] * (config.row_end is not None)
    is_code = np.array([False] * before + row * height + [False] * after)
    return DrawnTokens(np.where(is_code, first, 0).astype(np.int32), is_code)


def other_tokenizer(found: str, expected: str) -> str:
    """Return the reason why data of the image tokenizer ``found`` are refused where ``expected`` is named."""
    return (
        f"its token grids are of the image tokenizer {found[:12]}..., but image_tokens.tokenizer names "
        f"{expected[:12]}...; codes of different tokenizers mean different images, so encode the data again with: "
        "mmscale data encode"
    )


def code_transform(config: TransformConfig, spec: MediaSpec) -> ImageTransform:
    """Return the transform of the images that the model's tokenizer encodes.

    Raises:
        DataConfigError: the transform cuts an image into several crops or does not fit the size of a code, or the model
            has no tokenizer.
    """
    codes = spec.of_codes
    if isinstance(config, TilesTransform) or (isinstance(config, ScaledTransform) and config.split is not None):
        raise DataConfigError(
            f"transforms.kind={config.kind}: cuts an image into several crops, but token ids are of one image; "
            "use fixed or native"
        )
    return ImageTransform(config, codes)
