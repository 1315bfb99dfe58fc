"""Packs to one batch: concatenation, with every index shifted to where its target now stands."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.batch import BranchedSegments, MediaBlock, MultimodalBatch, Segments, ViewPlace
from data_pipeline.document import Coverage, Document, MediaItem, Run
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.packer import Pack

IMAGE = "image"
"""Key of the image block in ``MultimodalBatch.media``."""

_NO_ROWS = np.empty(0, dtype=np.int64)

Join = Callable[[Sequence[npt.NDArray[np.uint8]]], Tensor]
"""Arrays of equally many columns to one tensor, row behind row."""


def join_copies(arrays: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
    """The arrays, copied into memory of their own."""
    return torch.from_numpy(np.concatenate(arrays))


def collate(packs: Sequence[Pack], spec: MediaSpec, join: Join = join_copies) -> MultimodalBatch:
    """One microbatch of the packs' documents, in order.

    Args:
        packs: Their documents become segments.
        spec: What the model takes.
        join: Joins the patches, nearly all of a batch's bytes.

    Raises:
        ValueError: there is no document at all.
    """
    documents = [document for pack in packs for document in pack.documents]
    if not documents:
        raise ValueError("a batch needs at least one document")
    loss_weights = np.concatenate([document.loss_weights for document in documents])
    lengths = [document.num_tokens for document in documents]
    valid = np.repeat([not document.is_null for document in documents], lengths)
    return MultimodalBatch(
        token_ids=_int64([document.token_ids for document in documents]),
        labels=_int64([document.labels for document in documents]),
        loss_weights=torch.from_numpy(loss_weights),
        position_ids=_int64([document.position_ids for document in documents]),
        segments=Segments.from_lengths(lengths),
        valid=torch.from_numpy(valid),
        media={} if spec.placement is Placement.NONE else {IMAGE: _media(documents, spec, join)},
        pairs=_pairs(documents),
        lanes=tuple(pack.lane for pack in packs),
        lane_tokens=tuple(sum(document.num_tokens for document in pack.documents) for pack in packs),
        provenance=tuple(document.provenance for document in documents),
        weight=float(loss_weights.sum(dtype=np.float64)),
        num_tokens=int(valid.sum()),
        branched=_branched(documents),
    )


def _branched(documents: Sequence[Document]) -> BranchedSegments | None:
    if not any(document.branches for document in documents):
        return None
    return BranchedSegments.of((document.num_tokens, document.branches) for document in documents)


def _int64(arrays: Sequence[npt.NDArray[np.int32]]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays, dtype=np.int64))


def _pairs(documents: Sequence[Document]) -> Tensor:
    """(item, segment) of each document with exactly one image, its first whole view if it has one."""
    pairs, items = [], 0
    for segment, document in enumerate(documents):
        if document.num_images == 1 and not document.is_null:  # A null document pairs nothing.
            whole = [number for number, item in enumerate(document.items) if item.place is None]
            pairs.append((items + (whole[0] if whole else 0), segment))
        items += len(document.items)
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def _media(documents: Sequence[Document], spec: MediaSpec, join: Join) -> MediaBlock:
    items = [item for document in documents for item in document.items]
    # The tower makes rows of all features, item after item; each item hands on its kept ones.
    starts = itertools.accumulate((spec.num_features(item.grid) for item in items), initial=0)
    kept = [item.kept_features(spec, start) for start, item in zip(starts, items, strict=False)]
    source = [run for runs, item in zip(kept, items, strict=True) if item.embedded for run in runs]
    tags = _tag_rows(items, spec)
    dest, keys = [_NO_ROWS], list[Run]()
    span_tokens, span_keys = [], []
    first_token = first_item = 0
    for document in documents:
        if len(document.dest):
            dest.append(document.dest.astype(np.int64) + first_token)
        ends = [span.start for span in document.spans[1:]] + [document.num_tokens]
        for span, end in zip(document.spans, ends, strict=True):
            numbers = [first_item + item for item in span.items]
            attended = [run for number in numbers for run in (*tags[number], *kept[number])]
            keys += attended
            span_tokens.append(end - span.start)
            span_keys.append(sum(count for _, count in attended))
        first_token += document.num_tokens
        first_item += len(document.items)
    nothing = np.empty((0, spec.patch_dim), dtype=np.uint8)
    grids = tuple(item.grid for item in items)
    return MediaBlock(
        values=join([item.values for item in items] or [nothing]),
        grid=torch.tensor(grids, dtype=torch.int32).reshape(-1, 3),
        grids=grids,
        items=Segments.from_lengths([len(item.values) for item in items]),
        source=_expand(source),
        dest=torch.from_numpy(np.concatenate(dest)),
        keys=_expand(keys),
        span_tokens=Segments.from_lengths(span_tokens),
        span_keys=Segments.from_lengths(span_keys),
        coverage=_coverage(items) if spec.padding else None,
        places=_places(documents),
        tag_ids=torch.tensor([token for item in items for token in item.tag], dtype=torch.int64),
    )


def _tag_rows(items: Sequence[MediaItem], spec: MediaSpec) -> list[list[Run]]:
    """Rows of each item's tag, behind the features of all items."""
    first = sum(spec.num_features(item.grid) for item in items)
    starts = itertools.accumulate((len(item.tag) for item in items), initial=first)
    return [[(start, len(item.tag))] if item.tag else [] for start, item in zip(starts, items, strict=False)]


