"""The batch contract: the only thing that crosses from data to model.

Everything is packed: there is no batch dimension and no padding. Index arrays are made here, on the host, so that the
device never searches for placeholders and never waits for the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipeline.sample import Provenance

_MOST_SHOWN = 3
"""Longer tuples are counted in a ``repr``."""


def map_batch(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """``value``, a batch or a value in one, with every instance of ``kind`` changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: map_batch(item, kind, change) for key, item in value.items()}
    if isinstance(value, MultimodalBatch | MediaBlock | Segments | BranchedSegments):
        return replace(value, **{f.name: map_batch(getattr(value, f.name), kind, change) for f in fields(value)})
    return value


class _Brief:
    """A dataclass whose ``repr`` gives shapes and counts instead of thousands of numbers."""

    def __repr__(self) -> str:
        shown = (f"{f.name}={_brief(getattr(self, f.name))}" for f in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(shown)})"


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"<{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}>"
    if isinstance(value, tuple) and len(value) > _MOST_SHOWN:
        return f"<{len(value)} of {type(value[0]).__name__}>"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_brief(item)}" for key, item in value.items()) + "}"
    return repr(value)


@dataclass(frozen=True, repr=False)
class Segments(_Brief):
    """A partition of packed rows into consecutive pieces.

    Attributes:
        cu: int32 ``(S + 1,)`` prefix sums, on the device of the batch.
        bounds: The same numbers on the host, for backends that loop.
    """

    cu: Tensor
    bounds: tuple[int, ...]

    @classmethod
    def from_lengths(cls, lengths: list[int]) -> Segments:
        bounds = tuple(itertools.accumulate(lengths, initial=0))
        return cls(torch.tensor(bounds, dtype=torch.int32), bounds)

    @property
    def num(self) -> int:
        return len(self.bounds) - 1

    @property
    def total(self) -> int:
        return self.bounds[-1]

    @property
    def longest(self) -> int:
        """Rows of the longest segment; 0 if there is none."""
        return max((b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)), default=0)


@dataclass(frozen=True, repr=False)
class BranchedSegments(_Brief):
    """What each token attends where documents have branches: several texts, one beginning, blind to each other.

    ::

        document   [prefix | branch a | branch b]
        queries    [prefix] [branch a]          [branch b]
        keys       [prefix] [prefix | branch a] [prefix | branch b]

    A document without branches is one piece of both. Causal attention of a piece is aligned at its end, so a branch
    sees all of the prefix.

    Attributes:
        queries: Partition of the T tokens.
        keys: Partition of ``rows`` into as many pieces.
        rows: int64 ``(R,)`` the token whose key and value stand in each row of ``keys``.
    """

    queries: Segments
    keys: Segments
    rows: Tensor

    @classmethod
    def of(cls, documents: Iterable[tuple[int, tuple[int, ...]]]) -> BranchedSegments:
        """From the length of each document and where its branches start, counted from its own first token."""
        queries, keys, rows = [], [], []
        first = 0
        for length, branches in documents:
            prefix = branches[0] if branches else 0
            starts = [0, *branches]
            for start, end in zip(starts, [*branches, length], strict=True):
                seen = prefix if start else 0
                queries.append(end - start)
                keys.append(seen + end - start)
                rows += [torch.arange(first, first + seen), torch.arange(first + start, first + end)]
            first += length
        return cls(Segments.from_lengths(queries), Segments.from_lengths(keys), torch.cat(rows))


class ViewPlace(NamedTuple):
    """Where an item belongs.

    Attributes:
        segment: The document that it is a part of.
        image: Number of its image in the batch; items of one image stand together, in reading order.
        tiles: Rows and columns of tiles that its image is cut into; (1, 1) if it is in one piece.
        tile: Row and column of this tile; None if the item shows the whole image.
    """

    segment: int
    image: int
    tiles: tuple[int, int]
    tile: tuple[int, int] | None


