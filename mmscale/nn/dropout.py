"""Dropout whose masks follow from where a value stands, and from nothing that a process has drawn before.

    (seed, step) --lane, place in the lane--> key of a row --block, branch, channel--> dropped or not

So a mask is the same on any rank, in any microbatch, on CPU and CUDA, when a block is computed again in the backward
pass, and after a resume, and nobody keeps the state of a generator. Not for: attention probabilities, which kernels
keep to themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data_pipeline.order.randomness import mix

_WORD_BITS = 64
_STRIDE, _FIRST, _SECOND = (
    constant - (1 << _WORD_BITS) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
"""Of SplitMix64, as the signed numbers that torch has."""
_LEVELS = 1 << 16
"""16 bits decide one channel, so that a word serves four: hashing is nearly all of the time."""


class Branch(IntEnum):
    """What a block adds to the residual stream."""

    ATTENTION = 0
    FEED_FORWARD = 1


@dataclass(frozen=True)
class Dropout:
    """The masks of one microbatch.

    Attributes:
        rate: Share of values to drop, above 0 and below 1; taken as the nearest multiple of 2^-16.
        rows: int64 ``(T,)`` a hash of step, lane and place in the lane.
        block: Number of the block that asks; masks of different blocks are independent.
        chosen: bool ``(T,)`` the rows that it befalls; None for all. Masks of a row do not depend on it.

    Source: Srivastava et al. 2014, "Dropout" (here what is kept grows by ``1 / (1 - rate)``, and evaluation needs no
    change); Vaswani et al. 2017, "Attention is all you need", section 5.4 (where it stands); Steele, Lea, Flood 2014,
    "Fast splittable pseudorandom number generators" (each row has a SplitMix64 stream, each branch of each block a
    stretch of it).
    """

    rate: float
    rows: Int[Tensor, " T"]
    block: int = 0
    chosen: Bool[Tensor, " T"] | None = None

    @classmethod
    def of(
        cls,
        rate: float,
        key: tuple[int, int],
        lanes: Sequence[int],
        lane_tokens: Sequence[int],
        device: torch.device,
        chosen: Bool[Tensor, " T"] | None = None,
    ) -> Dropout:
        """Return the masks of a microbatch that holds ``lane_tokens`` rows of each of ``lanes``, in this order.

        ``key`` is the seed and the step of the run.
        """
        seed, step = key
        hashed = mix(mix(seed) ^ step)
        rows = [_row_keys(mix(hashed ^ mix(lane)), count) for lane, count in zip(lanes, lane_tokens, strict=True)]
        return cls(rate, torch.cat(rows).to(device), chosen=chosen)

    def of_block(self, number: int) -> Dropout:
        """The masks of block ``number``, of either sign."""
        return replace(self, block=number)

    def dropped(self, branch: Branch, dim: int) -> Bool[Tensor, "T D"]:
        """Which of the ``dim`` channels of each row are dropped."""
        words = -(-dim // (_WORD_BITS // 16))
        first = (self.block * len(Branch) + branch) * words
        places = torch.arange(first, first + words, device=self.rows.device)
        bits = _mix(self.rows.unsqueeze(1) + places * _STRIDE).view(torch.int16)[:, :dim]
        return bits < self._threshold - _LEVELS // 2  # int16 begins at -2^15.

    def __call__(self, values: Float[Tensor, "T D"], branch: Branch) -> Float[Tensor, "T D"]:
        """``values`` with some of them zeroed and the others grown."""
        kept = values.masked_fill(self.dropped(branch, values.shape[1]), 0.0)
        kept = kept.mul_(_LEVELS / (_LEVELS - self._threshold))
        return kept if self.chosen is None else torch.where(self.chosen.unsqueeze(1), kept, values)

    @property
    def _threshold(self) -> int:
        return min(max(round(self.rate * _LEVELS), 1), _LEVELS - 1)


def _row_keys(start: int, count: int) -> Int[Tensor, " T"]:
    signed = start - (start >> (_WORD_BITS - 1) << _WORD_BITS)
    return _mix(torch.arange(count) * _STRIDE + signed)


def _mix(words: Tensor) -> Tensor:
    """``data_pipeline.order.randomness.mix`` of each int64, in place: torch's sums and products wrap around too."""
    words = words.add_(_STRIDE)
    words = words.bitwise_xor_(_shifted(words, 30)).mul_(_FIRST)
    words = words.bitwise_xor_(_shifted(words, 27)).mul_(_SECOND)
    return words.bitwise_xor_(_shifted(words, 31))


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shifted to the right with zeros; torch's own shift repeats the sign."""
    return (words >> bits).bitwise_and_((1 << (_WORD_BITS - bits)) - 1)
