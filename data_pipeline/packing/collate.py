"""Concatenation of packs to a batch, and of batches; index arrays are shifted to the new positions of their targets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.batch import (
    BranchedSegments,
    CropLocation,
    LearnedRows,
    MediaBlock,
    MultimodalBatch,
    Segments,
    UncodedImages,
)
from data_pipeline.document import IGNORE, ContentArea, Document, IndexRange, MediaItem
from data_pipeline.media_spec import IMAGE, MediaSpec, Placement
from data_pipeline.packing.packer import Pack

Join = Callable[[Sequence[npt.NDArray[Any]]], Tensor]
"""Concatenates the rows of arrays with the same dtype and number of columns to one tensor."""


def join_copies(arrays: Sequence[npt.NDArray[Any]]) -> Tensor:
    """Concatenate the rows of the arrays in new memory."""
    return torch.from_numpy(np.concatenate(arrays))


def join_nothing(arrays: Sequence[npt.NDArray[Any]]) -> Tensor:
    """Return no rows. A batch that is only counted needs no pixels."""
    return torch.from_numpy(np.empty((0, arrays[0].shape[1]), arrays[0].dtype))


def collate(packs: Sequence[Pack], spec: MediaSpec, join: Join = join_copies) -> MultimodalBatch:
    """Return a microbatch of the packs' documents, in order. Each document becomes a segment.

    Args:
        packs: The packs.
        spec: The model's inputs.
        join: Concatenates the patches, which are nearly all bytes of a batch.

    Raises:
        ValueError: the packs contain no document.
    """
    documents = [document for pack in packs for document in pack.documents]
    if not documents:
        raise ValueError("a batch needs at least one document")
    loss_weights = np.concatenate([document.loss_weights for document in documents])
    lengths = [document.num_tokens for document in documents]
    valid = np.repeat([not document.is_dummy for document in documents], lengths)
    branched = drawn = reference = None
    if any(document.drawn is not None for document in documents):
        nothing = (np.zeros(length, np.bool_) for length in lengths)
        parts = [none if each.drawn is None else each.drawn for each, none in zip(documents, nothing, strict=True)]
        drawn = np.concatenate(parts)
    if any(document.branches for document in documents):
        branched = BranchedSegments.from_branches((document.num_tokens, document.branches) for document in documents)
    if any(document.reference for document in documents):
        by_document = ((0.0, *(each.reference or [0.0] * len(each.branches))) for each in documents)
        reference = torch.tensor(list(itertools.chain(*by_document)), dtype=torch.float32)
    # A document with exactly one image gives a pair: its overview (or its first crop), and its segment.
    pairs, first_item = list[tuple[int, int]](), 0
    for segment, document in enumerate(documents):
        items = [item for item in document.items if item.modality == IMAGE]
        # A video and its sound in turns are one image of the document.
        clips = {item.image for item in document.items if item.modality != IMAGE} - {item.image for item in items}
        if document.num_images - len(clips) == 1 and items and not document.is_dummy:
            whole = [number for number, item in enumerate(items) if item.cell is None]
            pairs.append((first_item + (whole[0] if whole else 0), segment))
        first_item += len(items)
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
        media=_media(documents, spec, join),
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        lanes=tuple(pack.lane for pack in packs),
        lane_tokens=tuple(sum(document.num_tokens for document in pack.documents) for pack in packs),
        provenance=tuple(document.provenance for document in documents),
        weight=float(loss_weights.sum(dtype=np.float64)),
        learned=_learned(loss_weights, drawn, lengths),
        num_tokens=int(valid.sum()),
        branched=branched,
        drawn=None if drawn is None else torch.from_numpy(drawn),
        reference=reference,
        uncoded=None if spec.code_size is None else _uncoded(documents, spec, join),
    )


def _learned(
    loss_weights: npt.NDArray[np.float32], drawn: npt.NDArray[np.bool_] | None, lengths: Sequence[int]
) -> LearnedRows:
    """Return the rows with a loss weight.

    Args:
        loss_weights: Weight of each row.
        drawn: Marks codes of images, each the label of the row before in its document.
        lengths: Rows of each document.
    """
    rows = np.flatnonzero(loss_weights)
    if drawn is None:
        return LearnedRows(torch.from_numpy(rows), torch.empty(0, dtype=torch.int64))
    is_code = np.append(drawn[1:], False)
    is_code[np.cumsum(lengths) - 1] = False  # The next row is of another document.
    is_code = is_code[rows]
    return LearnedRows(torch.from_numpy(rows[~is_code]), torch.from_numpy(rows[is_code]))


def _uncoded(documents: Sequence[Document], spec: MediaSpec, join: Join) -> UncodedImages:
    items, first_token, first_code = list[MediaItem](), 0, 0
    slots, learned = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for document in documents:
        if document.uncoded and document.drawn is not None:
            own = np.flatnonzero(document.drawn)
            has_label = (own > 0) & (document.labels[own - 1] != IGNORE)
            items += document.uncoded
            slots.append(own + first_token)
            learned.append(np.flatnonzero(has_label) + first_code)
            first_code += len(own)
        first_token += document.num_tokens
    return UncodedImages(
        values=join([item.values for item in items] or [np.empty((0, spec.of_codes.patch_dim), np.uint8)]),
        grids=tuple(item.grid[1:] for item in items),
        slots=torch.from_numpy(np.concatenate(slots)),
        learned=torch.from_numpy(np.concatenate(learned)),
    )


def _media(documents: Sequence[Document], spec: MediaSpec, join: Join) -> dict[str, MediaBlock]:
    """Return the block of each modality of the model."""
    blocks = {} if spec.placement is Placement.NONE else {IMAGE: _images(documents, spec, join)}
    for name, inputs in spec.modalities.items():
        items = [item for document in documents for item in document.items if item.modality == name]
        grids = tuple(item.grid for item in items)
        blocks[name] = MediaBlock(
            values=join([item.values for item in items] or [np.empty((0, inputs.patch_dim), inputs.dtype)]),
            grid=torch.tensor(grids, dtype=torch.int32).reshape(-1, 3),
            grids=grids,
            items=Segments.from_lengths([len(item.values) for item in items]),
            gather_index=torch.arange(sum(map(inputs.num_features, grids))),
            scatter_index=torch.from_numpy(np.concatenate(_slots(documents, spec, name))),
            attended_index=torch.empty(0, dtype=torch.int64),
            span_tokens=Segments.from_lengths([]),
            span_keys=Segments.from_lengths([]),
            locations=_locations(documents, name),
        )
    return blocks


def _locations(documents: Sequence[Document], modality: str) -> tuple[CropLocation, ...]:
    locations, image, last = list[CropLocation](), -1, None
    for segment, document in enumerate(documents):
        for item in document.items:
            if item.modality == modality:
                image += (segment, item.image) != last
                last = segment, item.image
                locations.append(CropLocation(segment, image, item.tiles, item.cell, item.is_video))
    return tuple(locations)


def _slots(documents: Sequence[Document], spec: MediaSpec, modality: str) -> list[npt.NDArray[np.int64]]:
    """Return the token slots of the features of one modality in each document, counted over all documents."""
    found, first_token = list[npt.NDArray[np.int64]](), 0
    for document in documents:
        slots = document.scatter_index
        if any(item.modality != modality for item in document.items):
            embedded = [item for item in document.items if item.embedded]
            counts = [item.num_features(spec) for item in embedded]
            slots = slots[np.repeat(np.array([item.modality == modality for item in embedded], np.bool_), counts)]
        found.append(slots.astype(np.int64) + first_token)
        first_token += document.num_tokens
    return found


def _images(documents: Sequence[Document], spec: MediaSpec, join: Join) -> MediaBlock:
    items = [item for document in documents for item in document.items if item.modality == IMAGE]
    # Feature rows: the features of all items, item by item, then the embeddings of all tags. The index arrays use only
    # the kept features.
    num_features = [spec.of_frames(item.is_video).num_features(item.grid) for item in items]
    starts = itertools.accumulate(num_features, initial=0)
    kept = [item.kept_features(spec, start) for start, item in zip(starts, items, strict=False)]
    gathered = [each for ranges, item in zip(kept, items, strict=True) if item.embedded for each in ranges]
    attended, tag_row = list[list[IndexRange]](), sum(num_features)
    for item, ranges in zip(items, kept, strict=True):
        attended.append([(tag_row, len(item.tag)), *ranges] if item.tag else ranges)
        tag_row += len(item.tag)
    keys, span_tokens, span_keys = list[IndexRange](), list[int](), list[int]()
    rows_of = iter(attended)
    for document in documents:
        # Spans have numbers of items of all modalities, but attend only those of images.
        own = [next(rows_of) if item.modality == IMAGE else [] for item in document.items]
        ends = [*(span.start for span in document.spans[1:]), document.num_tokens]
        for span, end in zip(document.spans, ends, strict=True):
            own_keys = [each for item_number in span.items for each in own[item_number]]
            keys += own_keys
            span_tokens.append(end - span.start)
            span_keys.append(sum(count for _, count in own_keys))
    content_area = None
    if spec.padding:
        areas = [item.content_area or ContentArea.whole(*item.grid[1:]) for item in items]
        rows = [[*each.touched, *each.filled] for each in areas]
        content_area = torch.tensor(rows, dtype=torch.int32).reshape(-1, 8)
    grids = tuple(item.grid for item in items)
    first_patches = itertools.accumulate((len(item.values) for item in items), initial=0)
    later = [
        (first, item.later_values)
        for first, item in zip(first_patches, items, strict=False)
        if item.later_values is not None
    ]
    later_dim = (spec.frames_per_patch - 1) * spec.patch_dim
    return MediaBlock(
        values=join([item.values for item in items] or [np.empty((0, spec.patch_dim), dtype=np.uint8)]),
        grid=torch.tensor(grids, dtype=torch.int32).reshape(-1, 3),
        grids=grids,
        items=Segments.from_lengths([len(item.values) for item in items]),
        gather_index=_expand(gathered),
        scatter_index=torch.from_numpy(np.concatenate(_slots(documents, spec, IMAGE))),
        attended_index=_expand(keys),
        span_tokens=Segments.from_lengths(span_tokens),
        span_keys=Segments.from_lengths(span_keys),
        content_area=content_area,
        locations=_locations(documents, IMAGE),
        tag_ids=torch.tensor([token for item in items for token in item.tag], dtype=torch.int64),
        later_values=join([values for _, values in later]) if later else torch.empty(0, later_dim, dtype=torch.uint8),
        later_index=_expand([(start, len(values)) for start, values in later]),
    )


def _expand(ranges: Sequence[IndexRange]) -> Tensor:
    """Return all indices of the ranges in order, int64."""
    first, count = np.array(ranges, dtype=np.int64).reshape(-1, 2).T
    end = count.cumsum()
    indices = np.arange(end[-1] if ranges else 0)
    indices += np.repeat(first - (end - count), count)
    return torch.from_numpy(indices)


def concatenate(batches: Sequence[MultimodalBatch], spec: MediaSpec) -> MultimodalBatch:
    """Return one batch of several, equal to the batch that ``collate`` makes of all their packs.

    A single batch is returned as it is, not copied.
    """
    if len(batches) == 1:
        return batches[0]
    pairs, first_item, first_segment = list[Tensor](), 0, 0
    for batch in batches:
        pairs.append(batch.pairs + torch.tensor([first_item, first_segment]))
        first_item += batch.media[IMAGE].items.num if IMAGE in batch.media else 0
        first_segment += batch.segments.num
    return MultimodalBatch(
        token_ids=torch.cat([batch.token_ids for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        loss_weights=torch.cat([batch.loss_weights for batch in batches]),
        position_ids=torch.cat([batch.position_ids for batch in batches]),
        segments=_join([batch.segments for batch in batches]),
        valid=torch.cat([batch.valid for batch in batches]),
        media={name: _concatenate_media(batches, name, spec) for name in batches[0].media},
        pairs=torch.cat(pairs),
        lanes=tuple(lane for batch in batches for lane in batch.lanes),
        lane_tokens=tuple(count for batch in batches for count in batch.lane_tokens),
        provenance=tuple(origin for batch in batches for origin in batch.provenance),
        weight=sum(batch.weight for batch in batches),
        learned=_concatenate_learned(batches),
        num_tokens=sum(batch.num_tokens for batch in batches),
        branched=_concatenate_branched(batches) if any(batch.branched for batch in batches) else None,
        drawn=_concatenate_drawn(batches) if any(batch.drawn is not None for batch in batches) else None,
        reference=_concatenate_reference(batches) if any(each.reference is not None for each in batches) else None,
        uncoded=_concatenate_uncoded(batches) if spec.code_size is not None else None,
    )


def _concatenate_learned(batches: Sequence[MultimodalBatch]) -> LearnedRows | None:
    parts = [batch.learned for batch in batches]
    firsts = list(itertools.accumulate((batch.segments.total for batch in batches), initial=0))
    text = [part.text + first for part, first in zip(parts, firsts, strict=False) if part is not None]
    codes = [part.codes + first for part, first in zip(parts, firsts, strict=False) if part is not None]
    return LearnedRows(torch.cat(text), torch.cat(codes)) if len(text) == len(batches) else None


def _concatenate_uncoded(batches: Sequence[MultimodalBatch]) -> UncodedImages:
    slots, learned, first_token, first_code = list[Tensor](), list[Tensor](), 0, 0
    parts = [batch.uncoded for batch in batches if batch.uncoded is not None]
    for batch, part in zip(batches, parts, strict=True):
        slots.append(part.slots + first_token)
        learned.append(part.learned + first_code)
        first_token += batch.segments.total
        first_code += len(part.slots)
    grids = tuple(grid for part in parts for grid in part.grids)
    return UncodedImages(torch.cat([part.values for part in parts]), grids, torch.cat(slots), torch.cat(learned))


def _concatenate_drawn(batches: Sequence[MultimodalBatch]) -> Tensor:
    parts = [torch.zeros_like(batch.valid) if batch.drawn is None else batch.drawn for batch in batches]
    return torch.cat(parts)


def _concatenate_reference(batches: Sequence[MultimodalBatch]) -> Tensor:
    counts = [(batch.segments if batch.branched is None else batch.branched.queries).num for batch in batches]
    parts = [
        torch.zeros(count) if batch.reference is None else batch.reference
        for batch, count in zip(batches, counts, strict=True)
    ]
    return torch.cat(parts)


def _concatenate_media(batches: Sequence[MultimodalBatch], modality: str, spec: MediaSpec) -> MediaBlock:
    blocks = [batch.media[modality] for batch in batches]
    num_features = [_num_features(block, modality, spec) for block in blocks]
    gather, scatter, attended, locations = list[Tensor](), list[Tensor](), list[Tensor](), list[CropLocation]()
    later = list[Tensor]()
    first_token = first_feature = first_tag = first_segment = first_image = first_patch = 0
    for batch, block, count in zip(batches, blocks, num_features, strict=True):
        gather.append(block.gather_index + first_feature)
        scatter.append(block.scatter_index + first_token)
        # The rows of all tags come after the features of all blocks.
        tag_shift = sum(num_features) - count + first_tag
        attended.append(block.attended_index + torch.where(block.attended_index < count, first_feature, tag_shift))
        later.append(block.later_index + first_patch)
        for location in block.locations:
            segment, image = location.segment + first_segment, location.image + first_image
            locations.append(location._replace(segment=segment, image=image))
        first_token += batch.segments.total
        first_feature += count
        first_tag += len(block.tag_ids)
        first_patch += block.items.total
        first_segment += batch.segments.num
        first_image += block.locations[-1].image + 1 if block.locations else 0
    content_area = [block.content_area for block in blocks if block.content_area is not None]
    return MediaBlock(
        values=torch.cat([block.values for block in blocks]),
        grid=torch.cat([block.grid for block in blocks]),
        grids=tuple(grid for block in blocks for grid in block.grids),
        items=_join([block.items for block in blocks]),
        gather_index=torch.cat(gather),
        scatter_index=torch.cat(scatter),
        attended_index=torch.cat(attended),
        span_tokens=_join([block.span_tokens for block in blocks]),
        span_keys=_join([block.span_keys for block in blocks]),
        content_area=torch.cat(content_area) if content_area else None,
        locations=tuple(locations),
        tag_ids=torch.cat([block.tag_ids for block in blocks]),
        later_values=torch.cat([block.later_values for block in blocks]),
        later_index=torch.cat(later),
    )


def _num_features(block: MediaBlock, modality: str, spec: MediaSpec) -> int:
    if modality != IMAGE:
        return sum(map(spec.inputs_of(modality).num_features, block.grids))
    flags = [location.is_video for location in block.locations]
    return sum(spec.of_frames(flag).num_features(grid) for flag, grid in zip(flags, block.grids, strict=True))


def _concatenate_branched(batches: Sequence[MultimodalBatch]) -> BranchedSegments:
    parts = [
        batch.branched or BranchedSegments.from_branches((int(length), ()) for length in np.diff(batch.segments.bounds))
        for batch in batches
    ]
    first_tokens = itertools.accumulate((batch.segments.total for batch in batches), initial=0)
    return BranchedSegments(
        _join([part.queries for part in parts]),
        _join([part.keys for part in parts]),
        torch.cat([part.key_tokens + first for part, first in zip(parts, first_tokens, strict=False)]),
    )


def _join(partitions: Sequence[Segments]) -> Segments:
    """Return the segments of all partitions in order."""
    lengths = [b - a for partition in partitions for a, b in itertools.pairwise(partition.bounds)]
    return Segments.from_lengths(lengths)
