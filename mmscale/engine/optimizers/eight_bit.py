"""Moments in 8 bits: a byte for each value, and a float32 scale for each block of 256 values.

    parameter (flattened)  | block 0 | block 1 | block 2 | block 3 |
    rank 0's shard         |=========|=========|====|                    a block that is cut between two ranks
    rank 1's shard                                  |====|=========|     has a scale on each of them

A value is ``scale * levels[code]``. The scale is the largest magnitude in the block. Blocks are counted from the
beginning of the parameter at every ZeRO stage. A block contains values of one parameter only, and none of the values
that ZeRO adds to a shard as padding.

Quantising dequantised values gives the same codes and scales. So a checkpoint holds plain float32 values, and a resume
with the same ranges is exact. This requires that the levels contain 1 (and -1 if signed): then the scale of dequantised
values is the old scale.

Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861), sections 2 and 3, with
blocks of 256 instead of 2048. The levels are their dynamic ones, except at the ends. If signed, the largest level below
1 is left out so that both 1 and -1 have a code. If unsigned, 0 is replaced by 1e-7: with a second moment of 0 the first
moment would be divided by ``eps`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.engine.optimizers.shards import FlatMaster, ParameterShard

BLOCK = 256
BITS = 8
SIGNED = "exp_avg"
"""The signed kind of moment. The other kind is unsigned."""
_CHUNK_BLOCKS = {"cpu": 2**8, "cuda": 2**14}
"""Blocks that are processed in float32 at once: few fit into a CPU's cache, and on CUDA each chunk launches kernels."""
_DECADES = 7
_CELL_BITS = 15
"""Float32 magnitudes that differ only in this many low bits share a cell of the lookup table."""


