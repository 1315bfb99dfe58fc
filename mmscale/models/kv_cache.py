"""Cached keys and values for generation: of the sequences so far, and of the images that they attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import Segments
from mmscale.nn.host import to_device
from mmscale.nn.layer_cache import CacheRows, LayerCache, ranges


@dataclass(frozen=True)
class CrossCache:
    """Keys and values ``(A, G, K)`` of one cross-attention block; ``segments`` partitions their rows by sequence."""

    keys: Tensor
    values: Tensor
    segments: Segments

    def of_sequences(self, sequences: Sequence[int]) -> CrossCache:
        """Return the rows of some sequences, in this order."""
        bounds, chosen = np.array(self.segments.bounds), list(sequences)
        starts, lengths = bounds[chosen], np.diff(bounds)[chosen]
        index = to_device(ranges(starts, lengths), self.keys.device)
        pieces = Segments.from_lengths(lengths.tolist())
        segments = Segments(to_device(pieces.cu, self.keys.device), pieces.bounds)
        return CrossCache(self.keys.index_select(0, index), self.values.index_select(0, index), segments)


@dataclass
class KVCache:
    """Keys and values of all layers. The first forward pass fills it with whole prompts, later ones with new tokens.

    Attributes:
        capacity: Most rows per sequence: the longest prompt plus the number of new tokens.
        cross: Keys and values of each cross-attention block, by the number of the decoder block after it.
    """

    capacity: int
    cross: dict[int, CrossCache] = field(default_factory=dict)
    _stores: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _rows: CacheRows | None = None
    _shape: tuple[int, int] = (0, 0)
    _dtype: torch.dtype = torch.float32

    @property
    def started(self) -> bool:
        """Whether the prompts are in the cache."""
        return self._rows is not None

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
        before = np.zeros(len(new), dtype=np.int64) if self._rows is None else self._rows.lengths
        if len(new) != len(before):
            raise ValueError(f"the cache holds {len(before)} sequences, the batch has {len(new)}")
        if (longest := (before + new).max()) > self.capacity:
            raise ValueError(f"a sequence grows to {longest} rows; the cache holds {self.capacity} a sequence")
        self._rows = CacheRows.after(before, new, self.capacity, like.device)
        self._shape, self._dtype = (num_kv_heads, head_dim), like.dtype

    def keep(self, sequences: Sequence[int]) -> None:
        """Drop all but these sequences, for example dummy documents, and keep this order. Requires ``advance``.

        New tokens would be computed for dropped sequences, too, and their lengths would need a mask in attention.
        """
        assert self._rows is not None, "advance() comes first"
        if list(sequences) == list(range(len(self._rows.lengths))):
            return
        index = to_device(np.array(sequences), self._rows.new.device)
        for number, stores in self._stores.items():
            keys, values = (store.index_select(0, index) for store in stores)
            self._stores[number] = keys, values
        self.cross = {layer: cached.of_sequences(sequences) for layer, cached in self.cross.items()}
        self._rows = replace(self._rows, lengths=self._rows.lengths[list(sequences)])

    def layer(self, number: int) -> LayerCache:
        """Return the cache of decoder block ``number`` for this forward pass. Requires ``advance``."""
        assert self._rows is not None, "advance() comes first"
        if number not in self._stores:
            shape = (len(self._rows.lengths), self.capacity, *self._shape)
            keys = torch.zeros(shape, dtype=self._dtype, device=self._rows.new.device)
            self._stores[number] = (keys, torch.zeros_like(keys))
        return LayerCache(*self._stores[number], self._rows)
