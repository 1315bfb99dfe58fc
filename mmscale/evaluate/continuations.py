"""Continue prompts by answers: each answer becomes a segment, and answers to one prompt share its image features.

    prompts, collated:   [bos <image> name:] [dummy]
    continued:           [bos <image> name: a red] [bos <image> name: a blue] [dummy]

Each image is encoded once. Every segment gathers the feature rows of its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.batch import MediaBlock, MultimodalBatch, Segments
from data_pipeline.document import IGNORE

RowIndices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Continuation:
    """An answer as token ids, to the prompt in segment ``segment``."""

    segment: int
    answer: tuple[int, ...]


@dataclass(frozen=True)
class _SegmentMedia:
    """Feature rows that one prompt reads.

    Attributes:
        scatter_index: Token positions of embedded features, relative to the start of the prompt.
        gather_index: Feature row of each of these positions.
        spans: (tokens, attended feature rows) of each cross-attention span.
    """

    scatter_index: RowIndices
    gather_index: RowIndices
    spans: tuple[tuple[int, RowIndices], ...]


def continue_prompts(prompts: MultimodalBatch, continuations: Sequence[Continuation]) -> MultimodalBatch:
    """Return a batch with one segment per answer: its prompt followed by the answer.

    Args:
        prompts: Collated prompts on the CPU. Its dummy documents are appended to the result, so that every module
            still runs; other segments without an answer are dropped.
        continuations: Answers in the order of the result's segments. Each has at least one token.

    Returns:
        A batch with labels and weights of 1 at the positions that predict the answers' tokens. The last token of an
        answer is a label only, not an input.
    """
    bounds = prompts.segments.bounds
    dummies = [s for s, origin in enumerate(prompts.provenance) if origin is None]
    order = [*continuations, *(Continuation(segment, ()) for segment in dummies)]
    ids, positions = prompts.token_ids.numpy(), prompts.position_ids.numpy()
    columns: dict[str, list[npt.NDArray[np.int64]]] = {"ids": [], "labels": [], "positions": []}
    for item in order:
        start, end = bounds[item.segment : item.segment + 2]
        answer = np.array(item.answer, dtype=np.int64)
        columns["ids"] += [ids[start:end], answer[:-1]]
        # The last prompt token predicts the first token of the answer.
        columns["labels"] += [np.full(end - start - min(1, len(answer)), IGNORE), answer]
        columns["positions"] += [positions[start:end], _next_positions(positions[start:end], len(answer) - 1)]
    lengths = [_length(prompts, item) for item in order]
    labels = torch.from_numpy(np.concatenate(columns["labels"]))
    valid = [torch.full((length,), item.segment not in dummies) for item, length in zip(order, lengths, strict=True)]
    weights = (labels != IGNORE).float()
    return replace(
        prompts,
        token_ids=torch.from_numpy(np.concatenate(columns["ids"])),
        labels=labels,
        loss_weights=weights,
        position_ids=torch.from_numpy(np.concatenate(columns["positions"])),
        segments=Segments.from_lengths(lengths),
        valid=torch.cat(valid),
        media={name: _continue_media(block, prompts, order) for name, block in prompts.media.items()},
        pairs=torch.empty(0, 2, dtype=torch.int64),
        provenance=tuple(prompts.provenance[item.segment] for item in order),
        weight=float(weights.sum()),
        learned=None,  # Those of the prompts; nothing here computes a loss.
        drawn=None,
        num_tokens=sum(length for item, length in zip(order, lengths, strict=True) if item.segment not in dummies),
    )


def _length(prompts: MultimodalBatch, item: Continuation) -> int:
    start, end = prompts.segments.bounds[item.segment : item.segment + 2]
    return end - start + max(0, len(item.answer) - 1)


def _next_positions(before: RowIndices, count: int) -> RowIndices:
    """Return positions of text after the prompt: they continue after the largest position on any axis."""
    steps = np.arange(1, max(0, count) + 1, dtype=np.int64) + before.max()
    return steps if before.ndim == 1 else np.repeat(steps[:, None], before.shape[1], axis=1)


def _continue_media(block: MediaBlock, prompts: MultimodalBatch, order: Sequence[Continuation]) -> MediaBlock:
    media_of = _media_by_segment(block, prompts.segments)
    scatter_index: list[RowIndices] = []
    gather_index, attended_index, span_tokens, span_keys = [], [], [], []
    first_token = 0
    for item in order:
        media = media_of[item.segment]
        scatter_index.append(media.scatter_index + first_token)
        gather_index.append(media.gather_index)
        num_appended = max(0, len(item.answer) - 1)
        for number, (tokens, rows) in enumerate(media.spans):
            attended_index.append(rows)
            span_tokens.append(tokens + (num_appended if number + 1 == len(media.spans) else 0))
            span_keys.append(len(rows))
        first_token += _length(prompts, item)
    return replace(
        block,
        gather_index=_tensor(gather_index),
        scatter_index=_tensor(scatter_index),
        attended_index=_tensor(attended_index),
        span_tokens=Segments.from_lengths(span_tokens),
        span_keys=Segments.from_lengths(span_keys),
    )


def _media_by_segment(block: MediaBlock, segments: Segments) -> list[_SegmentMedia]:
    scatter_index, gather_index = block.scatter_index.numpy(), block.gather_index.numpy()
    attended_index = block.attended_index.numpy()
    starts = block.span_tokens.bounds
    found, span = [], 0
    for start, end in zip(segments.bounds, segments.bounds[1:], strict=False):
        spans = []
        while span < block.span_tokens.num and starts[span] < end:
            first, last = block.span_keys.bounds[span : span + 2]
            spans.append((starts[span + 1] - starts[span], attended_index[first:last]))
            span += 1
        inside = (scatter_index >= start) & (scatter_index < end)
        found.append(_SegmentMedia(scatter_index[inside] - start, gather_index[inside], tuple(spans)))
    return found


def _tensor(pieces: Sequence[RowIndices]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *pieces]))
