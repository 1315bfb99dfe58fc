"""The batch contract: the data that the loader passes to the model.

Everything is packed: there is no batch dimension, and there are no padding tokens. The loader computes all index arrays
on the host, so the model never searches for placeholder tokens on the device and needs no device-to-host
synchronisation for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipeline.document import IGNORE
from data_pipeline.media_spec import IMAGE
from data_pipeline.sample import Provenance

_MAX_REPR_ITEMS = 3
"""``repr`` gives the length of a longer tuple instead of its items."""


def map_batch(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Return a copy of ``value`` in which ``change`` was applied to every instance of ``kind``.

    Descends into dicts and the dataclasses of this module, not into tuples or lists.
    """
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: map_batch(item, kind, change) for key, item in value.items()}
    if isinstance(value, MultimodalBatch | MediaBlock | UncodedImages | LearnedRows | Segments | BranchedSegments):
        return replace(value, **{f.name: map_batch(getattr(value, f.name), kind, change) for f in fields(value)})
    return value


class _Brief:
    """A dataclass whose ``repr`` gives shapes and counts instead of thousands of numbers."""

    def __repr__(self) -> str:
        items = (f"{f.name}={_brief(getattr(self, f.name))}" for f in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(items)})"


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"<{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}>"
    if isinstance(value, tuple) and len(value) > _MAX_REPR_ITEMS:
        return f"<{len(value)} of {type(value[0]).__name__}>"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_brief(item)}" for key, item in value.items()) + "}"
    return repr(value)


