"""Batches made by hand: the models' tests do not lean on the loader."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from data_pipeline.batch import MediaBlock, MultimodalBatch, Segments, ViewPlace
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.sample import Provenance

IMAGE_ID = 3


@dataclass
class Doc:
    """A document as lists: ``views`` are (grid, embedded, pixels); ``spans`` are (start, numbers of views)."""

    tokens: list[int]
    views: list[tuple[tuple[int, int, int], bool, Tensor]] = field(default_factory=list)
    dest: list[int] = field(default_factory=list)
    spans: list[tuple[int, list[int]]] = field(default_factory=list)
    null: bool = False
    tiles: tuple[int, int] | None = None
    """Grid of the one image whose tiles all views are; None: every view is an image."""


def image_document(
    spec: MediaSpec, seed: int, text: int, views: list[tuple[int, int]], vocab: int, null: bool = False
) -> Doc:
    """One text token, then image places (of a pair none), then ``text`` tokens.

    In a hybrid the first view is the thumbnail.
    """
    generator = torch.Generator().manual_seed(seed)
    doc = Doc([int(torch.randint(4, vocab, (1,), generator=generator))], null=null)
    attended = []
    for number, (height, width) in enumerate(views):
        grid = (1, height, width)
        embedded = spec.placement is Placement.EMBEDDING or (spec.placement is Placement.HYBRID and number == 0)
        pixels = torch.randint(0, 256, (height * width, spec.patch_dim), dtype=torch.uint8, generator=generator)
        doc.views.append((grid, embedded, pixels))
        places = spec.num_features(grid) if embedded else int(spec.placement is not Placement.PAIR)
        if embedded:
            doc.dest += range(len(doc.tokens), len(doc.tokens) + places)
        elif places:
            attended.append(number)
        doc.tokens += [IMAGE_ID] * places
    doc.spans = [(0, []), (1, attended)]
    doc.tokens += torch.randint(4, vocab, (text,), generator=generator).tolist()
    return doc


def text_document(seed: int, text: int, vocab: int) -> Doc:
    generator = torch.Generator().manual_seed(seed)
    return Doc(torch.randint(4, vocab, (text,), generator=generator).tolist(), spans=[(0, [])])


def in_lane(batch: MultimodalBatch, lane: int, dropout_key: tuple[int, int] | None) -> MultimodalBatch:
    """The batch as the only pack of a lane."""
    return replace(batch, lanes=(lane,), lane_tokens=(batch.segments.total,), dropout_key=dropout_key)


def _places(doc: Doc, segment: int, image: int) -> list[ViewPlace]:
    if doc.tiles is None:
        return [ViewPlace(segment, image + number, (1, 1), None) for number in range(len(doc.views))]
    rows, columns = doc.tiles
    return [ViewPlace(segment, image, doc.tiles, (row, column)) for row in range(rows) for column in range(columns)]


def pack(docs: list[Doc], spec: MediaSpec) -> MultimodalBatch:
    """Row by row, in plain Python."""
    ids, labels, weights, positions, valid = [], [], [], [], []
    span_tokens, span_keys, keys, source, dest, views = [], [], [], [], [], []
    feature = 0
    places: list[ViewPlace] = []
    for segment, doc in enumerate(docs):
        places += _places(doc, segment, places[-1].image + 1 if places else 0)
        first, size = len(ids), len(doc.tokens)
        ids += doc.tokens
        labels += [-100 if doc.null else t for t in doc.tokens[1:]] + [-100]
        weights += [0.0 if doc.null else 1.0 + (t % 3) / 4 for t in doc.tokens[1:]] + [0.0]
        positions += range(size)
        valid += [not doc.null] * size
        rows = []
        for grid, embedded, _ in doc.views:
            count = spec.num_features(grid)
            rows.append(list(range(feature, feature + count)))
            source += rows[-1] if embedded else []
            feature += count
        dest += [first + place for place in doc.dest]
        ends = [start for start, _ in doc.spans[1:]] + [size]
        for (start, numbers), end in zip(doc.spans, ends, strict=True):
            span_tokens.append(end - start)
            seen = [row for number in numbers for row in rows[number]]
            span_keys.append(len(seen))
            keys += seen
        views += doc.views
    grids = tuple(grid for grid, _, _ in views)
    firsts = [sum(len(doc.views) for doc in docs[:segment]) for segment in range(len(docs))]
    pairs = [(firsts[s], s) for s, doc in enumerate(docs) if len(doc.views) == 1 and not doc.null]
    media = {}
    if spec.placement is not Placement.NONE:
        media["image"] = MediaBlock(
            values=torch.cat([pixels for _, _, pixels in views]),
            grid=torch.tensor(grids, dtype=torch.int32),
            grids=grids,
            items=Segments.from_lengths([h * w for _, h, w in grids]),
            source=torch.tensor(source, dtype=torch.int64),
            dest=torch.tensor(dest, dtype=torch.int64),
            keys=torch.tensor(keys, dtype=torch.int64),
            span_tokens=Segments.from_lengths(span_tokens),
            span_keys=Segments.from_lengths(span_keys),
            places=tuple(places),
        )
    return MultimodalBatch(
        token_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        loss_weights=torch.tensor(weights),
        position_ids=torch.tensor(positions),
        segments=Segments.from_lengths([len(doc.tokens) for doc in docs]),
        valid=torch.tensor(valid),
        media=media,
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        provenance=tuple(None if doc.null else Provenance("d", "s", "k", 0) for doc in docs),
        weight=float(sum(weights)),
        num_tokens=sum(valid),
    )
