"""The order of the tokens of an image in the text: placeholders of its features, and layout tokens around them.

    start | tags of attended tiles | crop_start, tag, rows of features, crop_end | break | ... | anchor | end

The layout is a pure function of the crops. An embedded crop contributes its features. An attended crop contributes at
most its tag (``attended_tags``). An image without any embedded crop gets one anchor token. ``document_builder``
computes positions, labels and token slots.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import model_validator

from data_pipeline.document import MediaItem
from data_pipeline.errors import DataConfigError
from data_pipeline.images.tilings import Tiles
from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.text.tokenizer import Tokenizer

Ids = tuple[int, ...]
_NAMES = ("start", "end", "crop_start", "crop_end", "row_end", "row_break")
"""Fields that name one token. ``tile`` and ``overview`` may name a different token for each tile or image."""
_BREAKS = ("tile_row_break", "overview_break")
"""Fields that are ordinary text."""
_PLACEHOLDERS = {"tile": ("n", "row", "column", "image"), "overview": ("image",)}
"""Names that are allowed in braces in a tag."""


class ImageLayoutConfig(StrictConfig):
    """Names of the layout tokens, which the model reads and does not learn.

    Each must be a token of the tokenizer, unless ``spell`` is true.
    """

    start: str | None = None
    """Token before each image: ``<|vision_start|>`` (Qwen2-VL), ``<img>`` (InternVL). null for none."""
    end: str | None = None
    """Token after each image: ``<|vision_end|>``, ``</img>``, ``[IMG_END]`` (Pixtral). null for none."""
    crop_start: str | None = None
    """Token before each embedded crop and its tag, or before all tiles if ``join_tiles``: ``<im_start>`` (Molmo). null
    for none."""
    crop_end: str | None = None
    """Token that closes ``crop_start``: ``<im_end>``. null for none."""
    row_end: str | None = None
    """Token after each row of features: ``|NEWLINE|`` (Fuyu), ``<im_col>`` (Molmo). null for none."""
    row_break: str | None = None
    """Token between two rows of features: ``[IMG_BREAK]`` (Pixtral). null for none."""
    tile: str | None = None
    """Tag before each tile: ``<tile_{n}>`` (NVLM). ``{n}`` is the number of the tile, ``{row}`` and ``{column}`` its
    cell in the tiling, and ``{image}`` the number of its image in the sample, all from 1. ``{image}`` needs ``spell``.
    An attended tile has nothing but its tag in the text, and the tag attends that tile alone. null for none."""
    overview: str | None = None
    """Tag before an overview, which may contain ``{image}``: ``<tile_global_thumbnail>``. null for none."""
    tile_row_break: str | None = None
    """Text between two rows of tiles, encoded as ordinary text: a line break (Idefics3). null for none."""
    overview_break: str | None = None
    """Text between the last tile and the overview, encoded as ordinary text: two line breaks (Idefics3). null for
    none."""
    attended_tags: Literal["text", "keys"] = "text"
    """Location of the tags of attended crops: in the ``text`` (NVLM-X), or among the attention ``keys``, as embeddings
    before the features of the crop (NVLM-H)."""
    join_tiles: bool = False
    """Order features by rows of the whole image, across all tiles side by side (Molmo), instead of tile by tile."""
    spell: bool | Literal["tags"] = False
    """Encode the names as ordinary text of one or more tokens (NVLM), instead of as one special token each. ``tags``
    encodes ``tile`` and ``overview`` so, and the other names as tokens (Idefics3)."""

    @model_validator(mode="after")
    def _check_tags(self) -> ImageLayoutConfig:
        for name, known in _PLACEHOLDERS.items():
            tag = getattr(self, name) or ""
            if "{" in re.sub(rf"{{(?:{'|'.join(known)})}}", "", tag):
                words = ", ".join(f"{{{word}}}" for word in known)
                raise ValueError(f"{name}={tag!r}: only {words} is allowed in braces")
            if "{image}" in tag and not self.spell:
                raise ValueError(
                    f"{name}={tag!r}: a sample may have any number of images, so {{image}} cannot name special "
                    "tokens; write tags as text (spell: true)"
                )
        for name in ("tile", "tile_row_break"):
            if getattr(self, name) is not None and self.join_tiles:
                raise ValueError(f"{name} and join_tiles exclude each other: joined tiles are one block")
        return self

    def tags(self, grids: Sequence[Tiles]) -> list[str]:
        """Return all tags that tiles of a sample's first image can have, in tilings with these grids."""
        if self.tile is None:
            return []
        cells = [(index, divmod(index, columns)) for rows, columns in grids for index in range(rows * columns)]
        return list(dict.fromkeys(_tag(self.tile, 0, index, cell) for index, cell in cells))

    def tokens(self, grids: Sequence[Tiles]) -> list[str]:
        """Return the names of all special tokens of the layout; none if they are spelled as text."""
        if self.spell is True:
            return []
        named = [getattr(self, name) for name in (_NAMES if self.spell else (*_NAMES, "overview"))]
        return [*(name for name in named if name is not None), *([] if self.spell else self.tags(grids))]

    def check(self, spec: MediaSpec, grids: Sequence[Tiles]) -> None:
        """Check that the model and the transform support all keys that are set.

        Raises:
            DataConfigError: they do not. The message names the key.
        """
        if spec.placement is Placement.PAIR:
            raise DataConfigError(
                "transforms.layout: the model compares image and text, so the text contains no image tokens"
            )
        rows = [name for name in ("row_end", "row_break", "crop_start", "crop_end") if getattr(self, name) is not None]
        if rows and spec.placement is Placement.CROSS_ATTENTION:
            raise DataConfigError(
                f"transforms.layout.{rows[0]}: the model attends all crops, so the text contains none"
            )
        if self.join_tiles and spec.placement is not Placement.EMBEDDING:
            raise DataConfigError(
                "transforms.layout.join_tiles: the model attends tiles, so the text does not contain them"
            )
        if spec.position_axes == 3 and (self.join_tiles or self.row_end is not None or self.row_break is not None):
            raise DataConfigError(
                "transforms.layout: row_end, row_break and join_tiles cannot be used with positions on three axes, "
                "which the model has (decoder.rope.sections)"
            )
        if self.attended_tags == "keys" and (self.tile is None or not spec.needs_attended):
            raise DataConfigError(
                "transforms.layout.attended_tags=keys: needs the tags themselves (layout.tile), and a model that "
                "attends tiles (connector.kind=hybrid or cross_attention)"
            )
        breaks = [name for name in _BREAKS if getattr(self, name) is not None]
        if breaks and spec.placement is not Placement.EMBEDDING:
            raise DataConfigError(
                f"transforms.layout.{breaks[0]}: the model attends tiles, so the text does not contain them"
            )
        if (self.tile is not None or self.join_tiles or breaks) and not grids:
            names = ", ".join((*breaks, "tile", "join_tiles"))
            raise DataConfigError(f"transforms.layout: {names} need transforms.kind=tiles")