@dataclass(frozen=True, repr=False)
class Segments(_Brief):
    """A partition of packed rows into S consecutive segments; segment i has the rows ``bounds[i]:bounds[i + 1]``.

    Attributes:
        cu: int32 ``(S + 1,)`` prefix sums of the segments' lengths, on the device of the batch.
        bounds: The same numbers on the host, for attention backends that loop over segments.
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
    """Attention segments of documents with branches: texts that share a prefix and do not attend each other.

    ::

        document   [prefix | branch a | branch b]
        queries    [prefix] [branch a]          [branch b]
        keys       [prefix] [prefix | branch a] [prefix | branch b]

    Segment i of ``queries`` attends segment i of ``keys``. A document without branches is one segment of both. The
    causal mask is aligned at the last query and the last key, so a branch attends the whole prefix.

    Attributes:
        queries: Partition of the T tokens.
        keys: Partition of ``key_tokens`` into the same number of segments.
        key_tokens: int64 ``(R,)`` the token whose key and value each row of ``keys`` uses.
    """

    queries: Segments
    keys: Segments
    key_tokens: Tensor

    @classmethod
    def from_branches(cls, documents: Iterable[tuple[int, tuple[int, ...]]]) -> BranchedSegments:
        """Return the segments of packed documents.

        Args:
            documents: For each document its length and the first token of each branch, counted from the document's
                first token.
        """
        queries, keys, key_tokens = [], [], []
        first = 0
        for length, branches in documents:
            prefix = branches[0] if branches else 0
            starts = [0, *branches]
            for start, end in zip(starts, [*branches, length], strict=True):
                attended = prefix if start else 0
                queries.append(end - start)
                keys.append(attended + end - start)
                key_tokens += [torch.arange(first, first + attended), torch.arange(first + start, first + end)]
            first += length
        return cls(Segments.from_lengths(queries), Segments.from_lengths(keys), torch.cat(key_tokens))


class CropLocation(NamedTuple):
    """The document, the image and the tile that an item of a media block was made from.

    Attributes:
        segment: Number of its document in the batch.
        image: Number of its image in the batch; the items of one image are consecutive, in reading order.
        tiles: Rows and columns of tiles that its image is cut into; (1, 1) if the image is not tiled.
        tile: Row and column of this tile; None if the item shows the whole image.
        is_video: Whether the item is a video, or a crop of one of its frames.
    """

    segment: int
    image: int
    tiles: tuple[int, int]
    tile: tuple[int, int] | None
    is_video: bool = False


@dataclass(frozen=True, repr=False)
class MediaBlock(_Brief):
    """All items of one modality in a batch, packed: crops of images, or chunks of sound.

    The feature rows are the output of tower and projector: for each item in order, its ``num_features`` rows
    (``MediaSpec.inputs_of``). Every feature of another modality than images is written into a token slot, so the fields
    after ``scatter_index`` are empty there, except ``locations``.

    Attributes:
        values: uint8 ``(P, patch_dim)`` patches. A perceptual loss passes floats from 0 to 255 with a gradient. Sound
            has float32 ``(P, num_bins)`` frames.
        grid: int32 ``(N, 3)`` patches along (time, height, width) of each item.
        grids: The same on the host.
        items: Partition of the P patches into N items.
        gather_index: int64 ``(M,)`` the feature rows that are written into token slots.
        scatter_index: int64 ``(M,)`` the token slot of each row of ``gather_index``.
        attended_index: int64 ``(A,)`` the feature rows that are attended, span by span; a row may occur more than once.
            With F feature rows in the block, the number F + i is the embedding of ``tag_ids[i]``.
        span_tokens: Partition of the T tokens into X spans.
        span_keys: Partition of ``attended_index`` into the same X spans; a span of text before any image has no keys.
        content_area: int32 ``(N, 8)``: for each item top, left, height and width of the patches that contain any image
            pixel, then of the patches without padding. None unless ``MediaSpec.padding`` is set.
        locations: Document, image and tile of each item, on the host.
        tag_ids: int64 ``(G,)`` tokens whose embeddings are attended as if they were features (tile tags of NVLM-H).
        later_values: uint8 ``(Q, (frames_per_patch - 1) * patch_dim)`` the second and later frames of the patches of
            videos, if patches span several frames; ``values`` has the first.
        later_index: int64 ``(Q,)`` the row in ``values`` of each row of ``later_values``, ascending.
    """

    values: Tensor
    grid: Tensor
    grids: tuple[tuple[int, int, int], ...]
    items: Segments
    gather_index: Tensor
    scatter_index: Tensor
    attended_index: Tensor
    span_tokens: Segments
    span_keys: Segments
    content_area: Tensor | None = None
    locations: tuple[CropLocation, ...] = ()
    tag_ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    later_values: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.uint8))
    later_index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


@dataclass(frozen=True, repr=False)
class UncodedImages(_Brief):
    """The images as tokens whose codes the model computes (``image_tokens.encoded: in_step``).

    Attributes:
        values: uint8 ``(P, channels * code_size**2)``: the pixels of each code, image by image in reading order, in
            order (channel, row, column).
        grids: Rows and columns of codes of each image, on the host.
        slots: int64 ``(P,)`` the token that each code becomes; until then it is that of code 0.
        learned: int64 ``(L,)`` the codes, numbered from 0 to P - 1, that are also the label of the row before their
            token.
    """

    values: Tensor
    grids: tuple[tuple[int, int], ...]
    slots: Tensor
    learned: Tensor


@dataclass(frozen=True, repr=False)
class LearnedRows(_Brief):
    """The rows of a batch with a loss weight, by the kind of their label. Their numbers are known on the host.

    Attributes:
        text: int64, ascending: rows whose label is no code of an image.
        codes: int64, ascending: rows whose label is a code of an image.
    """

    text: Tensor
    codes: Tensor

    def index(self) -> Tensor:
        """Return all rows, ascending."""
        return torch.cat([self.text, self.codes]).sort().values if len(self.codes) else self.text


AttentionSegments = Segments | BranchedSegments
"""The keys that each query of self-attention may attend, before the causal mask."""


@dataclass(frozen=True, repr=False)
class MultimodalBatch:
    """One microbatch.

    Attributes:
        token_ids: int64 ``(T,)``.
        labels: int64 ``(T,)`` the token to predict at each position, or -100.
        loss_weights: float32 ``(T,)``.
        position_ids: int64 ``(T,)`` or ``(T, 3)``.
        segments: Partition of the T tokens into S documents.
        branched: Attention segments if any document has branches; None: each token attends its document up to itself.
        valid: bool ``(T,)``; False in dummy documents, whose tokens router statistics leave out.
        media: A block for each modality of the model, ``{"image": MediaBlock, "audio": MediaBlock}``; empty for a text
            model.
        pairs: int64 ``(K, 2)`` (item, segment) of each document with exactly one image, dummy documents excluded. The
            item is the image's overview, or its first crop if it has none.
        lanes: Rows of the global batch in this microbatch, in order; -1 for a dummy pack.
        lane_tokens: Number of tokens of each of ``lanes``, dummy documents included.
        provenance: Origin of each segment; None for dummy documents.
        weight: Sum of ``loss_weights``, on the host.
        learned: The rows whose ``loss_weights`` are not 0, so that the loss need not wait for the device to find them.
            None if they are not known.
        num_tokens: Number of valid tokens, on the host.
        drawn: bool ``(T,)``: whether each token is a code of an image (``images.drawn_images``) rather than text or a
            mark around an image. None if no document of the microbatch has an image as tokens.
        reference: float32, for each segment of ``branched.queries`` its log-probability under a stored reference
            model; 0 for segments that are no branch. None if no document has any.
        uncoded: Images whose codes the model must compute first (``MultimodalModel.with_codes``); None if all tokens
            are known.
        dropout_key: Seed and step of the run, from which dropout masks are computed; the training loop sets it. None
            outside of training.
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
    learned: LearnedRows | None = None
    num_tokens: int = 0
    branched: BranchedSegments | None = None
    drawn: Tensor | None = None
    reference: Tensor | None = None
    uncoded: UncodedImages | None = None
    dropout_key: tuple[int, int] | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MultimodalBatch:
        """Return the batch with every tensor on ``device``.

        With ``non_blocking``, tensors for a CUDA device are first copied to pinned memory: a copy from other memory
        makes the host wait. The allocator of pinned memory reuses a source only after its copy to the device.
        """
        pins = non_blocking and torch.device(device).type == "cuda"

        def move(tensor: Tensor) -> Tensor:
            source = tensor.pin_memory() if pins and not tensor.is_cuda else tensor
            return source.to(device, non_blocking=non_blocking)

        moved: MultimodalBatch = map_batch(self, Tensor, move)
        return moved

    def __repr__(self) -> str:
        crops = "".join(
            f", {name}: {block.items.num} {'crops' if name == IMAGE else 'items'} of {block.items.total:,} patches"
            for name, block in self.media.items()
        )
        return (
            f"MultimodalBatch({len(self.token_ids):,} tokens, {self.num_samples} documents{crops}, "
            f"loss weight {self.weight:,.6g}, {self.token_ids.device})"
        )

    @property
    def attended(self) -> AttentionSegments:
        """The segments for self-attention: ``branched`` if a document has branches, else ``segments``."""
        return self.segments if self.branched is None else self.branched

    @property
    def drawn_labels(self) -> Tensor | None:
        """bool ``(T,)``: whether each label is a code of an image; None if ``drawn`` is None.

        The label of a code is at the position before it. The last label of a document, or of a part of one, is none.
        """
        if self.drawn is None:
            return None
        codes = torch.cat([self.drawn[1:], self.drawn.new_zeros(1)]) & (self.labels != IGNORE)
        return codes.index_fill(0, self.segments.cu[1:].long() - 1, False)

    @property
    def num_samples(self) -> int:
        """Number of documents, without dummy documents."""
        return sum(origin is not None for origin in self.provenance)

    @property
    def num_images(self) -> int:
        """Number of images, without those of dummy documents; an image counts once, however many crops it has."""
        return self.num_inputs(IMAGE)

    def num_inputs(self, modality: str) -> int:
        """Return the number of images, or of clips of another modality, without those of dummy documents."""
        block = self.media.get(modality)
        locations = () if block is None else block.locations
        return len({location.image for location in locations if self.provenance[location.segment] is not None})
