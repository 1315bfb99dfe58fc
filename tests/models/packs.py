"""Builds batches without the loader, so that the tests of models do not depend on it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from data_pipeline.batch import CropLocation, MediaBlock, MultimodalBatch, Segments
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.sample import Provenance

IMAGE_ID = 3


@dataclass
class Doc:
    """A document as lists: ``crops`` are (grid, embedded, pixels); ``spans`` are (start, indices of attended crops)."""

    tokens: list[int]
    crops: list[tuple[tuple[int, int, int], bool, Tensor]] = field(default_factory=list)
    scatter_index: list[int] = field(default_factory=list)
    spans: list[tuple[int, list[int]]] = field(default_factory=list)
    dummy: bool = False
    tiles: tuple[int, int] | None = None
    """Grid of tiles of the one image that all crops belong to; None: every crop is an image."""


def image_document(
    spec: MediaSpec, seed: int, text: int, crops: list[tuple[int, int]], vocab: int, dummy: bool = False
) -> Doc:
    """Return a document of one text token, image placeholders (none for a pair), and ``text`` tokens.

    In a hybrid model the first crop is the overview.
    """
    generator = torch.Generator().manual_seed(seed)
    doc = Doc([int(torch.randint(4, vocab, (1,), generator=generator))], dummy=dummy)
    attended = []
    for number, (height, width) in enumerate(crops):
        grid = (1, height, width)
        embedded = spec.placement is Placement.EMBEDDING or (spec.placement is Placement.HYBRID and number == 0)
        pixels = torch.randint(0, 256, (height * width, spec.patch_dim), dtype=torch.uint8, generator=generator)
        doc.crops.append((grid, embedded, pixels))
        placeholders = spec.num_features(grid) if embedded else int(spec.placement is not Placement.PAIR)
        if embedded:
            doc.scatter_index += range(len(doc.tokens), len(doc.tokens) + placeholders)
        elif placeholders:
            attended.append(number)
        doc.tokens += [IMAGE_ID] * placeholders
    doc.spans = [(0, []), (1, attended)]
    doc.tokens += torch.randint(4, vocab, (text,), generator=generator).tolist()
    return doc


def text_document(seed: int, text: int, vocab: int) -> Doc:
    generator = torch.Generator().manual_seed(seed)
    return Doc(torch.randint(4, vocab, (text,), generator=generator).tolist(), spans=[(0, [])])


def in_lane(batch: MultimodalBatch, lane: int, dropout_key: tuple[int, int] | None) -> MultimodalBatch:
    """Return the batch with dropout position ``lane``, as the only pack of that lane."""
    return replace(batch, lanes=(lane,), lane_tokens=(batch.segments.total,), dropout_key=dropout_key)


def _crop_locations(doc: Doc, segment: int, image: int) -> list[CropLocation]:
    if doc.tiles is None:
        return [CropLocation(segment, image + number, (1, 1), None) for number in range(len(doc.crops))]
    rows, columns = doc.tiles
    return [CropLocation(segment, image, doc.tiles, (row, column)) for row in range(rows) for column in range(columns)]


def pack(docs: list[Doc], spec: MediaSpec) -> MultimodalBatch:
    """Return the batch of one pack, built row by row in plain Python."""
    ids, labels, weights, positions, valid = [], [], [], [], []
    span_tokens, span_keys, attended_index, gather_index, scatter_index, crops = [], [], [], [], [], []
    feature = 0
    locations: list[CropLocation] = []
    for segment, doc in enumerate(docs):
        locations += _crop_locations(doc, segment, locations[-1].image + 1 if locations else 0)
        first, size = len(ids), len(doc.tokens)
        ids += doc.tokens
        labels += [-100 if doc.dummy else t for t in doc.tokens[1:]] + [-100]
        weights += [0.0 if doc.dummy else 1.0 + (t % 3) / 4 for t in doc.tokens[1:]] + [0.0]
        positions += range(size)
        valid += [not doc.dummy] * size
        rows = []
        for grid, embedded, _ in doc.crops:
            count = spec.num_features(grid)
            rows.append(list(range(feature, feature + count)))
            gather_index += rows[-1] if embedded else []
            feature += count
        scatter_index += [first + slot for slot in doc.scatter_index]
        ends = [start for start, _ in doc.spans[1:]] + [size]
        for (start, numbers), end in zip(doc.spans, ends, strict=True):
            span_tokens.append(end - start)
            attended = [row for number in numbers for row in rows[number]]
            span_keys.append(len(attended))
            attended_index += attended
        crops += doc.crops
    grids = tuple(grid for grid, _, _ in crops)
    firsts = [sum(len(doc.crops) for doc in docs[:segment]) for segment in range(len(docs))]
    pairs = [(firsts[s], s) for s, doc in enumerate(docs) if len(doc.crops) == 1 and not doc.dummy]
    media = {}
    if spec.placement is not Placement.NONE:
        media["image"] = MediaBlock(
            values=torch.cat([pixels for _, _, pixels in crops]),
            grid=torch.tensor(grids, dtype=torch.int32),
            grids=grids,
            items=Segments.from_lengths([h * w for _, h, w in grids]),
            gather_index=torch.tensor(gather_index, dtype=torch.int64),
            scatter_index=torch.tensor(scatter_index, dtype=torch.int64),
            attended_index=torch.tensor(attended_index, dtype=torch.int64),
            span_tokens=Segments.from_lengths(span_tokens),
            span_keys=Segments.from_lengths(span_keys),
            locations=tuple(locations),
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
        provenance=tuple(None if doc.dummy else Provenance("d", "s", "k", 0) for doc in docs),
        weight=float(sum(weights)),
        num_tokens=sum(valid),
    )