@dataclass(frozen=True, repr=False)
class MediaBlock(_Brief):
    """All views of one modality in a batch, packed.

    "Feature" is a row of what tower and projector hand to the decoder: item after item, ``num_features`` of each.

    Attributes:
        values: uint8 ``(P, patch_dim)`` patches.
        grid: int32 ``(N, 3)`` patches along (time, height, width) of each item.
        grids: The same on the host.
        items: Partition of the P patches into N items.
        source: int64 ``(M,)`` feature rows that are written into token slots.
        dest: int64 ``(M,)`` the token slot of each.
        keys: int64 ``(A,)`` feature rows that are attended, span after span; a row may occur more than once. Numbers
            behind those of all features are embeddings of ``tag_ids``.
        span_tokens: Partition of the T tokens into X spans.
        span_keys: Partition of ``keys`` into the same X spans; a span of text before any image has no keys.
        coverage: int32 ``(N, 8)``, of each item the patches that the image touches and those that it fills: top, left,
            height and width of both. None: no item has padding, or the model does not want to know.
        places: Of each item its document, image and tile, on the host.
        tag_ids: int64 ``(G,)`` tokens whose embeddings are attended as if they were features (NVLM-H's tags of tiles).
    """

    values: Tensor
    grid: Tensor
    grids: tuple[tuple[int, int, int], ...]
    items: Segments
    source: Tensor
    dest: Tensor
    keys: Tensor
    span_tokens: Segments
    span_keys: Segments
    coverage: Tensor | None = None
    places: tuple[ViewPlace, ...] = ()
    tag_ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


AttentionSegments = Segments | BranchedSegments
"""Which keys belong to which queries."""


@dataclass(frozen=True, repr=False)
class MultimodalBatch(_Brief):
    """One microbatch.

    Attributes:
        token_ids: int64 ``(T,)``.
        labels: int64 ``(T,)`` the token to predict at each position, or -100.
        loss_weights: float32 ``(T,)``.
        position_ids: int64 ``(T,)`` or ``(T, 3)``.
        segments: Partition of the T tokens into S documents.
        branched: What each token attends if a document has branches; None: its document up to itself.
        valid: bool ``(T,)``; False in null documents (kept out of router statistics).
        media: Blocks by modality, ``{"image": MediaBlock}``; empty for a text model.
        pairs: int64 ``(K, 2)`` (item, segment) of each document that has exactly one image.
        lanes: Rows of the global batch in this microbatch, in order; -1 for a null pack.
        lane_tokens: How many of the T tokens belong to each of ``lanes``.
        provenance: Origin of each segment; None for null documents.
        weight: Sum of ``loss_weights``, on the host.
        num_tokens: Valid tokens, on the host.
        dropout_key: Seed and step of the run, for the masks of dropout. None outside of training.
    """

    token_ids: Tensor
    labels: Tensor
    loss_weights: Tensor
    position_ids: Tensor
    segments: Segments
    valid: Tensor
    media: dict[str, MediaBlock] = field(default_factory=dict)
    pairs: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int64))
    lanes: tuple[int, ...] = ()
    lane_tokens: tuple[int, ...] = ()
    provenance: tuple[Provenance | None, ...] = ()
    weight: float = 0.0
    num_tokens: int = 0
    branched: BranchedSegments | None = None
    dropout_key: tuple[int, int] | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MultimodalBatch:
        """The same batch with every tensor on ``device``."""
        moved: MultimodalBatch = map_batch(self, Tensor, lambda each: each.to(device, non_blocking=non_blocking))
        return moved

    @property
    def attended(self) -> AttentionSegments:
        """What self-attention goes by."""
        return self.segments if self.branched is None else self.branched

    @property
    def num_samples(self) -> int:
        """Documents that are no null documents."""
        return sum(origin is not None for origin in self.provenance)

    @property
    def num_images(self) -> int:
        """Whole images of documents that are not null documents."""
        places = [place for block in self.media.values() for place in block.places]
        return len({place.image for place in places if self.provenance[place.segment] is not None})
