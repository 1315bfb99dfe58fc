"""A document under construction: token ids, labels, positions, token slots of features, and attention spans.

``document_builder`` appends the pieces of a sample to it in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from data_pipeline.document import IGNORE, Document, ImageExtent, MediaItem, Span
from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.images.drawn_images import DrawnTokens
from data_pipeline.images.image_tokens import ImageLayout, LayoutAnchor, LayoutElement, LayoutFeatures, LayoutTokens
from data_pipeline.images.video_layout import VideoLayout
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.sample import Provenance

_NO_SLOTS = np.empty(0, dtype=np.int32)
_LAST_TIME = 1 << 24
"""Largest time position of a video: float32, in which angles are computed, holds whole numbers up to it."""


@dataclass
class Draft:
    """A document under construction.

    The columns are Python lists until the end: for the few tokens of a caption they are faster than numpy.
    """

    spec: MediaSpec
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    """Each token's own id or ``IGNORE``; not yet shifted by one as in ``Document.labels``."""
    weights: list[float] = field(default_factory=list)
    positions: list[npt.NDArray[np.int32]] = field(default_factory=list)
    next_position: int = 0
    items: list[MediaItem] = field(default_factory=list)
    images: list[ImageExtent] = field(default_factory=list)
    scatter_index: list[npt.NDArray[np.int32]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    attended: tuple[int, ...] = ()
    """Attended items of the last image and of the images directly before it, without text or sound between them."""
    drawn: list[tuple[int, npt.NDArray[np.bool_]]] = field(default_factory=list)
    """First token of each image as tokens, and which of its tokens are codes."""
    uncoded: list[MediaItem] = field(default_factory=list)
    """The images as tokens whose codes the model computes."""
    branches: list[int] = field(default_factory=list)
    fork: int = 0
    """Position at which every branch starts."""
    repeated: tuple[int, ...] = ()
    """The token that every branch begins with; empty without ``BranchPiece.repeats_last``."""

    def add_tokens(self, ids: Sequence[int], weight: float) -> None:
        """Append tokens with the same loss weight; tokens of weight 0 get no label."""
        if self.spec.position_axes == 3:
            steps = np.arange(self.next_position, self.next_position + len(ids), dtype=np.int32)
            self.positions.append(np.repeat(steps[:, None], 3, axis=1))
        self.ids.extend(ids)
        self.labels.extend(ids if weight else [IGNORE] * len(ids))
        self.weights.extend([weight] * len(ids))
        self.next_position += len(ids)

    def begin_branch(self, repeats_last: bool = False) -> None:
        """Begin a branch. Its positions start where those of the first branch start."""
        if not self.branches:
            if repeats_last:
                self._take_last()
            self.fork = self.next_position
        self.branches.append(len(self.ids))
        self.next_position = self.fork
        self.add_tokens(self.repeated, 0.0)

    def _take_last(self) -> None:
        """Remove the last token, which every branch then begins with. Raises ``SampleError`` if it is no text."""
        if len(self.ids) < 2 or (self.images and self.images[-1].stop == len(self.ids)):
            problem = (
                "the prompt of a pair must end with text and have at least two tokens: give template.each a prompt"
            )
            raise SampleError(problem, kind=FaultKind.TEXT)
        self.repeated = (self.ids.pop(),)
        del self.labels[-1], self.weights[-1]
        self.next_position -= 1
        if self.positions:
            self.positions[-1] = self.positions[-1][:-1]

    def add_image(self, crops: tuple[MediaItem, ...], image_id: int, layout: ImageLayout | VideoLayout | None) -> None:
        """Append an image: its crops, and its tokens according to the layout. No token of an image is learned.

        Without a layout, the tokens are one placeholder per feature, or one anchor if no crop is embedded. An image of
        a pair has no tokens.

        Raises:
            SampleError: a crop does not fit the model.
        """
        assert not self.branches, "an image in a branch would be attended by the branches after it"
        start, first_item, number = len(self.ids), len(self.items), len(self.images)
        counts = [crop.num_features(self.spec) for crop in crops]  # Raises for attended crops too.
        if self.spec.placement is Placement.PAIR:
            self.items.extend(crops)
            self.images.append(ImageExtent(start, first_item, start))
            return
        tagged = crops if layout is None else layout.tagged(crops, number)
        self.items.extend(replace(crop, image=number) for crop in tagged)
        if self.images and self.images[-1].stop < start:  # There is text between the last image and this one.
            self.attended = ()
        self.attended += tuple(first_item + i for i, crop in enumerate(crops) if not crop.embedded)
        slots = {i: np.empty(counts[i], dtype=np.int32) for i, crop in enumerate(crops) if crop.embedded}
        elements: Iterable[LayoutElement]
        if layout is None:
            elements = [LayoutFeatures(i, 0, counts[i]) for i in slots] or [LayoutAnchor()]
        else:
            elements = layout.elements(crops, number, self.spec)
        for element in elements:
            at = len(self.ids)
            # The tag of an attended crop attends that crop alone.
            tag_of = element.crop if isinstance(element, LayoutTokens) else None
            attended = self.attended if tag_of is None else (first_item + tag_of,)
            if attended and (not self.spans or self.spans[-1].items != attended):
                self.spans.append(Span(at, attended))
            if isinstance(element, LayoutFeatures):
                stop = element.first + element.count
                slots[element.crop][element.first : stop] = np.arange(at, at + element.count)
            if isinstance(element, LayoutFeatures) and self.spec.position_axes == 3:
                self._add_features_on_three_axes(crops[element.crop], element.count, image_id)
            elif isinstance(element, LayoutFeatures):
                self.add_tokens((image_id,) * element.count, 0.0)
            else:
                self.add_tokens(element.ids if isinstance(element, LayoutTokens) else (image_id,), 0.0)
        self.scatter_index.extend(slots.values())
        is_video = any(crop.is_video for crop in crops)
        self.images.append(ImageExtent(start, first_item, len(self.ids), is_video))

    def add_clip(
        self, items: Sequence[MediaItem], placeholder: int, start: Sequence[int] = (), end: Sequence[int] = ()
    ) -> None:
        """Append an input of another modality than images: its items, and one placeholder for each feature.

        No token of it is learned. ``start`` and ``end`` are the tokens around it.

        Raises:
            SampleError: an item does not fit the model.
        """
        assert not self.branches, "an input in a branch would be attended by the branches after it"
        first, first_item, number = len(self.ids), len(self.items), len(self.images)
        self.add_tokens(start, 0.0)
        for item in items:
            at, count = len(self.ids), item.num_features(self.spec)
            self.scatter_index.append(np.arange(at, at + count, dtype=np.int32))
            self.add_tokens((placeholder,) * count, 0.0)
        self.add_tokens(end, 0.0)
        self.items.extend(replace(item, image=number) for item in items)
        self.images.append(ImageExtent(first, first_item, len(self.ids)))
        self.attended = ()

    def add_interleaved(
        self,
        video: MediaItem,
        sounds: Sequence[MediaItem],
        placeholders: tuple[int, int],
        start: Sequence[int],
        end: Sequence[int],
        seconds: float,
    ) -> None:
        """Append a video and its sound in turns: its frames of some seconds, then its sound of the same seconds.

        Frames and sound begin at one position, and each feature of the sound is one position. A turn of the sound lasts
        ``seconds`` because the model makes ``tokens_per_second`` features of a second of sound (25 in Qwen2.5-Omni),
        which ``AudioConfig`` checks. No token is learned.

        Args:
            video: The video. The model has positions on three axes and a number of them for a second.
            sounds: Chunks of its sound.
            placeholders: Tokens that stand for a feature of the video and of the sound.
            start: Tokens before both, which share a position.
            end: Tokens after both, which share a position.
            seconds: Length of a turn.

        Raises:
            SampleError: an item does not fit the model.

        Source: Qwen2.5-Omni (arXiv 2503.20215), section 2.2, and ``get_rope_index`` of its code.
        """
        assert not self.branches, "an input in a branch would be attended by the branches after it"
        assert self.spec.tokens_per_second is not None, "the builder checks it"
        first, first_item, number = len(self.ids), len(self.items), len(self.images)
        self._add_at_one_position(start)
        at, turn = self.next_position, int(self.spec.tokens_per_second * seconds)
        counts = [item.num_features(self.spec) for item in sounds]
        heard = np.repeat(np.arange(sum(counts), dtype=np.int32)[:, None], 3, axis=1)
        both = self._feature_positions(video, video.num_features(self.spec)), heard
        slots: tuple[list[npt.NDArray[np.int32]], ...] = ([], [])
        for ranges in itertools.zip_longest(*(_turns(positions[:, 0].tolist(), turn) for positions in both)):
            for kind, rows in enumerate(ranges):
                if rows is not None:
                    positions = both[kind][rows]
                    slots[kind].append(np.arange(len(self.ids), len(self.ids) + len(positions), dtype=np.int32))
                    self._add_placeholders(placeholders[kind], positions + np.int32(at))
                    self.next_position = at + int(positions.max()) + 1  # As in their code: after the last turn.
        self._add_at_one_position(end)
        of_sounds = np.split(np.concatenate(slots[1]), np.cumsum(counts)[:-1])
        self.scatter_index.extend([np.concatenate(slots[0]), *of_sounds])
        self.items.extend(replace(item, image=number) for item in (video, *sounds))
        self.images.append(ImageExtent(first, first_item, len(self.ids), is_video=True))
        self.attended = ()

    def _add_at_one_position(self, ids: Sequence[int]) -> None:
        """Append tokens that are not learned and share a position."""
        for number, token in enumerate(ids):
            self.next_position -= number > 0
            self.add_tokens((token,), 0.0)

    def add_drawn(self, image: DrawnTokens, weight: float, mark_weight: float, pixels: MediaItem | None = None) -> None:
        """Append an image as tokens, with the loss weights of its codes and of its marks.

        ``pixels`` is the image if the model computes its codes; None if ``image`` has them.
        """
        start, at = len(self.ids), 0
        for is_code, run in itertools.groupby(image.is_code.tolist()):
            stop = at + len(list(run))
            self.add_tokens(image.ids[at:stop].tolist(), weight if is_code else mark_weight)
            at = stop
        self.drawn.append((start, image.is_code))
        self.uncoded += [] if pixels is None else [pixels]
        self.images.append(ImageExtent(start, len(self.items), len(self.ids), image.is_video))
        self.attended = ()

    @property
    def num_placeholders(self) -> int:
        """Number of tokens that stand for features: one for each slot, and one anchor for an image without slots."""
        firsts = [*(image.first_item for image in self.images), len(self.items)]
        of_images = [self.items[first:stop] for first, stop in itertools.pairwise(firsts)]
        anchors = sum(bool(items) and not any(item.embedded for item in items) for items in of_images)
        return sum(map(len, self.scatter_index)) + anchors

    def _add_features_on_three_axes(self, crop: MediaItem, count: int, image_id: int) -> None:
        coordinates = self._feature_positions(crop, count)
        self._add_placeholders(image_id, coordinates + np.int32(self.next_position))
        after = coordinates if self.spec.text_after_video == "all_axes" else coordinates[:, 1:]
        self.next_position += int(after.max()) + 1

    def _add_placeholders(self, token: int, positions: npt.NDArray[np.int32]) -> None:
        """Append a token for each of ``positions`` ``(n, 3)``; the caller sets ``next_position``."""
        self.positions.append(positions)
        self.ids.extend([token] * len(positions))
        self.labels.extend([IGNORE] * len(positions))
        self.weights.extend([0.0] * len(positions))

    def _feature_positions(self, crop: MediaItem, count: int) -> npt.NDArray[np.int32]:
        """Return (time, row, column) of each feature, int32 ``(count, 3)``, from 0.

        Layouts do not separate the rows of a crop on three axes, so ``count`` is the number of kept features of all
        frames of the crop, or of one of them if there is text between them.

        Raises:
            SampleError: a time is too large.

        Source: Qwen2-VL (arXiv 2409.12191), section 2.1, multimodal rotary position embedding; Qwen2.5-VL
            (arXiv 2502.13923), section 2.1.3, for times in seconds.
        """
        kept, spec = crop.kept_region, self.spec
        sides = (
            spec.of_frames(crop.is_video).feature_grid(crop.grid)
            if kept is None
            else (crop.grid[0], kept.height, kept.width)
        )
        sides = count // (sides[1] * sides[2]), *sides[1:]
        coordinates = np.indices(sides).reshape(3, -1).T.astype(np.int32)
        if spec.tokens_per_second is not None and crop.seconds_per_step is not None:
            # float32 and this order, as in the authors' code: it decides on which side of a whole number a time is.
            seconds = coordinates[:, 0].astype(np.float32) * np.float32(crop.seconds_per_step)
            times = seconds * np.float32(spec.tokens_per_second)
            if times[-1] > _LAST_TIME:
                raise SampleError(
                    f"a video of {sides[0] * crop.seconds_per_step:g} seconds has time positions above {_LAST_TIME}, "
                    f"at {spec.tokens_per_second:g} for each second (decoder.rope.tokens_per_second)"
                )
            coordinates[:, 0] = times.astype(np.int32)
        return coordinates

    def finish(self, origin: Provenance | None) -> Document:
        """Return the document. Position i gets the label and the weight of token i + 1, which it predicts."""
        length = len(self.ids)
        weights = [*self.weights[1:], 0.0]
        counted: Iterable[int] = ()
        if self.spec.position_axes == 1:  # Positions are consecutive, in every branch from ``fork`` on.
            starts = [*self.branches, length]
            counts = [range(self.fork, self.fork + end - start) for start, end in itertools.pairwise(starts)]
            counted = itertools.chain(range(starts[0]), *counts)
        columns = np.fromiter([*self.ids, *self.labels[1:], IGNORE, *counted], np.int32)
        spans = self.spans if self.spans and self.spans[0].start == 0 else [Span(0, ()), *self.spans]
        drawn = None
        if self.drawn:
            drawn = np.zeros(length, np.bool_)
            for start, is_code in self.drawn:
                drawn[start : start + len(is_code)] = is_code
        return Document(
            token_ids=columns[:length],
            labels=columns[length : 2 * length],
            loss_weights=np.fromiter(weights, np.float32, length),
            position_ids=columns[2 * length :] if self.spec.position_axes == 1 else np.concatenate(self.positions),
            items=tuple(self.items),
            scatter_index=np.concatenate(self.scatter_index)
            if len(self.scatter_index) > 1
            else (*self.scatter_index, _NO_SLOTS)[0],
            spans=tuple(spans),
            provenance=origin,
            images=tuple(self.images),
            branches=tuple(self.branches),
            drawn=drawn,
            uncoded=tuple(self.uncoded),
        )


def _turns(times: Sequence[int], length: int) -> list[slice]:
    """Return the ranges of ascending times that make one turn each: below ``length``, below ``2 * length``, ...

    As in the code of Qwen2.5-Omni, a time that skips turns ends one turn for itself and for each time after it, until
    none is skipped.
    """
    starts = [0]
    for row, time in enumerate(times):
        if time >= len(starts) * length:
            starts.append(row)
    return [slice(first, last) for first, last in itertools.pairwise([*starts, len(times)])]
