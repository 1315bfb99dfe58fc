"""What each unit that can be removed is worth, whoever measured it."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class BlockScores:
    """Of one block. Scores compare units of one axis of one block, and have no unit of measure.

    Attributes:
        heads: Of query heads.
        neurons: Of the feed-forward's channels.
        query_key: Of the channels of each query head's queries and of the keys that they meet.
        value: Of the channels of the values that each query head mixes.
        attention_energy: Share of each channel in the square of what ``input_layernorm`` reads; sums to 1.
        mlp_energy: The same for ``post_attention_layernorm``.
        query_energy: Of what ``q_norm`` reads; sums to 1 over a head, or over all where the norm spans them. None
            without such a norm.
        key_energy: Of what ``k_norm`` reads.
    """

    heads: Float[Tensor, " H"]
    neurons: Float[Tensor, " F"]
    query_key: Float[Tensor, "H K"]
    value: Float[Tensor, "H K"]
    attention_energy: Float[Tensor, " D"]
    mlp_energy: Float[Tensor, " D"]
    query_energy: Float[Tensor, "H K"] | None = None
    key_energy: Float[Tensor, "G K"] | None = None


@dataclass(frozen=True)
class Scores:
    """Of a decoder.

    Attributes:
        channels: Of the residual stream's channels.
        energy: Share of each in the square of what the last norm reads; sums to 1.
        blocks: First to last.
        influence: What each block changes of the stream; None if nobody knows.
    """

    channels: Float[Tensor, " D"]
    energy: Float[Tensor, " D"]
    blocks: tuple[BlockScores, ...]
    influence: Float[Tensor, " L"] | None = None
