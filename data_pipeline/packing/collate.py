"""Packs to one batch: concatenation, with every index shifted to where its target now stands."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.batch import BranchedSegments, MediaBlock, MultimodalBatch, Segments, ViewPlace
from data_pipeline.document import Coverage, Document, Run
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.packer import Pack

IMAGE = "image"
"""Key of the image block in ``MultimodalBatch.media``."""

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
    branched = None
    if any(document.branches for document in documents):
        branched = BranchedSegments.of((document.num_tokens, document.branches) for document in documents)
    # A document with exactly one image gives a pair: its first whole view (or its first view), and its segment.
    pairs, first_item = list[tuple[int, int]](), 0
    for segment, document in enumerate(documents):
        if document.num_images == 1 and not document.is_null:  # A null document pairs nothing.
            whole = [number for number, item in enumerate(document.items) if item.place is None]
            pairs.append((first_item + (whole[0] if whole else 0), segment))
        first_item += len(document.items)
    token_ids = np.concatenate([document.token_ids for document in documents], dtype=np.int64)
    labels = np.concatenate([document.labels for document in documents], dtype=np.int64)
    position_ids = np.concatenate([document.position_ids for document in documents], dtype=np.int64)
    return MultimodalBatch(
        token_ids=torch.from_numpy(token_ids),
        labels=torch.from_numpy(labels),
        loss_weights=torch.from_numpy(loss_weights),
        position_ids=torch.from_numpy(position_ids),
        segments=Segments.from_lengths(lengths),
        valid=torch.from_numpy(valid),
        media={} if spec.placement is Placement.NONE else {IMAGE: _media(documents, spec, join)},
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        lanes=tuple(pack.lane for pack in packs),
        lane_tokens=tuple(sum(document.num_tokens for document in pack.documents) for pack in packs),
        provenance=tuple(document.provenance for document in documents),
        weight=float(loss_weights.sum(dtype=np.float64)),
        num_tokens=int(valid.sum()),
        branched=branched,
    )


def _media(documents: Sequence[Document], spec: MediaSpec, join: Join) -> MediaBlock:
    items = [item for document in documents for item in document.items]
    # The tower makes rows of all features, item after item; each item hands on its kept ones. The embeddings of tags
    # follow the features of all items.
    made = [spec.num_features(item.grid) for item in items]
    starts = itertools.accumulate(made, initial=0)
    kept = [item.kept_features(spec, start) for start, item in zip(starts, items, strict=False)]
    source = [run for runs, item in zip(kept, items, strict=True) if item.embedded for run in runs]
    attended, tag = list[list[Run]](), sum(made)
    for item, runs in zip(items, kept, strict=True):
        attended.append([(tag, len(item.tag)), *runs] if item.tag else runs)
        tag += len(item.tag)
    dest, keys, span_tokens, span_keys = list[npt.NDArray[np.int64]](), list[Run](), list[int](), list[int]()
    places, image, last = list[ViewPlace](), -1, None
    first_token = first_item = 0
    for segment, document in enumerate(documents):
        dest.append(document.dest.astype(np.int64) + first_token)
        ends = [*(span.start for span in document.spans[1:]), document.num_tokens]
        for span, end in zip(document.spans, ends, strict=True):
            seen = [run for item_number in span.items for run in attended[first_item + item_number]]
            keys += seen
            span_tokens.append(end - span.start)
            span_keys.append(sum(count for _, count in seen))
        for item in document.items:
            image += (segment, item.image) != last
            last = segment, item.image
            places.append(ViewPlace(segment, image, item.tiles, item.place))
        first_token += document.num_tokens
        first_item += len(document.items)
    covered = None
    if spec.padding:
        regions = [item.coverage or Coverage.whole(*item.grid[1:]) for item in items]
        rows = [[*each.touched, *each.filled] for each in regions]
        covered = torch.tensor(rows, dtype=torch.int32).reshape(-1, 8)
    grids = tuple(item.grid for item in items)
    return MediaBlock(
        values=join([item.values for item in items] or [np.empty((0, spec.patch_dim), dtype=np.uint8)]),
        grid=torch.tensor(grids, dtype=torch.int32).reshape(-1, 3),
        grids=grids,
        items=Segments.from_lengths([len(item.values) for item in items]),
        source=_expand(source),
        dest=torch.from_numpy(np.concatenate(dest)),
        keys=_expand(keys),
        span_tokens=Segments.from_lengths(span_tokens),
        span_keys=Segments.from_lengths(span_keys),
        coverage=covered,
        places=tuple(places),
        tag_ids=torch.tensor([token for item in items for token in item.tag], dtype=torch.int64),
    )


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
    pairs, first_item, first_segment = list[Tensor](), 0, 0
    for batch in batches:
        pairs.append(batch.pairs + torch.tensor([first_item, first_segment]))
        first_item += batch.media[IMAGE].items.num if batch.media else 0
        first_segment += batch.segments.num
    return MultimodalBatch(
        token_ids=torch.cat([batch.token_ids for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        loss_weights=torch.cat([batch.loss_weights for batch in batches]),
        position_ids=torch.cat([batch.position_ids for batch in batches]),
        segments=_join([batch.segments for batch in batches]),
        valid=torch.cat([batch.valid for batch in batches]),
        media={IMAGE: _concatenate_media(batches, spec)} if batches[0].media else {},
        pairs=torch.cat(pairs),
        lanes=tuple(lane for batch in batches for lane in batch.lanes),
        lane_tokens=tuple(count for batch in batches for count in batch.lane_tokens),
        provenance=tuple(origin for batch in batches for origin in batch.provenance),
        weight=sum(batch.weight for batch in batches),
        num_tokens=sum(batch.num_tokens for batch in batches),
        branched=_concatenate_branched(batches) if any(batch.branched for batch in batches) else None,
    )


def _concatenate_media(batches: Sequence[MultimodalBatch], spec: MediaSpec) -> MediaBlock:
    blocks = [batch.media[IMAGE] for batch in batches]
    made = [sum(map(spec.num_features, block.grids)) for block in blocks]
    source, dest, keys, places = list[Tensor](), list[Tensor](), list[Tensor](), list[ViewPlace]()
    first_token = first_feature = first_tag = first_segment = first_image = 0
    for batch, block, own in zip(batches, blocks, made, strict=True):
        source.append(block.source + first_feature)
        dest.append(block.dest + first_token)
        # Rows of tags come after the features of all blocks.
        keys.append(block.keys + torch.where(block.keys < own, first_feature, sum(made) - own + first_tag))
        for place in block.places:
            segment, image = place.segment + first_segment, place.image + first_image
            places.append(place._replace(segment=segment, image=image))
        first_token += batch.segments.total
        first_feature += own
        first_tag += len(block.tag_ids)
        first_segment += batch.segments.num
        first_image += block.places[-1].image + 1 if block.places else 0
    coverage = [block.coverage for block in blocks if block.coverage is not None]
    return MediaBlock(
        values=torch.cat([block.values for block in blocks]),
        grid=torch.cat([block.grid for block in blocks]),
        grids=tuple(grid for block in blocks for grid in block.grids),
        items=_join([block.items for block in blocks]),
        source=torch.cat(source),
        dest=torch.cat(dest),
        keys=torch.cat(keys),
        span_tokens=_join([block.span_tokens for block in blocks]),
        span_keys=_join([block.span_keys for block in blocks]),
        coverage=torch.cat(coverage) if spec.padding else None,
        places=tuple(places),
        tag_ids=torch.cat([block.tag_ids for block in blocks]),
    )


def _concatenate_branched(batches: Sequence[MultimodalBatch]) -> BranchedSegments:
    pieces = [
        batch.branched or BranchedSegments.of((int(length), ()) for length in np.diff(batch.segments.bounds))
        for batch in batches
    ]
    first_tokens = itertools.accumulate((batch.segments.total for batch in batches), initial=0)
    return BranchedSegments(
        _join([piece.queries for piece in pieces]),
        _join([piece.keys for piece in pieces]),
        torch.cat([piece.rows + first for piece, first in zip(pieces, first_tokens, strict=False)]),
    )


def _join(pieces: Sequence[Segments]) -> Segments:
    """The pieces of several partitions, one partition after the other."""
    lengths = [b - a for piece in pieces for a, b in itertools.pairwise(piece.bounds)]
    return Segments.from_lengths(lengths)
