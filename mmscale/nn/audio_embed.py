"""Input layers of audio towers: convolutions over packed log-mel frames of unequal lengths, and sinusoids.

    values (P, bins) --FrameLayout.source--> spaced (T, bins) --conv, mask, strided conv--> (T / 2, D)
                                             --FrameLayout.rows--> packed rows (R, D)

All pieces of sound pass through each convolution in one call. At least one row of zeros lies between two pieces, which
is the zero padding of both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmscale.nn.host import to_device

KERNEL, STRIDE = 3, 2
"""Frames that a convolution reads, and the stride of the second one."""


def grouped_rows(rows: Float[Tensor, "R D"], lengths: Sequence[int], size: int) -> Float[Tensor, "groups size D"]:
    """Return groups of ``size`` consecutive rows of each item. Rows at its end that fill no group are dropped.

    Args:
        rows: The rows of all items, item after item.
        lengths: Number of rows of each item.
        size: Rows of a group.
    """
    if any(length % size for length in lengths):
        starts = itertools.accumulate(lengths, initial=0)
        kept = [
            np.arange(start, start + length - length % size) for start, length in zip(starts, lengths, strict=False)
        ]
        rows = rows.index_select(0, to_device(np.concatenate(kept), rows.device))
    return rows.unflatten(0, (-1, size))


def strided_rows(frames: int) -> int:
    """Return the number of rows that the convolutions make of a piece of ``frames`` frames."""
    return (frames + STRIDE - 1) // STRIDE


def spaced_frames(frames: int) -> int:
    """Return the rows of the convolutions' input that a piece of ``frames`` frames takes, with the zeros after it."""
    return STRIDE * (frames // STRIDE + 1)


@dataclass(frozen=True)
class FrameLayout:
    """The rows of the convolutions' input and output, computed on the host.

    Attributes:
        source: int64 ``(T,)`` the frame in each row of the first convolution's input; P, the number of frames, for a
            row of zeros. T is even.
        rows: int64 ``(R,)`` the rows of the second convolution's output that are kept, piece after piece.
        positions: int64 ``(R,)`` the number of each of these rows in its piece.
    """

    source: np.ndarray
    rows: np.ndarray
    positions: np.ndarray

    @classmethod
    def from_pieces(cls, pieces: Sequence[tuple[int, int, int]], num_frames: int) -> FrameLayout:
        """Return the layout of pieces that are convolved separately.

        Args:
            pieces: For each piece its first frame, the number of frames that the convolutions read, and the number of
                these that become rows (the others are the silence after a clip).
            num_frames: P.
        """
        # Each piece begins at an even row, where the strided convolution has an output, after a row of zeros.
        lengths = [spaced_frames(read) for _, read, _ in pieces]
        starts = list(itertools.accumulate(lengths, initial=0))
        source = np.full(starts[-1], num_frames, dtype=np.int64)
        rows, positions = [], []
        for start, (first, read, used) in zip(starts, pieces, strict=False):
            source[start : start + read] = np.arange(first, first + read)
            positions.append(np.arange(strided_rows(used)))
            rows.append(start // STRIDE + positions[-1])
        return cls(source, np.concatenate(rows), np.concatenate(positions))


class FrameConvolution(nn.Module):
    """A convolution over time with kernel 3 and zero padding of 1.

    Args:
        channels: Input channels.
        dim: Output channels.
        stride: Step between two outputs.
    """

    def __init__(self, channels: int, dim: int, stride: int) -> None:
        super().__init__()
        # Flat, because init.py uses the last dimension as fan-in.
        self.weight = nn.Parameter(torch.zeros(dim, channels * KERNEL))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.stride = stride

    def forward(self, frames: Float[Tensor, "1 C T"]) -> Float[Tensor, "1 D T_out"]:
        weight = self.weight.unflatten(1, (-1, KERNEL))
        return F.conv1d(frames, weight, self.bias, stride=self.stride, padding=1)


class FrameEmbed(nn.Module):
    """Two convolutions with GELU, the second with stride 2.

    Args:
        num_bins: Mel bins of a frame.
        dim: D.

    Source: Whisper (arXiv 2212.04356), section 2.2.
    """

    def __init__(self, num_bins: int, dim: int) -> None:
        super().__init__()
        self.conv1 = FrameConvolution(num_bins, dim, 1)
        self.conv2 = FrameConvolution(dim, dim, STRIDE)

    def forward(self, values: Float[Tensor, "P bins"], layout: FrameLayout) -> Float[Tensor, "R D"]:
        """Return the rows of all pieces; ``values`` are rounded to the dtype of the weights first."""
        source = to_device(layout.source, values.device)
        spaced = F.pad(values.to(self.conv1.weight.dtype), (0, 0, 0, 1)).index_select(0, source)
        hidden = F.gelu(self.conv1(spaced.t().unsqueeze(0)))
        # A row between two pieces has outputs of both. The second convolution must read zeros there.
        hidden = F.gelu(self.conv2(hidden * (source < len(values))))
        return hidden.squeeze(0).t().index_select(0, to_device(layout.rows, values.device))


def sinusoids(rows: int, dim: int) -> Float[Tensor, "rows dim"]:
    """Return position vectors: sines in the first half of the channels, cosines in the second.

    Args:
        rows: Number of positions.
        dim: Channels, an even number of at least 4.

    Source: Vaswani et al. 2017, section 3.5; order and scale as in OpenAI's whisper/model.py.
    """
    return _sinusoids_at(torch.arange(rows, device="cpu"), dim)


def _sinusoids_at(positions: Int[Tensor, " R"], dim: int) -> Float[Tensor, "R dim"]:
    steps = torch.arange(dim // 2, dtype=torch.float32, device=positions.device) * (-math.log(10_000) / (dim // 2 - 1))
    angles = positions.float()[:, None] * steps.exp()
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Sinusoids(nn.Module):
    """Adds a vector to each row: a row of a table that no stage trains, or sinusoids.

    Args:
        rows: Rows of the table, a parameter as in the weights of Whisper. None for sinusoids that are computed in each
            call, for weights without a table.
        dim: Channels.
    """

    def __init__(self, rows: int | None, dim: int) -> None:
        super().__init__()
        self.weight: nn.Parameter | None
        if rows is None:
            self.register_parameter("weight", None)
            return
        self.weight = nn.Parameter(torch.zeros(rows, dim), requires_grad=False)
        self.fixed_init = {"weight": sinusoids}

    def forward(self, hidden: Float[Tensor, "R D"], positions: Int[Tensor, " R"]) -> Float[Tensor, "R D"]:
        if self.weight is None:
            return hidden + _sinusoids_at(positions, hidden.shape[1]).to(hidden.dtype)
        return hidden + F.embedding(positions, self.weight)
