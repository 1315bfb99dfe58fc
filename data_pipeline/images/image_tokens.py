"""Which tokens an image puts into the text, and in which order: features, and the tokens that lay them out.

    start | tags of attended tiles | tag, view_start, rows of features, view_end | ... | anchor | end

A pure function of the views. An embedded view stands with its features; of attended views only tags stand in the text,
and one anchor if nothing of the image is embedded. Not for: positions, labels and slots (``document_builder``).
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
from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.text.tokenizer import Tokenizer

Ids = tuple[int, ...]
_NAMES = ("start", "end", "view_start", "view_end", "row_end", "row_break")
"""Fields that name one token each; ``tile`` and ``overview`` may name one for each tile and image."""
_NUMBERS = {"tile": ("n", "row", "column", "image"), "overview": ("image",)}
"""What may stand in braces in a tag."""


class ImageLayoutConfig(StrictConfig):
    """Names of the tokens; each must be a token of the tokenizer, and none of them is learned."""

    start: str | None = None
    """Opens every image: ``<|vision_start|>`` (Qwen2-VL), ``<img>`` (InternVL)."""
    end: str | None = None
    """Closes every image: ``<|vision_end|>``, ``</img>``, ``[IMG_END]`` (Pixtral)."""
    view_start: str | None = None
    """Opens every embedded view, or all tiles together if they are joined: ``<im_start>`` (Molmo)."""
    view_end: str | None = None
    """Closes what ``view_start`` opens: ``<im_end>``."""
    row_end: str | None = None
    """Closes every row of features: ``|NEWLINE|`` (Fuyu), ``<im_col>`` (Molmo)."""
    row_break: str | None = None
    """Stands between two rows of features: ``[IMG_BREAK]`` (Pixtral)."""
    tile: str | None = None
    """Stands before each tile: ``<tile_{n}>`` (NVLM). ``{n}`` is its number, ``{row}`` and ``{column}`` its place among
    the tiles, ``{image}`` the number of its image in the sample, all from 1; ``{image}`` needs ``spell``. Of an
    attended tile only this tag stands in the text, and attends that tile alone."""
    overview: str | None = None
    """The same for a view of the whole image, with ``{image}`` alone: ``<tile_global_thumbnail>``."""
    attended_tags: Literal["text", "keys"] = "text"
    """Where the tags of attended views stand: ``text`` (NVLM-X), or as embeddings among the ``keys``, in front of the
    view's features (NVLM-H)."""
    join_tiles: bool = False
    """Rows of features run through all tiles side by side, as in the whole image (Molmo)."""
    spell: bool = False
    """Write the names as ordinary text, of several tokens if need be (NVLM), instead of as tokens of their own."""

    @model_validator(mode="after")
    def _check_tags(self) -> ImageLayoutConfig:
        for name, known in _NUMBERS.items():
            tag = getattr(self, name) or ""
            if "{" in re.sub(rf"{{(?:{'|'.join(known)})}}", "", tag):
                words = ", ".join(f"{{{word}}}" for word in known)
                raise ValueError(f"{name}={tag!r}: only {words} may stand in braces")
            if "{image}" in tag and not self.spell:
                raise ValueError(
                    f"{name}={tag!r}: a sample may have any number of images, so {{image}} names no tokens of "
                    "their own; write tags as text (spell: true)"
                )
        if self.tile is not None and self.join_tiles:
            raise ValueError("tile and join_tiles exclude each other: joined tiles have no place for a tag each")
        return self

    def tags(self, max_tiles: int) -> list[str]:
        """All tags that tiles of the first image of a sample can have, so many at most."""
        if self.tile is None:
            return []
        grids = [(rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1)]
        places = [(index, divmod(index, columns)) for rows, columns in grids for index in range(rows * columns)]
        return list(dict.fromkeys(_tag(self.tile, 0, index, place) for index, place in places))

    def tokens(self, max_tiles: int) -> list[str]:
        """Names of all tokens that are of its own; none if it spells them."""
        named = [getattr(self, name) for name in (*_NAMES, "overview")]
        return [] if self.spell else [*(name for name in named if name is not None), *self.tags(max_tiles)]

    def check(self, spec: MediaSpec, max_tiles: int) -> None:
        """Refuses what the model or the transform gives no meaning to.

        Raises:
            DataConfigError: the message names the field.
        """
        if spec.placement is Placement.PAIR:
            raise DataConfigError(
                "transforms.layout: the model compares image and text, nothing of an image stands in the text"
            )
        rows = [name for name in ("row_end", "row_break", "view_start", "view_end") if getattr(self, name) is not None]
        if rows and spec.placement is Placement.CROSS_ATTENTION:
            raise DataConfigError(f"transforms.layout.{rows[0]}: the model attends all views, none stands in the text")
        if self.join_tiles and spec.placement is not Placement.EMBEDDING:
            raise DataConfigError(
                "transforms.layout.join_tiles: the model attends tiles, they do not stand in the text"
            )
        if spec.position_axes == 3 and (self.join_tiles or self.row_end is not None or self.row_break is not None):
            raise DataConfigError(
                "transforms.layout: row_end, row_break and join_tiles have no place among positions on three axes, "
                "which the model uses (decoder.rope.sections)"
            )
        if self.attended_tags == "keys" and (self.tile is None or not spec.needs_attended):
            raise DataConfigError(
                "transforms.layout.attended_tags=keys: needs the tags themselves (layout.tile), and a model that "
                "attends tiles (connector.kind=hybrid or cross_attention)"
            )
        if (self.tile is not None or self.join_tiles) and not max_tiles:
            raise DataConfigError("transforms.layout: tile and join_tiles need transforms.kind=tiles")