@dataclass(frozen=True)
class LayoutTokens:
    """Tokens of the layout. ``crop`` is the index of an attended crop if they are its tag."""

    ids: Ids
    crop: int | None = None


@dataclass(frozen=True)
class LayoutFeatures:
    """A range of the features of an embedded crop: ``count`` features, starting with number ``first``."""

    crop: int
    first: int
    count: int


@dataclass(frozen=True)
class LayoutAnchor:
    """One token that marks the position of an image without embedded crops."""


LayoutElement = LayoutTokens | LayoutFeatures | LayoutAnchor


def _tag(pattern: str, image: int, index: int, cell: tuple[int, int]) -> str:
    """Return the tag of a tile. Arguments count from 0, and numbers in tags from 1."""
    for word, number in (("n", index), ("row", cell[0]), ("column", cell[1]), ("image", image)):
        pattern = pattern.replace(f"{{{word}}}", str(number + 1))
    return pattern


def _no_ids(_: str) -> Ids:
    return ()


@dataclass(frozen=True)
class ImageLayout:
    """An ``ImageLayoutConfig`` with token ids instead of names; an unused field has no ids.

    Tags are stored as text, because their ids depend on the crop; ``ids_of_tag`` encodes them.
    """

    start: Ids = ()
    end: Ids = ()
    crop_start: Ids = ()
    crop_end: Ids = ()
    row_end: Ids = ()
    row_break: Ids = ()
    tile_row_break: Ids = ()
    overview_break: Ids = ()
    tile: str = ""
    overview: str = ""
    ids_of_tag: Callable[[str], Ids] = field(default=_no_ids, compare=False)
    join_tiles: bool = False
    tags_among_keys: bool = False

    @classmethod
    def resolve(
        cls, config: ImageLayoutConfig, tokenizer: Tokenizer, spec: MediaSpec, grids: Sequence[Tiles]
    ) -> ImageLayout:
        """Look up the token ids of a configuration.

        Args:
            config: Names of the tokens.
            tokenizer: Supplies the ids.
            spec: Requirements of the model.
            grids: Grids of tiles that an image may have; empty for transforms without tiles.

        Raises:
            DataConfigError: a token is missing or is the image token, or the model does not support a key.
        """
        config.check(spec, grids)

        @functools.cache
        def ids(text: str | None, name: str) -> Ids:
            if text is None:
                return ()
            key = f"transforms.layout.{name}"
            spells = config.spell is True or (config.spell and name in _PLACEHOLDERS)
            found = tuple(tokenizer.encode(text)) if spells else (tokenizer.special_id(text, key),)
            if tokenizer.image_id in found:
                raise DataConfigError(f"{key}={text!r}: is the image token, which is reserved for features")
            return found

        for tag in config.tags(grids):
            ids(tag, "tile")  # Raises now, rather than in training, if a tag is not a token.
        ids(config.overview, "overview")
        return cls(
            **{name: ids(getattr(config, name), name) for name in _NAMES},
            **{name: tuple(tokenizer.encode(getattr(config, name) or "")) for name in _BREAKS},
            tile=config.tile or "",
            overview=config.overview or "",
            ids_of_tag=functools.partial(ids, name="tile"),
            join_tiles=config.join_tiles,
            tags_among_keys=config.attended_tags == "keys",
        )

    def tagged(self, crops: Sequence[MediaItem], image: int) -> tuple[MediaItem, ...]:
        """Return the crops of image number ``image`` of a sample, with their tags if these are among the keys."""
        if not self.tags_among_keys:
            return tuple(crops)
        pairs = zip(crops, self._tags(crops, image), strict=True)
        return tuple(crop if crop.embedded else replace(crop, tag=tag) for crop, tag in pairs)

    def elements(self, crops: Sequence[MediaItem], image: int, spec: MediaSpec) -> Iterator[LayoutElement]:
        """Yield the layout of image number ``image`` of a sample, from 0, in order.

        Raises:
            SampleError: the grid of a crop does not fit the model.
        """
        tags = self._tags(crops, image)
        embedded = [number for number, crop in enumerate(crops) if crop.embedded]
        yield from _tokens(self.start)
        for number, crop in enumerate(crops):
            if not crop.embedded and not self.tags_among_keys:
                yield from _tokens(tags[number], number)
        last: MediaItem | None = None
        for block in self._blocks(crops, embedded):
            yield from _tokens(self._break_between(last, crops[block[0]]) + self.crop_start + tags[block[0]])
            last = crops[block[-1]]
            for number, row in enumerate(_rows(crops, block, spec, self._has_rows)):
                yield from _tokens(self.row_break if number else ())
                yield from row
                yield from _tokens(self.row_end)
            yield from _tokens(self.crop_end)
        if not embedded:
            yield LayoutAnchor()
        yield from _tokens(self.end)

    def _break_between(self, last: MediaItem | None, crop: MediaItem) -> Ids:
        """Return the ids between two embedded crops that follow each other."""
        if last is None or last.cell is None:
            return ()
        if crop.cell is None:
            return self.overview_break
        return self.tile_row_break if crop.cell[0] != last.cell[0] else ()

    def _tags(self, crops: Sequence[MediaItem], image: int) -> list[Ids]:
        """Return the tag ids of each crop, empty without a tag. Tiles are numbered in their order."""
        numbers = itertools.count()
        names = [
            _tag(self.overview, image, 0, (0, 0))
            if crop.cell is None
            else _tag(self.tile, image, next(numbers), crop.cell)
            for crop in crops
        ]
        return [self.ids_of_tag(name) if name else () for name in names]

    def _blocks(self, crops: Sequence[MediaItem], embedded: list[int]) -> Iterator[list[int]]:
        """Yield the groups of crops to lay out together: each crop alone, or all tiles if ``join_tiles``."""
        if not self.join_tiles:
            yield from ([number] for number in embedded)
            return
        for _, group in itertools.groupby(embedded, key=lambda number: crops[number].cell is None):
            yield list(group)

    @property
    def _has_rows(self) -> bool:
        return bool(self.row_end or self.row_break or self.join_tiles)


def _tokens(ids: Ids, crop: int | None = None) -> tuple[LayoutTokens, ...]:
    return (LayoutTokens(ids, crop),) if ids else ()


def _rows(
    crops: Sequence[MediaItem], block: list[int], spec: MediaSpec, split_rows: bool
) -> Iterator[list[LayoutFeatures]]:
    """Yield the rows of features of a group of crops; a single row of all features unless ``split_rows``."""
    if not split_rows:
        yield [LayoutFeatures(number, 0, crops[number].num_features(spec)) for number in block]
        return
    for _, group in itertools.groupby(block, key=lambda number: (crops[number].cell or (0, 0))[0]):
        side_by_side = [(number, crops[number].num_features(spec), _width(crops[number], spec)) for number in group]
        for row in range(side_by_side[0][1] // side_by_side[0][2]):
            yield [LayoutFeatures(number, row * width, width) for number, _, width in side_by_side]


def _width(crop: MediaItem, spec: MediaSpec) -> int:
    """Return the number of columns of features that a crop keeps."""
    return (
        spec.of_frames(crop.is_video).feature_grid(crop.grid)[2] if crop.kept_region is None else crop.kept_region.width
    )
