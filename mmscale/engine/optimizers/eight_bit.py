"""Moments in 8 bits: a byte for each value, and a float32 scale for each block of 256 values.

    parameter (flattened)  | block 0 | block 1 | block 2 | block 3 |
    rank 0's part          |=========|=========|====|                    a block that is cut
    rank 1's part                                   |====|=========|     has a scale on either side

A value is ``scale * levels[code]``, and the scale is the largest magnitude of its block. Blocks are counted from the
beginning of the parameter, whatever the ZeRO stage, and hold nothing else: no other parameter, no padding of a shard.

To quantise what was dequantised gives the same bits again, so a checkpoint holds plain float32 values, and a resume at
the same ranges is exact. For this the levels are symmetric and hold 1, so a scale is found again.

Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861), sections 2 and 3, with
blocks of 256 instead of 2048. The levels are their dynamic ones but for the ends: signed, the largest below 1 makes
room for 1 on both sides; unsigned, 0 becomes 1e-7, since a second moment that is rounded to nothing would divide the
first by ``eps`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.engine.optimizers.shards import FlatMaster, Piece

BLOCK = 256
BITS = 8
SIGNED = "exp_avg"
"""The kind of moment that has signs; the others are squares."""
_CHUNK_BLOCKS = {"cpu": 2**8, "cuda": 2**14}
"""So many blocks exist in float32 at once: a processor's cache holds few, a device waits between many."""
_DECADES = 7
_CELL_BITS = 15
"""Float32 magnitudes that differ only in their last so many bits share a cell of the table."""


