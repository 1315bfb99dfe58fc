"""Cached keys and values for generation: of the sequences so far, and of the images that they attend to."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import Segments
from mmscale.nn.block import LayerCache
from mmscale.nn.host import to_device


@dataclass(frozen=True)
class CrossCache:
    """Keys and values ``(A, G, K)`` of one cross-attention block; ``segments`` partitions their rows by sequence."""

    keys: Tensor
    values: Tensor
    segments: Segments


@dataclass
class KVCache:
    """Keys and values of all layers. The first forward pass fills it with whole prompts, later ones with new tokens.

    Attributes:
        capacity: Most rows per sequence: the longest prompt plus the number of new tokens.
        cross: Keys and values of each cross-attention block, by the number of the decoder block after it.
    """

    capacity: int
    cross: dict[int, CrossCache] = field(default_factory=dict)
    _lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    _stores: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _rows: Tensor | None = None
    _visible: Tensor | None = None
    _segments: Segments | None = None
    _shape: tuple[int, int] = (0, 0)
    _dtype: torch.dtype = torch.float32

    @property
    def started(self) -> bool:
        """Whether the prompts are in the cache."""
        return len(self._lengths) > 0

    def advance(self, segments: Segments, num_kv_heads: int, head_dim: int, like: Tensor) -> None:
        """Reserve buffer rows for new tokens. Call it once per forward pass, before the blocks.

        Args:
            segments: New rows, one segment per sequence, in the same order in each call.
            num_kv_heads: G.
            head_dim: K.
            like: A tensor with the device and dtype of the buffers.

        Raises:
            ValueError: a sequence exceeds ``capacity``, or the number of sequences changed.
        """
        new = np.diff(segments.bounds)
        if not self.started:
            self._lengths = np.zeros(len(new), dtype=np.int64)
        if len(new) != len(self._lengths):
            raise ValueError(f"the cache holds {len(self._lengths)} sequences, the batch has {len(new)}")
        total = self._lengths + new
        if total.max() > self.capacity:
            raise ValueError(f"a sequence grows to {total.max()} rows; the cache holds {self.capacity} a sequence")
        first = np.arange(len(new)) * self.capacity
        device = like.device
        self._rows = _ranges(first + self._lengths, new).to(device)
        self._visible = _ranges(first, total).to(device)
        pieces = Segments.from_lengths(total.tolist())
        self._segments = Segments(to_device(pieces.cu, device), pieces.bounds)
        self._lengths = total
        self._shape, self._dtype = (num_kv_heads, head_dim), like.dtype

    def layer(self, number: int) -> LayerCache:
        """Return the cache of decoder block ``number`` for this forward pass. Requires ``advance``."""
        assert self._rows is not None, "advance() comes first"
        assert self._visible is not None
        assert self._segments is not None
        if number not in self._stores:
            shape = (len(self._lengths), self.capacity, *self._shape)
            keys = torch.zeros(shape, dtype=self._dtype, device=self._rows.device)
            self._stores[number] = (keys, torch.zeros_like(keys))
        keys, values = self._stores[number]
        return LayerCache(keys, values, self._rows, self._visible, self._segments)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> Tensor:
    """Return ``range(start, start + length)`` of each pair, concatenated."""
    pieces = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    return torch.from_numpy(np.concatenate(pieces))
