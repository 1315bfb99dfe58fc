"""Synthetic documents with known content, for the tests of packing."""

from __future__ import annotations

import numpy as np

from data_pipeline.document import Document, ImageExtent, MediaItem, Span
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.sample import Provenance


def made_document(pieces: list[tuple[str, int]], spec: MediaSpec) -> Document:
    """Return a document of text and images. Token t has id t, label t + 1 and weight t + 0.5; features of image i are
    i."""
    embedded = spec.placement is Placement.EMBEDDING
    length, items, images, dest, spans = 0, [], [], [], [Span(0, ())]
    for kind, size in pieces:
        if kind == "text":
            length += size
            continue
        start = length
        items.append(MediaItem(np.full((size, spec.patch_dim), len(items), np.uint8), (1, 1, size), embedded))
        if embedded:
            dest.extend(range(length, length + size))
            length += size
        else:
            spans = [span for span in spans if span.start != length]
            spans.append(Span(length, (len(items) - 1,)))
            length += 1
        images.append(ImageExtent(start, len(items) - 1, length))
    ids = np.arange(length, dtype=np.int32)
    origin = Provenance("set", "shard", "0", 0)
    weights = ids + np.float32(0.5)
    return Document(
        ids, ids + 1, weights, ids, tuple(items), np.array(dest, np.int32), tuple(spans), origin, tuple(images)
    )
