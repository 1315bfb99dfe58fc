"""Dropout with stateless masks: each mask bit is a hash of its position, not a draw from a generator.

    (seed, step) --lane, offset in the lane--> key of a row --block, sub-layer, channel--> dropped or not

A mask therefore does not depend on the rank, the microbatch or the device. It is the same when activation
checkpointing recomputes a block and after a resume, and no generator state has to be saved. Fused attention kernels do
not expose their probabilities, so dropout of probabilities computes them (``attention_backends``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data_pipeline.order.randomness import mix
from mmscale.nn.host import to_device

_WORD_BITS = 64
_STRIDE, _FIRST, _SECOND = (
    constant - (1 << _WORD_BITS) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
"""Constants of SplitMix64 as signed 64-bit integers, which torch computes with."""
_LEVELS = 1 << 16
"""Number of values of the 16 bits that decide one channel. One 64-bit hash serves four channels: hashing takes nearly
all of the time."""
_PROBABILITIES = int.from_bytes(b"attends", "little")
"""Separates the bits of ``Dropout.on_probabilities`` from those of the masks of rows."""
_JITTER = int.from_bytes(b"jitter", "little")
"""Separates the numbers of ``Dropout.jitter`` from those of the masks."""


class SubLayer(IntEnum):
    """A sub-layer whose output a block adds to the residual stream."""

    ATTENTION = 0
    FEED_FORWARD = 1


@dataclass(frozen=True)
class Dropout:
    """The masks of one microbatch.

    Attributes:
        rate: Share of values to drop, below 1. With 0, calls return their values. Above 0, the rate is rounded to a
            multiple of 2^-16 in that range.
        rows: int64 ``(T,)``, hash of seed, step, lane and offset in the lane of each row.
        block: Number of the block; different blocks have independent masks.
        chosen: bool ``(T,)``, rows that dropout applies to; None for all. The mask of a row does not depend on it.
        attention_rate: As ``rate``, for the probabilities of self-attention.

    Source: Srivastava et al. 2014, "Dropout" (here in the inverted form: kept values are multiplied by
    ``1 / (1 - rate)`` in training, and evaluation changes nothing); Vaswani et al. 2017, "Attention is all you need",
    section 5.4 (on the output of each sub-layer); Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
    generators" (each row has a SplitMix64 stream; each sub-layer of each block uses its own range of it).
    """

    rate: float
    rows: Int[Tensor, " T"]
    block: int = 0
    chosen: Bool[Tensor, " T"] | None = None
    attention_rate: float = 0.0

    @classmethod
    def for_microbatch(
        cls,
        rate: float,
        key: tuple[int, int],
        lanes: Sequence[int],
        lane_tokens: Sequence[int],
        device: torch.device,
        chosen: Bool[Tensor, " T"] | None = None,
    ) -> Dropout:
        """Return the masks of a microbatch.

        Args:
            rate: Share of values to drop.
            key: Seed and step of the run.
            lanes: Lanes whose rows the microbatch contains, in order.
            lane_tokens: Number of rows of each of ``lanes``.
            device: Device of the masks.
            chosen: Rows that dropout applies to; None for all.
        """
        seed, step = key
        hashed = mix(mix(seed) ^ step)
        rows = [_row_keys(mix(hashed ^ mix(lane)), count) for lane, count in zip(lanes, lane_tokens, strict=True)]
        return cls(rate, to_device(torch.cat(rows), device), chosen=chosen)

    def for_block(self, number: int) -> Dropout:
        """Return the masks of block ``number``, which may be negative."""
        return replace(self, block=number)

    def for_layer(self, path: str) -> Dropout:
        """Return the masks of one layer: those of layers with different paths are independent."""
        key = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "little", signed=True)
        return replace(self, rows=_mix(self.rows ^ key), block=0)

    def for_choices(self, rate: float, rows: Int[Tensor, " R"], experts: Int[Tensor, " R"]) -> Dropout:
        """Return the masks of rows in experts: those of one row in different experts are independent.

        Args:
            rate: Share of values to drop.
            rows: Indices of the rows.
            experts: Expert of each of ``rows``.
        """
        keys = _mix(self.rows.index_select(0, rows) ^ (experts + 1) * _STRIDE)
        return replace(self, rate=rate, rows=keys, chosen=None)

    def split(self, counts: list[int]) -> list[Dropout]:
        """Return the masks of consecutive groups of rows; all rows must be chosen."""
        return [replace(self, rows=part) for part in self.rows.split(counts)]

    def jitter(self, amount: float, dim: int) -> Float[Tensor, "T D"]:
        """Return a factor in ``(1 - amount, 1 + amount)`` for each of ``dim`` channels of each row, in float32.

        Source: Fedus et al. 2022, "Switch Transformers", section 2.4.
        """
        bits = replace(self, rows=_mix(self.rows ^ _JITTER))._bits(SubLayer.FEED_FORWARD, dim)
        return (bits.float() + 0.5) * (2 * amount / _LEVELS) + 1

    def dropped(self, sub_layer: SubLayer, dim: int) -> Bool[Tensor, "T D"]:
        """Return a mask over ``dim`` channels of each row, True where a value is dropped; ignores ``chosen``."""
        return self._bits(sub_layer, dim) < self._threshold - _LEVELS // 2  # int16 begins at -2^15.

    def _bits(self, sub_layer: SubLayer, dim: int) -> Int[Tensor, "T D"]:
        words = -(-dim // (_WORD_BITS // 16))
        first = (self.block * len(SubLayer) + sub_layer) * words
        offsets = torch.arange(first, first + words, device=self.rows.device)
        return _mix(self.rows.unsqueeze(1) + offsets * _STRIDE).view(torch.int16)[:, :dim]

    def __call__(self, values: Float[Tensor, "T D"], sub_layer: SubLayer) -> Float[Tensor, "T D"]:
        """Return ``values`` with dropped ones set to 0 and the others scaled up, in the chosen rows."""
        if not self.rate:
            return values
        kept = values.masked_fill(self.dropped(sub_layer, values.shape[1]), 0.0)
        kept = kept.mul_(_LEVELS / (_LEVELS - self._threshold))
        return kept if self.chosen is None else torch.where(self.chosen.unsqueeze(1), kept, values)

    def on_probabilities(self, values: Float[Tensor, "H Tq Tk"], first: int) -> Float[Tensor, "H Tq Tk"]:
        """Return attention probabilities with dropped ones set to 0 and the others scaled up.

        A bit depends on the query's row, the head, and the key's offset in its segment.

        Args:
            values: Probabilities of consecutive queries.
            first: Index of the first query in ``rows``.

        Source: Vaswani et al. 2017, in the code of its authors: on the weights of attention.
        """
        heads, queries, keys = values.shape
        words, device = -(-keys // (_WORD_BITS // 16)), self.rows.device
        numbers = torch.arange(heads, device=device) + self.block * heads + 1
        own = _mix(self.rows[first : first + queries] ^ _PROBABILITIES).unsqueeze(1)
        hashed = _mix(_mix(own + numbers * _STRIDE).unsqueeze(2) + torch.arange(words, device=device) * _STRIDE)
        bits = hashed.view(torch.int16)[:, :, :keys].transpose(0, 1)
        masks = replace(self, rate=self.attention_rate)
        kept = values.masked_fill(bits < masks._threshold - _LEVELS // 2, 0.0)
        kept = kept * (_LEVELS / (_LEVELS - masks._threshold))
        chosen = None if self.chosen is None else self.chosen[first : first + queries, None]
        return kept if chosen is None else torch.where(chosen, kept, values)

    @property
    def _threshold(self) -> int:
        return min(max(round(self.rate * _LEVELS), 1), _LEVELS - 1)


def _row_keys(start: int, count: int) -> Int[Tensor, " T"]:
    signed = start - (start >> (_WORD_BITS - 1) << _WORD_BITS)
    return _mix(torch.arange(count) * _STRIDE + signed)


def _mix(words: Tensor) -> Tensor:
    """Apply ``data_pipeline.order.randomness.mix`` to each int64, in place. torch's integer arithmetic wraps around."""
    words = words.add_(_STRIDE)
    words = words.bitwise_xor_(_shifted(words, 30)).mul_(_FIRST)
    words = words.bitwise_xor_(_shifted(words, 27)).mul_(_SECOND)
    return words.bitwise_xor_(_shifted(words, 31))


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's ``>>`` fills with the sign bit."""
    return (words >> bits).bitwise_and_((1 << (_WORD_BITS - bits)) - 1)