@dataclass(frozen=True)
class Text:
    """Tokens; ``view`` is the attended view that they are the tag of."""

    ids: Ids
    view: int | None = None


@dataclass(frozen=True)
class Features:
    """``count`` of the features that a view hands on, from ``first`` on."""

    view: int
    first: int
    count: int


@dataclass(frozen=True)
class Anchor:
    """The place of an image of which nothing is embedded."""


Run = Text | Features | Anchor


def _tag(pattern: str, image: int, index: int, place: tuple[int, int]) -> str:
    """The tag of a tile; everything is counted from 0 here, and from 1 in tags."""
    for word, number in (("n", index), ("row", place[0]), ("column", place[1]), ("image", image)):
        pattern = pattern.replace(f"{{{word}}}", str(number + 1))
    return pattern


def _no_ids(_: str) -> Ids:
    return ()


@dataclass(frozen=True)
class ImageLayout:
    """Ids instead of names; no ids where nothing is to stand. Tags get theirs once the place of a view is known."""

    start: Ids = ()
    end: Ids = ()
    view_start: Ids = ()
    view_end: Ids = ()
    row_end: Ids = ()
    row_break: Ids = ()
    tile: str = ""
    overview: str = ""
    ids_of_tag: Callable[[str], Ids] = field(default=_no_ids, compare=False)
    join_tiles: bool = False
    tags_among_keys: bool = False

    @classmethod
    def resolve(cls, config: ImageLayoutConfig, tokenizer: Tokenizer, spec: MediaSpec, max_tiles: int) -> ImageLayout:
        """Looks the names up.

        Args:
            config: Names of the tokens.
            tokenizer: Whose tokens they are.
            spec: What the model takes.
            max_tiles: Tiles that an image has at most; 0 for transforms without tiles.

        Raises:
            DataConfigError: a token is missing or is the image token, or a name has no use with this model.
        """
        config.check(spec, max_tiles)

        @functools.cache
        def ids(text: str | None, name: str) -> Ids:
            if text is None:
                return ()
            place = f"transforms.layout.{name}"
            found = tuple(tokenizer.encode(text)) if config.spell else (tokenizer.special_id(text, place),)
            if tokenizer.image_id in found:
                raise DataConfigError(f"{place}={text!r}: is the image token, which stands for features alone")
            return found

        for tag in config.tags(max_tiles):
            ids(tag, "tile")  # What is missing is missed now.
        ids(config.overview, "overview")
        return cls(
            **{name: ids(getattr(config, name), name) for name in _NAMES},
            tile=config.tile or "",
            overview=config.overview or "",
            ids_of_tag=functools.partial(ids, name="tile"),
            join_tiles=config.join_tiles,
            tags_among_keys=config.attended_tags == "keys",
        )

    def tagged(self, views: Sequence[MediaItem], image: int) -> tuple[MediaItem, ...]:
        """The views of image ``image`` of a sample; attended ones with their tags, if these stand among the keys."""
        if not self.tags_among_keys:
            return tuple(views)
        pairs = zip(views, self._tags(views, image), strict=True)
        return tuple(view if view.embedded else replace(view, tag=tag) for view, tag in pairs)

    def runs(self, views: Sequence[MediaItem], image: int, spec: MediaSpec) -> Iterator[Run]:
        """The tokens of image ``image`` of a sample in order.

        Raises:
            SampleError: a view does not fit the model.
        """
        tags = self._tags(views, image)
        embedded = [number for number, view in enumerate(views) if view.embedded]
        yield from _text(self.start)
        for number, view in enumerate(views):
            if not view.embedded and not self.tags_among_keys:
                yield from _text(tags[number], number)
        for block in self._blocks(views, embedded):
            yield from _text(tags[block[0]] + self.view_start)
            for number, row in enumerate(_rows(views, block, spec, self._has_rows)):
                yield from _text(self.row_break if number else ())
                yield from row
                yield from _text(self.row_end)
            yield from _text(self.view_end)
        if not embedded:
            yield Anchor()
        yield from _text(self.end)

    def _tags(self, views: Sequence[MediaItem], image: int) -> list[Ids]:
        """The tag of each view; tiles are numbered in their order."""
        numbers = itertools.count()
        names = [
            _tag(self.overview, image, 0, (0, 0))
            if view.place is None
            else _tag(self.tile, image, next(numbers), view.place)
            for view in views
        ]
        return [self.ids_of_tag(name) if name else () for name in names]

    def _blocks(self, views: Sequence[MediaItem], embedded: list[int]) -> Iterator[list[int]]:
        """Views that stand together: each by itself, or all tiles if they are joined."""
        if not self.join_tiles:
            yield from ([number] for number in embedded)
            return
        for _, group in itertools.groupby(embedded, key=lambda number: views[number].place is None):
            yield list(group)

    @property
    def _has_rows(self) -> bool:
        return bool(self.row_end or self.row_break or self.join_tiles)


def _text(ids: Ids, view: int | None = None) -> tuple[Text, ...]:
    return (Text(ids, view),) if ids else ()


def _rows(views: Sequence[MediaItem], block: list[int], spec: MediaSpec, apart: bool) -> Iterator[list[Features]]:
    """Rows of features of a block, the whole of it as one row where nothing stands between them."""
    if not apart:
        yield [Features(number, 0, views[number].num_features(spec)) for number in block]
        return
    for _, group in itertools.groupby(block, key=lambda number: (views[number].place or (0, 0))[0]):
        abreast = [(number, views[number].num_features(spec), _width(views[number], spec)) for number in group]
        for row in range(abreast[0][1] // abreast[0][2]):
            yield [Features(number, row * width, width) for number, _, width in abreast]


def _width(view: MediaItem, spec: MediaSpec) -> int:
    return spec.feature_grid(view.grid)[2] if view.kept is None else view.kept.width
