"""Documents that no pack can hold: cut to pieces that one can hold, images whole.

A part is a document of its own: its tokens, the images among them, and the images of earlier parts that its text still
attends. Positions start again at 0. A document with branches is cut between them, and every part has what they share;
only a branch that does not fit alone is cut itself. Not for: whether a document may be cut at all
(``packing.too_long``).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from data_pipeline.document import Document, ImageExtent, Span

Fits = Callable[[Document], bool]
"""Whether a pack can hold a document; true of a part if it is true of a longer one."""


def cut(document: Document, start: int, stop: int) -> Document:
    """The tokens from ``start`` up to ``stop``, neither of which may lie inside an image.

    The label of the last token is the token that follows it in the whole document, so no prediction is lost.
    """
    spans = _spans(document, start, stop)
    inside = [(image, items) for image, items in _images(document) if start <= image.start < stop]
    kept = {item for _, items in inside for item in items}
    kept.update(item for span in spans for item in span.items)
    place = {item: i for i, item in enumerate(sorted(kept))}
    positions = document.position_ids[start:stop]
    return replace(
        document,
        token_ids=document.token_ids[start:stop],
        labels=document.labels[start:stop],
        loss_weights=document.loss_weights[start:stop],
        position_ids=positions - positions.min(axis=0) if start and len(positions) else positions,
        items=tuple(document.items[item] for item in sorted(kept)),
        dest=document.dest[(document.dest >= start) & (document.dest < stop)] - np.int32(start),
        spans=tuple(Span(span.start, tuple(place[item] for item in span.items)) for span in spans),
        images=tuple(
            ImageExtent(image.start - start, place[items.start], image.stop - start) for image, items in inside
        ),
        is_cut=True,
    )


def closed(part: Document, end: Document) -> Document:
    """A part of two tokens or more whose last one is that of ``end``, the whole document.

    Source: CLIP's tokenizer, which puts the end token in the last place of a text that it cuts.
    """
    tokens, labels, weights = part.token_ids.copy(), part.labels.copy(), part.loss_weights.copy()
    tokens[-1] = end.token_ids[-1]
    labels[-2:] = end.labels[-2:]
    weights[-2:] = end.loss_weights[-2:]
    return replace(part, token_ids=tokens, labels=labels, loss_weights=weights)


def _images(document: Document) -> list[tuple[ImageExtent, range]]:
    """Each image and its items."""
    after = [*(image.first_item for image in document.images[1:]), len(document.items)]
    return [(image, range(image.first_item, end)) for image, end in zip(document.images, after, strict=False)]


def _spans(document: Document, start: int, stop: int) -> list[Span]:
    """The spans of a part, their starts counted from its own first token, their items as in the whole document."""
    ends = [*(span.start for span in document.spans[1:]), document.num_tokens]
    return [
        Span(max(span.start - start, 0), span.items)
        for span, end in zip(document.spans, ends, strict=True)
        if end > start and span.start < stop
    ]


def some_branches(document: Document, first: int, stop: int) -> Document:
    """What the branches share, and those from number ``first`` up to ``stop``; one alone is no branch any more.

    Images all stand in what is shared. The weights stay those of the whole document.
    """
    shared, bounds = document.branches[0], [*document.branches, document.num_tokens]
    rows = np.r_[0:shared, bounds[first] : bounds[stop]]
    starts = tuple(bounds[number] - bounds[first] + shared for number in range(first, stop))
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
    stops = range(first + 1, len(document.branches) + 1)
    return first + bisect.bisect_left(stops, True, key=lambda stop: not fits(some_branches(document, first, stop)))


def longest_part(document: Document, start: int, fits: Fits) -> Document | None:
    """The longest part from ``start`` on that fits; None if not even the next token or image does.

    Of a document with branches, whose ``start`` is 0, as many of the first as fit.
    """
    if document.branches:
        stop = _most_branches(document, 0, fits)
        whole = some_branches(document, 0, max(stop, 1))
        return whole if stop else longest_part(whole, 0, fits)
    inside = {token for image in document.images for token in range(image.start + 1, image.stop)}
    stops = [stop for stop in range(start + 1, document.num_tokens + 1) if stop not in inside]
    # From the first stop that does not fit on, none does.
    number = bisect.bisect_left(stops, True, key=lambda stop: not fits(cut(document, start, stop)))
    return cut(document, start, stops[number - 1]) if number else None


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
    start = 0
    ends = {image.start: image.stop for image in document.images}
    while start < document.num_tokens:
        part = longest_part(document, start, fits)
        if part is None:
            start = ends.get(start, start + 1)
            continue
        yield part
        start += part.num_tokens
