"""Documents that no pack can hold: cut to pieces that one can hold, images whole.

A part is a document of its own: its tokens, the images among them, and the images of earlier parts that its text still
attends. Positions start again at 0. A document with branches is cut between them, and every part has what they share;
only a branch that does not fit alone is cut itself. Time and memory are linear in the document: a part is
found by looking at stretches of about its own length, and the places of images and spans are looked up by bisection.
Not for: whether a document may be cut at all (``packing.too_long``).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from data_pipeline.document import Document, ImageExtent, Span

Fits = Callable[[Document], bool]
"""Whether a pack can hold a document; true of a part if it is true of a longer one."""


class Cutter:
    """Cuts parts out of one document without branches.

    Args:
        document: The whole document.
    """

    def __init__(self, document: Document) -> None:
        self._document = document
        images = document.images
        self._image_starts = [image.start for image in images]
        self._item_ends = [*(image.first_item for image in images[1:]), len(document.items)]
        self._span_starts = [span.start for span in document.spans]
        self._slots = np.sort(document.dest)  # Slots of one image are neighbours in ``dest``, in any order.
        may_end = np.ones(document.num_tokens + 1, bool)
        for image in images:
            may_end[image.start + 1 : image.stop] = False
        self._stops = np.flatnonzero(may_end)

    def cut(self, start: int, stop: int) -> Document:
        """The tokens from ``start`` up to ``stop``, neither of which may lie inside an image.

        The label of the last token is the token that follows it in the whole document, so no prediction is lost.
        """
        document = self._document
        spans = self._spans(start, stop)
        first, last = (bisect.bisect_left(self._image_starts, token) for token in (start, stop))
        images = document.images[first:last]
        kept = {item for span in spans for item in span.items}
        if images:
            kept.update(range(images[0].first_item, self._item_ends[last - 1]))
        place = {item: i for i, item in enumerate(sorted(kept))}
        positions = document.position_ids[start:stop]
        slots = slice(*np.searchsorted(self._slots, (start, stop)))
        return replace(
            document,
            token_ids=document.token_ids[start:stop],
            labels=document.labels[start:stop],
            loss_weights=document.loss_weights[start:stop],
            position_ids=positions - positions.min(axis=0) if start and len(positions) else positions,
            items=tuple(document.items[item] for item in sorted(kept)),
            dest=document.dest[slots] - np.int32(start),
            spans=tuple(Span(span.start, tuple(place[item] for item in span.items)) for span in spans),
            images=tuple(
                ImageExtent(image.start - start, place[image.first_item], image.stop - start) for image in images
            ),
            is_cut=True,
        )

    def _spans(self, start: int, stop: int) -> list[Span]:
        """The spans of a part, their starts counted from its own first token, their items as in the document."""
        first = max(bisect.bisect_right(self._span_starts, start) - 1, 0)
        last = bisect.bisect_left(self._span_starts, stop)
        return [Span(max(span.start - start, 0), span.items) for span in self._document.spans[first:last]]

    def longest_part(self, start: int, fits: Fits) -> Document | None:
        """The longest part from ``start`` on that fits; None if not even the next token or image does."""
        first = int(np.searchsorted(self._stops, start, side="right"))
        stops = self._stops[first:]
        number = _most(len(stops), lambda count: fits(self.cut(start, int(stops[count - 1]))))
        return self.cut(start, int(stops[number - 1])) if number else None


def _most(total: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to ``total`` that fits, if every smaller one does too.

    The count is doubled until it is too large, so that no count above twice the result is looked at.
    """
    count = 1
    while count < total and fits(count):
        count *= 2
    counts = range(count // 2 + 1, min(count, total) + 1)
    return count // 2 + bisect.bisect_left(counts, True, key=lambda n: not fits(n))


def closed(part: Document, end: Document) -> Document:
    """A part of two tokens or more whose last one is that of ``end``, the whole document.

    Source: CLIP's tokenizer, which puts the end token in the last place of a text that it cuts.
    """
    tokens, labels, weights = part.token_ids.copy(), part.labels.copy(), part.loss_weights.copy()
    tokens[-1] = end.token_ids[-1]
    labels[-2:] = end.labels[-2:]
    weights[-2:] = end.loss_weights[-2:]
    return replace(part, token_ids=tokens, labels=labels, loss_weights=weights)


def some_branches(document: Document, first: int, stop: int) -> Document:
    """What the branches share, and those from number ``first`` up to ``stop``; one alone is no branch any more.

    Images all stand in what is shared. The weights stay those of the whole document.
    """
    branches = document.branches
    shared, begin = branches[0], branches[first]
    rows = np.r_[0:shared, begin : branches[stop] if stop < len(branches) else document.num_tokens]
    starts = tuple(branch - begin + shared for branch in branches[first:stop])
    return replace(
        document,
        token_ids=document.token_ids[rows],
        labels=document.labels[rows],
        loss_weights=document.loss_weights[rows],
        position_ids=document.position_ids[rows],
        branches=starts if len(starts) > 1 else (),
        is_cut=True,
    )


def _most_branches(document: Document, first: int, fits: Fits) -> int:
    """The last number up to which the branches from ``first`` on fit; ``first`` if not even one does."""
    left = len(document.branches) - first
    return first + _most(left, lambda count: fits(some_branches(document, first, first + count)))


def longest_part(document: Document, fits: Fits) -> Document | None:
    """The longest beginning that fits; None if not even the first token or image does.

    Of a document with branches as many of the first as fit.
    """
    if document.branches:
        stop = _most_branches(document, 0, fits)
        whole = some_branches(document, 0, max(stop, 1))
        return whole if stop else longest_part(whole, fits)
    return Cutter(document).longest_part(0, fits)


def split(document: Document, fits: Fits) -> Iterator[Document]:
    """Consecutive parts that fit, each as long as can be; an image that fits nowhere is left out with its tokens."""
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
