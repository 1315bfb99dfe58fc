"""Prompts and answers to one batch: every answer is a segment of its own, and answers to one image share its features.

    prompts, collated:   [bos <image> name:] [null]
    branched:            [bos <image> name: a red] [bos <image> name: a blue] [null]

The image is encoded once; the feature rows that its prompt reads are named again by every segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.batch import MediaBlock, MultimodalBatch, Segments
from data_pipeline.document import IGNORE

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Branch:
    """An answer, as token ids, to the prompt in segment ``segment``."""

    segment: int
    answer: tuple[int, ...]


@dataclass(frozen=True)
class _SegmentMedia:
    """What one prompt reads: slots relative to its start, and spans as (tokens, feature rows)."""

    dest: Rows
    source: Rows
    spans: tuple[tuple[int, Rows], ...]


def branch(prompts: MultimodalBatch, branches: Sequence[Branch]) -> MultimodalBatch:
    """Continues prompts by answers.

    Args:
        prompts: Collated prompts, on the host; segments that no branch names and that are null documents stay, at the
            end, so that every module still runs.
        branches: In the order of the segments of the result. An answer has at least one token.

    Returns:
        A batch whose labels and weights (1) sit where the answers' tokens are predicted; the last token of an answer
        is predicted but not read.
    """
    bounds = prompts.segments.bounds
    nulls = [s for s, origin in enumerate(prompts.provenance) if origin is None]
    order = [*branches, *(Branch(segment, ()) for segment in nulls)]
    ids, positions = prompts.token_ids.numpy(), prompts.position_ids.numpy()
    columns: dict[str, list[npt.NDArray[np.int64]]] = {"ids": [], "labels": [], "positions": []}
    for item in order:
        start, end = bounds[item.segment : item.segment + 2]
        answer = np.array(item.answer, dtype=np.int64)
        columns["ids"] += [ids[start:end], answer[:-1]]
        # With an answer the last prompt token predicts its first token.
        columns["labels"] += [np.full(end - start - min(1, len(answer)), IGNORE), answer]
        columns["positions"] += [positions[start:end], _next_positions(positions[start:end], len(answer) - 1)]
    lengths = [_length(prompts, item) for item in order]
    labels = torch.from_numpy(np.concatenate(columns["labels"]))
    valid = [torch.full((length,), item.segment not in nulls) for item, length in zip(order, lengths, strict=True)]
    weights = (labels != IGNORE).float()
    return replace(
        prompts,
        token_ids=torch.from_numpy(np.concatenate(columns["ids"])),
        labels=labels,
        loss_weights=weights,
        position_ids=torch.from_numpy(np.concatenate(columns["positions"])),
        segments=Segments.from_lengths(lengths),
        valid=torch.cat(valid),
        media={name: _branch_media(block, prompts, order) for name, block in prompts.media.items()},
        pairs=torch.empty(0, 2, dtype=torch.int64),
        provenance=tuple(prompts.provenance[item.segment] for item in order),
        weight=float(weights.sum()),
        num_tokens=sum(length for item, length in zip(order, lengths, strict=True) if item.segment not in nulls),
    )


def _length(prompts: MultimodalBatch, item: Branch) -> int:
    start, end = prompts.segments.bounds[item.segment : item.segment + 2]
    return end - start + max(0, len(item.answer) - 1)


def _next_positions(before: Rows, count: int) -> Rows:
    """Positions of text that follows: past the largest so far on any axis, as the documents themselves do."""
    steps = np.arange(1, max(0, count) + 1, dtype=np.int64) + before.max()
    return steps if before.ndim == 1 else np.repeat(steps[:, None], before.shape[1], axis=1)


def _branch_media(block: MediaBlock, prompts: MultimodalBatch, order: Sequence[Branch]) -> MediaBlock:
    read = _by_segment(block, prompts.segments)
    dest: list[Rows] = []
    source, keys, span_tokens, span_keys = [], [], [], []
    first_token = 0
    for item in order:
        media = read[item.segment]
        dest.append(media.dest + first_token)
        source.append(media.source)
        longer = max(0, len(item.answer) - 1)
        for number, (tokens, rows) in enumerate(media.spans):
            keys.append(rows)
            span_tokens.append(tokens + (longer if number + 1 == len(media.spans) else 0))
            span_keys.append(len(rows))
        first_token += _length(prompts, item)
    return replace(
        block,
        source=_tensor(source),
        dest=_tensor(dest),
        keys=_tensor(keys),
        span_tokens=Segments.from_lengths(span_tokens),
        span_keys=Segments.from_lengths(span_keys),
    )


def _by_segment(block: MediaBlock, segments: Segments) -> list[_SegmentMedia]:
    dest, source, keys = block.dest.numpy(), block.source.numpy(), block.keys.numpy()
    starts = block.span_tokens.bounds
    read, span = [], 0
    for start, end in zip(segments.bounds, segments.bounds[1:], strict=False):
        spans = []
        while span < block.span_tokens.num and starts[span] < end:
            first, last = block.span_keys.bounds[span : span + 2]
            spans.append((starts[span + 1] - starts[span], keys[first:last]))
            span += 1
        inside = (dest >= start) & (dest < end)
        read.append(_SegmentMedia(dest[inside] - start, source[inside], tuple(spans)))
    return read


def _tensor(pieces: Sequence[Rows]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *pieces]))