def _coverage(items: Sequence[MediaItem]) -> Tensor:
    covered = [item.coverage or Coverage.whole(*item.grid[1:]) for item in items]
    rows = [[*each.touched, *each.filled] for each in covered]
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 8)


def _places(documents: Sequence[Document]) -> tuple[ViewPlace, ...]:
    places, image, last = list[ViewPlace](), -1, None
    for segment, document in enumerate(documents):
        for item in document.items:
            image += (segment, item.image) != last
            last = segment, item.image
            places.append(ViewPlace(segment, image, item.tiles, item.place))
    return tuple(places)


def _expand(runs: Sequence[Run]) -> Tensor:
    """Every number of the runs, int64."""
    first, count = np.array(runs, dtype=np.int64).reshape(-1, 2).T
    end = count.cumsum()
    numbers = np.arange(end[-1] if runs else 0)
    numbers += np.repeat(first - (end - count), count)
    return torch.from_numpy(numbers)


def concatenate(batches: Sequence[MultimodalBatch], spec: MediaSpec) -> MultimodalBatch:
    """One batch of several, as if their packs had been collated together."""
    if len(batches) == 1:
        return batches[0]
    segments = [batch.segments for batch in batches]
    items = [batch.media[IMAGE].items.num if batch.media else 0 for batch in batches]
    first_items, first_segments = _starts(items), _starts([piece.num for piece in segments])
    pairs = [batch.pairs + torch.tensor([first_items[i], first_segments[i]]) for i, batch in enumerate(batches)]
    return MultimodalBatch(
        token_ids=torch.cat([batch.token_ids for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        loss_weights=torch.cat([batch.loss_weights for batch in batches]),
        position_ids=torch.cat([batch.position_ids for batch in batches]),
        segments=_join(segments),
        valid=torch.cat([batch.valid for batch in batches]),
        media={IMAGE: _concatenate_media(batches, spec)} if batches[0].media else {},
        pairs=torch.cat(pairs),
        lanes=tuple(lane for batch in batches for lane in batch.lanes),
        lane_tokens=tuple(count for batch in batches for count in batch.lane_tokens),
        provenance=tuple(origin for batch in batches for origin in batch.provenance),
        weight=sum(batch.weight for batch in batches),
        num_tokens=sum(batch.num_tokens for batch in batches),
        branched=_concatenate_branched(batches),
    )


def _concatenate_branched(batches: Sequence[MultimodalBatch]) -> BranchedSegments | None:
    if not any(batch.branched for batch in batches):
        return None
    first_tokens = _starts([batch.segments.total for batch in batches])
    pieces = [
        batch.branched or BranchedSegments.of((int(length), ()) for length in np.diff(batch.segments.bounds))
        for batch in batches
    ]
    return BranchedSegments(
        _join([piece.queries for piece in pieces]),
        _join([piece.keys for piece in pieces]),
        torch.cat([piece.rows + first for piece, first in zip(pieces, first_tokens, strict=True)]),
    )


def _starts(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts))]


def _join(pieces: Sequence[Segments]) -> Segments:
    lengths = [b - a for piece in pieces for a, b in zip(piece.bounds, piece.bounds[1:], strict=False)]
    return Segments.from_lengths(lengths)


def _concatenate_media(batches: Sequence[MultimodalBatch], spec: MediaSpec) -> MediaBlock:
    blocks = [batch.media[IMAGE] for batch in batches]
    tokens = _starts([batch.segments.total for batch in batches])
    made = [sum(map(spec.num_features, block.grids)) for block in blocks]
    features, tags = _starts(made), _starts([len(block.tag_ids) for block in blocks])
    # Rows of tags stand behind the features of all blocks.
    shifts = [
        torch.where(block.keys < own, start, sum(made) - own + tag)
        for block, own, start, tag in zip(blocks, made, features, tags, strict=True)
    ]
    return MediaBlock(
        values=torch.cat([block.values for block in blocks]),
        grid=torch.cat([block.grid for block in blocks]),
        grids=tuple(grid for block in blocks for grid in block.grids),
        items=_join([block.items for block in blocks]),
        source=torch.cat([block.source + start for block, start in zip(blocks, features, strict=True)]),
        dest=torch.cat([block.dest + start for block, start in zip(blocks, tokens, strict=True)]),
        keys=torch.cat([block.keys + shift for block, shift in zip(blocks, shifts, strict=True)]),
        span_tokens=_join([block.span_tokens for block in blocks]),
        span_keys=_join([block.span_keys for block in blocks]),
        coverage=torch.cat([block.coverage for block in blocks if block.coverage is not None])
        if spec.padding
        else None,
        places=_concatenate_places(batches),
        tag_ids=torch.cat([block.tag_ids for block in blocks]),
    )


def _concatenate_places(batches: Sequence[MultimodalBatch]) -> tuple[ViewPlace, ...]:
    places, segment, image = list[ViewPlace](), 0, 0
    for batch in batches:
        own = batch.media[IMAGE].places
        places += [place._replace(segment=place.segment + segment, image=place.image + image) for place in own]
        segment += batch.segments.num
        image += own[-1].image + 1 if own else 0
    return tuple(places)