def dynamic_levels(*, signed: bool) -> Tensor:
    """Return the magnitudes of the codes in ascending order, float32: 128 if signed (one bit is the sign), else 256."""
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
    """The tables that convert between values and codes.

    Attributes:
        values: ``(256,)`` value of each code, relative to the scale.
        borders: Midpoint between each level and the next; infinite after the last.
        cells: Index of the level nearest to the smallest magnitude in each cell. A cell contains at most one border.
        signed: Whether the highest bit of a code is the sign.
    """

    values: Tensor
    borders: Tensor
    cells: Tensor
    signed: bool

    def quantise(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest code of each value, and the scale of each block.

        Args:
            blocks: float32 ``(n, 256)``.

        Returns:
            Codes, uint8 ``(n, 256)``, and scales, float32 ``(n,)``.
        """
        scales = blocks.abs().amax(dim=1)
        sizes = (blocks / scales[:, None]).abs().view(-1)
        # A binary search over the borders takes ten times as long on a CPU. In a block of zeros any cell is correct.
        cells = (sizes.view(torch.int32) >> _CELL_BITS).clamp_(0, len(self.cells) - 1)
        codes = self.cells.index_select(0, cells)
        codes += sizes > self.borders.index_select(0, codes)
        if self.signed:
            codes += (blocks.view(-1) < 0) * len(self.borders)
        return codes.to(torch.uint8).view(blocks.shape), scales

    def dequantise(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the float32 values ``(n, 256)`` of codes and scales that ``quantise`` returned."""
        return self.values.index_select(0, codes.view(-1).int()).view(codes.shape) * scales[:, None]


@cache
def codec(signed: bool, device: torch.device) -> Codec:
    """Return the tables on ``device``. All moments share them; they take 130 kB."""
    levels = dynamic_levels(signed=signed)
    borders = torch.cat([(levels[1:] + levels[:-1]) / 2, torch.tensor([torch.inf])])
    last = int(torch.ones(()).view(torch.int32)) >> _CELL_BITS
    smallest = (torch.arange(last + 1, dtype=torch.int32) << _CELL_BITS).view(torch.float32)
    cells = torch.bucketize(smallest, borders, out_int32=True)
    values = torch.cat([levels, 0 - levels]) if signed else levels
    return Codec(values.to(device), borders.to(device), cells.to(device), signed)


class QuantisedMoment:
    """A moment of one rank's shard of one parameter, in 8 bits.

    Args:
        start: Index of the shard's first value in the flattened parameter.
        stop: Index after the last value.
        signed: Whether values have signs.
        device: Device of codes and scales.

    Attributes:
        codes: uint8 ``(n, 256)``. The first and the last block are padded if the shard does not fill them.
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
        """Yield the chunks of a range of the shard. Each chunk ends at a block's end, or at the end of the range."""
        size = _CHUNK_BLOCKS[self.scales.device.type] * BLOCK
        while first < stop:
            end = min(stop, (first + self._lead) // size * size + size - self._lead)
            yield first, end
            first = end

    def read(self, first: int, stop: int) -> Tensor:
        """Return the float32 values ``[first, stop)`` of the shard."""
        low = (first + self._lead) // BLOCK
        high = -(-(stop + self._lead) // BLOCK)
        begin = first + self._lead - low * BLOCK
        values = self._codec.dequantise(self.codes[low:high], self.scales[low:high])
        return values.view(-1)[begin : begin + stop - first]

    def write(self, first: int, values: Tensor) -> None:
        """Replace the values from ``first`` on. They must begin and end at a block's border or an end of the shard."""
        low = (first + self._lead) // BLOCK
        begin = first + self._lead - low * BLOCK
        count = -(-(begin + len(values)) // BLOCK)
        filled = F.pad(values, (begin, count * BLOCK - begin - len(values))).view(count, BLOCK)
        self.codes[low : low + count], self.scales[low : low + count] = self._codec.quantise(filled)

    def around(self, first: int, stop: int) -> tuple[int, int]:
        """Return the smallest range of whole blocks that contains ``[first, stop)``, cut to the shard."""
        low = (first + self._lead) // BLOCK * BLOCK - self._lead
        high = -(-(stop + self._lead) // BLOCK) * BLOCK - self._lead
        return max(0, low), min(self.length, high)


@dataclass(frozen=True)
class QuantisedRange:
    """A range of a quantised moment, with the interface of a float32 tensor ``(n,)`` for checkpoints.

    Attributes:
        blocks: The moment of the rank's shard.
        first: Index of the first value in the shard.
        stop: Index after the last value.
    """

    blocks: QuantisedMoment
    first: int
    stop: int
    dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def shape(self) -> tuple[int]:
        """The shape ``(n,)``."""
        return (self.numel(),)

    @property
    def nbytes(self) -> int:
        """Bytes of the values in float32."""
        return self.numel() * self.dtype.itemsize

    def numel(self) -> int:
        """Return the number of values."""
        return self.stop - self.first

    def float(self) -> Tensor:
        """Return a float32 copy of the values."""
        values = torch.empty(self.shape, device=self.blocks.scales.device)
        for first, stop in self.blocks.chunks(self.first, self.stop):
            values[first - self.first : stop - self.first] = self.blocks.read(first, stop)
        return values

    def copy_(self, values: Tensor) -> None:
        """Quantise and store ``values``. Other values in the first and last block change only if the scale changes."""
        for first, stop in self.blocks.chunks(self.first, self.stop):
            low, high = self.blocks.around(first, stop)
            whole = self.blocks.read(low, high)
            whole[first - low : stop - low] = values[first - self.first : stop - self.first]
            self.blocks.write(low, whole)


def zero_moment(master: FlatMaster, kind: str) -> Tensor | dict[ParameterShard, QuantisedMoment]:
    """Return a zero moment: a tensor like the flat master, or with 8 bits a ``QuantisedMoment`` for each shard."""
    values = master.values
    if master.group["state_bits"] != BITS:
        return torch.zeros_like(values, memory_format=torch.preserve_format, requires_grad=False)
    signed, device = kind == SIGNED, values.device
    return {shard: QuantisedMoment(shard.start, shard.stop, signed=signed, device=device) for shard in master.shards}