def dynamic_levels(*, signed: bool) -> Tensor:
    """Magnitudes that a code stands for, rising: 128 if one bit is the sign, else 256. float32."""
    found = []
    for decade in range(_DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        found.append(10.0 ** (decade + 1 - _DECADES) * (edges[:-1] + edges[1:]) / 2)
    levels = torch.cat(found).float()
    if signed:
        return torch.cat([torch.zeros(1), levels[:-1], torch.ones(1)])
    return torch.cat([torch.tensor([1e-7]), levels, torch.ones(1)])


@dataclass(frozen=True)
class Codec:
    """Between values and codes.

    Attributes:
        values: ``(256,)`` what the codes stand for, as a share of the scale.
        borders: Middle of each level and the next; infinite after the last.
        cells: Level of the smallest magnitude in each cell. A cell holds one border at most.
        signed: Whether the highest bit of a code is the sign.
    """

    values: Tensor
    borders: Tensor
    cells: Tensor
    signed: bool

    def quantise(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Each value's nearest code.

        Args:
            blocks: float32 ``(n, 256)``.

        Returns:
            Codes, uint8 ``(n, 256)``, and scales, float32 ``(n,)``.
        """
        scales = blocks.abs().amax(dim=1)
        sizes = (blocks / scales[:, None]).abs().view(-1)
        # A binary search over the borders takes ten times as long on a CPU. In a block of zeros any cell will do.
        cells = (sizes.view(torch.int32) >> _CELL_BITS).clamp_(0, len(self.cells) - 1)
        codes = self.cells.index_select(0, cells)
        codes += sizes > self.borders.index_select(0, codes)
        if self.signed:
            codes += (blocks.view(-1) < 0) * len(self.borders)
        return codes.to(torch.uint8).view(blocks.shape), scales

    def dequantise(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Values of codes and scales as ``quantise`` gives them, float32 ``(n, 256)``."""
        return self.values.index_select(0, codes.view(-1).int()).view(codes.shape) * scales[:, None]


@cache
def codec(signed: bool, device: torch.device) -> Codec:
    """The tables on ``device``: 130 kB that all moments share."""
    levels = dynamic_levels(signed=signed)
    borders = torch.cat([(levels[1:] + levels[:-1]) / 2, torch.tensor([torch.inf])])
    last = int(torch.ones(()).view(torch.int32)) >> _CELL_BITS
    smallest = (torch.arange(last + 1, dtype=torch.int32) << _CELL_BITS).view(torch.float32)
    cells = torch.bucketize(smallest, borders, out_int32=True)
    values = torch.cat([levels, 0 - levels]) if signed else levels
    return Codec(values.to(device), borders.to(device), cells.to(device), signed)


class Blocks:
    """A moment of one rank's part of one parameter.

    Args:
        start: First value, in the flattened parameter.
        stop: One past the last.
        signed: Whether values have signs.
        device: Where they are.

    Attributes:
        codes: uint8 ``(n, 256)``; a block that is cut is filled up.
        scales: float32 ``(n,)``.
        length: Number of values.
    """

    def __init__(self, start: int, stop: int, *, signed: bool, device: torch.device) -> None:
        self.length = stop - start
        self._lead = start % BLOCK
        self._codec = codec(signed, device)
        count = -(-(self._lead + self.length) // BLOCK) if self.length else 0
        self.codes = torch.zeros(count, BLOCK, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(count, device=device)

    def chunks(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cuts a range of the part between blocks so that no chunk is large."""
        size = _CHUNK_BLOCKS[self.scales.device.type] * BLOCK
        while first < stop:
            end = min(stop, (first + self._lead) // size * size + size - self._lead)
            yield first, end
            first = end

    def read(self, first: int, stop: int) -> Tensor:
        """float32 values ``[first, stop)`` of the part."""
        low = (first + self._lead) // BLOCK
        high = -(-(stop + self._lead) // BLOCK)
        begin = first + self._lead - low * BLOCK
        values = self._codec.dequantise(self.codes[low:high], self.scales[low:high])
        return values.view(-1)[begin : begin + stop - first]

    def write(self, first: int, values: Tensor) -> None:
        """Replaces whole blocks: ``first`` begins one, or the part, and ``values`` end with one, or with the part."""
        low = (first + self._lead) // BLOCK
        begin = first + self._lead - low * BLOCK
        count = -(-(begin + len(values)) // BLOCK)
        filled = F.pad(values, (begin, count * BLOCK - begin - len(values))).view(count, BLOCK)
        self.codes[low : low + count], self.scales[low : low + count] = self._codec.quantise(filled)

    def around(self, first: int, stop: int) -> tuple[int, int]:
        """The smallest range of whole blocks, or up to the ends of the part, that holds ``[first, stop)``."""
        low = (first + self._lead) // BLOCK * BLOCK - self._lead
        high = -(-(stop + self._lead) // BLOCK) * BLOCK - self._lead
        return max(0, low), min(self.length, high)


@dataclass(frozen=True)
class QuantisedRange:
    """A range of a moment; to who saves or loads it, like a float32 tensor ``(n,)`` that is made when asked for.

    Attributes:
        blocks: The moment of the rank's part.
        first: First value, in the part.
        stop: One past the last.
    """

    blocks: Blocks
    first: int
    stop: int
    dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def shape(self) -> tuple[int]:
        """Number of values, as a shape."""
        return (self.numel(),)

    @property
    def nbytes(self) -> int:
        """Bytes of the float32 values."""
        return self.numel() * self.dtype.itemsize

    def numel(self) -> int:
        """Number of values."""
        return self.stop - self.first

    def float(self) -> Tensor:
        """The values, float32; a copy."""
        values = torch.empty(self.shape, device=self.blocks.scales.device)
        for first, stop in self.blocks.chunks(self.first, self.stop):
            values[first - self.first : stop - self.first] = self.blocks.read(first, stop)
        return values

    def copy_(self, values: Tensor) -> None:
        """Quantises ``values``; others in the blocks at the ends keep theirs, unless the scale grows."""
        for first, stop in self.blocks.chunks(self.first, self.stop):
            low, high = self.blocks.around(first, stop)
            whole = self.blocks.read(low, high)
            whole[first - low : stop - low] = values[first - self.first : stop - self.first]
            self.blocks.write(low, whole)


def zero_moment(master: FlatMaster, kind: str) -> Tensor | dict[Piece, Blocks]:
    """A moment before the first step: like the flat master, or in 8 bits by part of a parameter."""
    values = master.values
    if master.group["state_bits"] != BITS:
        return torch.zeros_like(values, memory_format=torch.preserve_format, requires_grad=False)
    signed, device = kind == SIGNED, values.device
    return {piece: Blocks(piece.start, piece.stop, signed=signed, device=device) for piece in master.pieces}
