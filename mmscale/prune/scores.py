"""Importance scores of removable units, from activations or from weights."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class BlockScores:
    """Scores of one block. Compare them only within one axis of one block; they have no unit of measure.

    Attributes:
        heads: Scores of the query heads.
        neurons: Scores of the feed-forward channels.
        query_key: Scores of the channels of each query head's queries, together with those of its keys.
        value: Scores of the channels of the values that each query head mixes.
        attention_energy: Share of each channel in the squared input of ``input_layernorm``; sums to 1.
        mlp_energy: The same for ``post_attention_layernorm``.
        query_energy: The same for ``q_norm``; sums to 1 over each head, or over all heads if the norm spans them. None
            without such a norm.
        key_energy: The same for ``k_norm``.
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
    """Scores of a decoder.

    Attributes:
        channels: Scores of the channels of the residual stream.
        energy: Share of each channel in the squared input of the last norm; sums to 1.
        blocks: Scores of the blocks, first to last.
        influence: How much each block changes the residual stream; None if it was not measured.
    """

    channels: Float[Tensor, " D"]
    energy: Float[Tensor, " D"]
    blocks: tuple[BlockScores, ...]
    influence: Float[Tensor, " L"] | None = None
