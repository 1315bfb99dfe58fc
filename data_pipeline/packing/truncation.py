"""Cutting of documents that no pack can hold into parts; images are not cut.

A part is a document with its tokens, the images among them, and the images of earlier parts that its text attends.
Its positions start at 0. A document with branches is cut between branches, and every part contains the shared prefix.
If a branch does not fit together with the prefix, both are cut like plain text, so later parts lack the prefix. A part
of n tokens takes O(n log n) time: the search for it tries parts of up to 2n tokens, and finds images and spans by
bisection. Not for: the decision whether a document may be cut (``packing.too_long``).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from data_pipeline.document import IGNORE, Document, ImageExtent, Span

Fits = Callable[[Document], bool]
"""Returns whether a pack can hold a document. If a part fits, every shorter part with the same start must fit too."""


class Cutter:
    """Cuts parts out of one document.

    Args:
        document: The whole document. It must have no branches.
    """

    def __init__(self, document: Document) -> None:
        self._document = document
        images = document.images
        self._image_starts = [image.start for image in images]
        self._item_ends = [*(image.first_item for image in images[1:]), len(document.items)]
        self._span_starts = [span.start for span in document.spans]
        self._slots = np.sort(document.scatter_index)  # An image's slots may be in any order.
        may_end = np.ones(document.num_tokens + 1, bool)
        for image in images:
            may_end[image.start + 1 : image.stop] = False
        self._stops = np.flatnonzero(may_end)

    def cut(self, start: int, stop: int) -> Document:
        """Return the part with the tokens ``start:stop``. Neither may be inside an image; this is not checked.

        The last label is the token that follows in the whole document, so no prediction is lost; except that of an
        image that begins with a code instead of a mark.
        """
        document = self._document
        spans = self._spans(start, stop)
        first, last = (bisect.bisect_left(self._image_starts, token) for token in (start, stop))
        images = document.images[first:last]
        kept = {item for span in spans for item in span.items}
        if images:
            kept.update(range(images[0].first_item, self._item_ends[last - 1]))
        indices = sorted(kept)
        new_index = {item: i for i, item in enumerate(indices)}
        positions = document.position_ids[start:stop]
        slots = slice(*np.searchsorted(self._slots, (start, stop)))
        labels, weights = document.labels[start:stop], document.loss_weights[start:stop]
        if document.drawn is not None and document.drawn[stop : stop + 1].any():
            # A batch finds the labels that are codes by ``drawn`` of the next row, which is in the next part. If the
            # model computes the codes, this one is not even known.
            labels, weights = np.append(labels[:-1], np.int32(IGNORE)), np.append(weights[:-1], np.float32(0))
        return replace(
            document,
            token_ids=document.token_ids[start:stop],
            labels=labels,
            loss_weights=weights,
            position_ids=positions - positions.min(axis=0) if start and len(positions) else positions,
            items=tuple(document.items[item] for item in indices),
            scatter_index=document.scatter_index[slots] - np.int32(start),
            spans=tuple(Span(span.start, tuple(new_index[item] for item in span.items)) for span in spans),
            images=tuple(
                ImageExtent(first - start, bisect.bisect_left(indices, item), last - start, is_video)
                for first, item, last, is_video in images
            ),
            is_cut=True,
            drawn=None if document.drawn is None else document.drawn[start:stop],
            uncoded=document.uncoded_at(slice(start, stop)),
        )

    def _spans(self, start: int, stop: int) -> list[Span]:
        """Return the spans of a part: starts count from its first token, items are indices of the whole document."""
        first = max(bisect.bisect_right(self._span_starts, start) - 1, 0)
        last = bisect.bisect_left(self._span_starts, stop)
        return [Span(max(span.start - start, 0), span.items) for span in self._document.spans[first:last]]

    def longest_part(self, start: int, fits: Fits) -> Document | None:
        """Return the longest part from ``start`` on that fits; None if the next token or image does not fit."""
        first = int(np.searchsorted(self._stops, start, side="right"))
        stops = self._stops[first:]
        number = _largest_count(len(stops), lambda count: fits(self.cut(start, int(stops[count - 1]))))
        return self.cut(start, int(stops[number - 1])) if number else None


def _largest_count(total: int, fits: Callable[[int], bool]) -> int:
    """Return the largest count up to ``total`` that fits, 0 if none does. Every smaller count must fit too.

    The search doubles the count until it is too large, so it tries no count above twice the result (at least 1).
    """
    count = 1
    while count < total and fits(count):
        count *= 2
    counts = range(count // 2 + 1, min(count, total) + 1)
    return count // 2 + bisect.bisect_left(counts, True, key=lambda n: not fits(n))


def with_end_token(part: Document, whole: Document) -> Document:
    """Return ``part``, of at least two tokens, with its last token replaced by the last token of ``whole``.

    Source: CLIP's tokenizer, which replaces the last token of a text that it cuts by the end token.
    """
    tokens, labels, weights = part.token_ids.copy(), part.labels.copy(), part.loss_weights.copy()
    tokens[-1] = whole.token_ids[-1]
    labels[-2:] = whole.labels[-2:]
    weights[-2:] = whole.loss_weights[-2:]
    return replace(part, token_ids=tokens, labels=labels, loss_weights=weights)


def some_branches(document: Document, first: int, stop: int) -> Document:
    """Return the part with the shared prefix and the branches ``first:stop``.

    A single branch becomes plain text after the prefix. Images outside of the prefix are images as tokens, without
    crops. Loss weights are not changed.
    """
    branches = document.branches
    shared, begin = branches[0], branches[first]
    end = branches[stop] if stop < len(branches) else document.num_tokens
    rows = np.r_[0:shared, begin:end]
    before = [image for image in document.images if image.stop <= shared]
    within = [image for image in document.images if begin <= image.start < end]
    starts = tuple(branch - begin + shared for branch in branches[first:stop])
    return replace(
        document,
        token_ids=document.token_ids[rows],
        labels=document.labels[rows],
        loss_weights=document.loss_weights[rows],
        position_ids=document.position_ids[rows],
        images=(
            *before,
            *(image._replace(start=image.start - begin + shared, stop=image.stop - begin + shared) for image in within),
        ),
        branches=starts if len(starts) > 1 else (),
        reference=(),
        is_cut=True,
        drawn=None if document.drawn is None else document.drawn[rows],
        uncoded=document.uncoded_at(rows),
    )


def _most_branches(document: Document, first: int, fits: Fits) -> int:
    """Return the largest ``stop`` for which the branches ``first:stop`` fit; ``first`` if not even one fits."""
    left = len(document.branches) - first
    return first + _largest_count(left, lambda count: fits(some_branches(document, first, first + count)))


def longest_part(document: Document, fits: Fits) -> Document | None:
    """Return the longest part from the start that fits; None if the first token or image does not fit.

    For a document with branches, the part has all whole branches that fit, or else a part of the first branch.
    """
    if document.branches:
        stop = _most_branches(document, 0, fits)
        part = some_branches(document, 0, max(stop, 1))
        return part if stop else longest_part(part, fits)
    return Cutter(document).longest_part(0, fits)


def split(document: Document, fits: Fits) -> Iterator[Document]:
    """Yield consecutive parts that fit, each as long as possible.

    An image or a token that fits into no pack is left out.
    """
    if document.branches:
        first = 0
        while first < len(document.branches):
            stop = _most_branches(document, first, fits)
            if stop > first:
                yield some_branches(document, first, stop)
            else:
                stop = first + 1
                yield from split(some_branches(document, first, stop), fits)
            first = stop
        return
    start, cutter = 0, Cutter(document)
    ends = {image.start: image.stop for image in document.images}
    while start < document.num_tokens:
        part = cutter.longest_part(start, fits)
        if part is None:
            start = ends.get(start, start + 1)
            continue
        yield part
        start += part.num_tokens
