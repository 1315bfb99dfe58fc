"""Buffers for the keys and values of one attention layer during generation.

A pass over prompts has many new rows of each sequence. Its keys are gathered into packed rows. A step has one new row
of each sequence. It reads the buffers in place, because a gather would copy all earlier keys for every new token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data_pipeline.batch import Segments
from mmscale.nn.host import to_device


@dataclass(frozen=True)
class CacheRows:
    """The buffer rows that one forward pass writes and reads in every layer, ``capacity`` rows for each of S sequences.

    Attributes:
        new: int64, indices of the new tokens among the ``S * capacity`` rows, sequence after sequence.
        lengths: int64 ``(S,)``, rows of each sequence so far, the new ones included.
        capacity: Most rows of a sequence.
        is_step: Whether each sequence has exactly one new row.
    """

    new: Tensor
    lengths: np.ndarray
    capacity: int
    is_step: bool

    @classmethod
    def after(cls, before: np.ndarray, new: np.ndarray, capacity: int, device: torch.device) -> CacheRows:
        """Return the rows of a pass that adds ``new`` rows to sequences of ``before`` rows, both ``(S,)``."""
        rows = ranges(np.arange(len(new)) * capacity + before, new)
        return cls(to_device(rows, device), before + new, capacity, bool((new == 1).all()))

    @cached_property
    def visible(self) -> Int[Tensor, " A"]:
        """Indices of all tokens so far, sequence after sequence."""
        rows = ranges(np.arange(len(self.lengths)) * self.capacity, self.lengths)
        return to_device(rows, self.new.device)

    @cached_property
    def segments(self) -> Segments:
        """Partition of ``visible`` into sequences."""
        pieces = Segments.from_lengths(self.lengths.tolist())
        return Segments(to_device(pieces.cu, self.new.device), pieces.bounds)

    @cached_property
    def longest(self) -> int:
        """Rows of the longest sequence."""
        return int(self.lengths.max())

    @cached_property
    def mask(self) -> Bool[Tensor, "S 1 1 longest"] | None:
        """Which rows up to the longest sequence belong to each sequence; None if all sequences have equal lengths."""
        if bool((self.lengths == self.longest).all()):
            return None
        return to_device(np.arange(self.longest) < self.lengths[:, None, None, None], self.new.device)


@dataclass(frozen=True)
class LayerCache:
    """Buffers of one layer, for one forward pass.

    Attributes:
        keys: ``(S, capacity, G, K)``, written in place.
        values: ``(S, capacity, G, K)``, written in place.
        rows: The rows of this pass.
    """

    keys: Tensor
    values: Tensor
    rows: CacheRows

    def write(self, k: Float[Tensor, "T G K"], v: Float[Tensor, "T G K"]) -> None:
        """Write the keys and values of the new tokens."""
        self.keys.flatten(0, 1).index_copy_(0, self.rows.new, k)
        self.values.flatten(0, 1).index_copy_(0, self.rows.new, v)

    def packed(self) -> tuple[Float[Tensor, "A G K"], Float[Tensor, "A G K"]]:
        """Return copies of the keys and values of all tokens so far, partitioned by ``rows.segments``."""
        visible = self.rows.visible
        return self.keys.flatten(0, 1).index_select(0, visible), self.values.flatten(0, 1).index_select(0, visible)

    def padded(self) -> tuple[Float[Tensor, "S longest G K"], Float[Tensor, "S longest G K"]]:
        """Return views of the keys and values up to the longest sequence; ``rows.mask`` is False at their padding."""
        return self.keys[:, : self.rows.longest], self.values[:, : self.rows.longest]


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return ``range(start, start + length)`` of each pair, concatenated."""
    return np.concatenate([np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)])
