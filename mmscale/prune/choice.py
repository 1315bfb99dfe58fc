"""From scores to what stays: indices on every axis, in their old order.

heads    q0 q1 | q2 q3 | q4 q5      key heads first, each by its best query heads, then these within it
         k0    | k1    | k2         -> queries never meet other keys than their own
rotated  pairs (i, i + R/2) of frequency theta^(-2i/R)
         every (R/R')-th pair stays: theta^(-2 (i R/R') / R) = theta^(-2i/R'), the frequencies of the smaller model
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmscale.models.decoder import DecoderConfig
from mmscale.nn.block import DenseMlpConfig, QkNorm
from mmscale.nn.rope import rotated_width
from mmscale.prune.scores import BlockScores, Scores

Indices = Int[Tensor, " kept"]


class NormCut(NamedTuple):
    """What stays of a norm's scale, and by what it is multiplied.

    A norm over D channels that becomes one over D' divides by another root mean square. If those that stay hold the
    share s of the energy, ``sqrt(s D / D')`` gives them the values that they had; 1 if the others were ordinary, and
    ``sqrt(D / D')`` if they held nothing.
    """

    channels: Indices
    factor: float


@dataclass(frozen=True)
class BlockChoice:
    """What stays of a block.

    Attributes:
        number: Of the block in the source.
        neurons: Channels of the feed-forward.
        queries: Rows of ``q_proj``: head * K + channel.
        keys: Rows of ``k_proj``.
        values: Rows of ``v_proj``.
        outputs: Columns of ``o_proj``.
        query_scale: Of queries, on the norm if there is one, else on ``q_proj``. Dot products are divided by the root
            of their width, so ``sqrt(K' / K)``: what remains of one enters the softmax as before.
        attention_norm: Of ``input_layernorm``.
        mlp_norm: Of ``post_attention_layernorm``.
        query_norm: Of ``q_norm``, if there is one.
        key_norm: Of ``k_norm``, likewise.
    """

    number: int
    neurons: Indices
    queries: Indices
    keys: Indices
    values: Indices
    outputs: Indices
    query_scale: float
    attention_norm: NormCut
    mlp_norm: NormCut
    query_norm: NormCut | None
    key_norm: NormCut | None


@dataclass(frozen=True)
class Choice:
    """What stays of a decoder.

    Attributes:
        norm: Of the last norm; its channels are those of the residual stream, the same in every block.
        blocks: Those that stay.
    """

    norm: NormCut
    blocks: tuple[BlockChoice, ...]


def choose(source: DecoderConfig, target: DecoderConfig, scores: Scores) -> Choice:
    """Keeps the best units of every axis; among equals the first.

    Args:
        source: The larger decoder.
        target: The smaller one; ``limits.refusals`` has nothing against it.
        scores: Of the larger one.
    """
    channels = best(scores.channels, target.hidden_dim)
    numbers = kept_blocks(source.num_layers, target.num_layers, scores.influence)
    blocks = tuple(_block(source, target, number, scores.blocks[number], channels) for number in numbers)
    return Choice(norm_cut(scores.energy, channels), blocks)


def best(scores: Float[Tensor, " units"], count: int) -> Indices:
    """The ``count`` units of the highest scores, in their old order."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def kept_blocks(before: int, after: int, influence: Float[Tensor, " L"] | None) -> list[int]:
    """Those that change the stream most; where that is not known the first, the last, and even steps between."""
    if influence is not None:
        return best(influence, after).tolist()
    return [round(n * (before - 1) / max(after - 1, 1)) for n in range(after)]


def norm_cut(energy: Float[Tensor, " D"], kept: Indices) -> NormCut:
    """The cut of a norm over all of D channels."""
    return NormCut(kept, math.sqrt(float(energy[kept].sum()) * len(energy) / len(kept)))


def _block(
    source: DecoderConfig, target: DecoderConfig, number: int, scores: BlockScores, channels: Indices
) -> BlockChoice:
    assert isinstance(target.mlp, DenseMlpConfig)
    width = source.attention.resolved_head_dim(source.hidden_dim)
    kept_width = target.attention.resolved_head_dim(target.hidden_dim)
    groups, heads = _heads(scores.heads.view(source.attention.kv_heads, -1), target)
    # A key head's channels are worth what they are to those of its query heads that stay.
    query_key, value_scores = (
        each[heads].view(len(groups), -1, width).sum(1) for each in (scores.query_key, scores.value)
    )
    inner = _query_key_channels(source, target, query_key)
    value = torch.stack([best(row, kept_width) for row in value_scores])
    each = len(heads) // len(groups)
    queries, keys = _flat(heads, inner.repeat_interleave(each, 0), width), _flat(groups, inner, width)
    per_head = inner[0] if source.attention.qk_norm is QkNorm.HEAD else None
    return BlockChoice(
        number=number,
        neurons=best(scores.neurons, target.mlp.hidden_dim),
        queries=queries,
        keys=keys,
        values=_flat(groups, value, width),
        outputs=_flat(heads, value.repeat_interleave(each, 0), width),
        query_scale=math.sqrt(kept_width / width),
        attention_norm=norm_cut(scores.attention_energy, channels),
        mlp_norm=norm_cut(scores.mlp_energy, channels),
        query_norm=_head_norm(scores.query_energy, heads, queries, per_head),
        key_norm=_head_norm(scores.key_energy, groups, keys, per_head),
    )


def _heads(scores: Float[Tensor, "G heads"], target: DecoderConfig) -> tuple[Indices, Indices]:
    """Key heads, and query heads (numbered through) of each of them in turn."""
    each = target.attention.num_heads // target.attention.kv_heads
    groups = best(scores.topk(each, dim=1).values.sum(1), target.attention.kv_heads)
    heads = [group * scores.shape[1] + best(scores[group], each) for group in groups.tolist()]
    return groups, torch.cat(heads)


def _query_key_channels(
    source: DecoderConfig, target: DecoderConfig, scores: Float[Tensor, "G K"]
) -> Int[Tensor, "G kept"]:
    """Channels of each key head and its query heads: rotated ones by their frequencies, others by their scores."""
    kept_width = target.attention.resolved_head_dim(target.hidden_dim)
    rotated = kept_rotated = 0
    if source.rope is not None and target.rope is not None:
        rotated, kept_rotated = rotated_width(scores.shape[1], source.rope), rotated_width(kept_width, target.rope)
    first = torch.arange(0, rotated // 2, rotated // max(kept_rotated, 1) or 1)
    turned = torch.cat([first, first + rotated // 2])
    rest = scores[:, rotated:]
    if source.attention.qk_norm is QkNorm.HEAD:
        rest = rest.sum(0, keepdim=True).expand_as(rest)  # The norm has one weight for all heads.
    return torch.stack([torch.cat([turned, rotated + best(row, kept_width - kept_rotated)]) for row in rest])


def _flat(heads: Indices, channels: Int[Tensor, "heads kept"], width: int) -> Indices:
    """Rows of a projection: of each head those of its channels."""
    return (heads[:, None] * width + channels).flatten()


def _head_norm(
    energy: Float[Tensor, "heads K"] | None, heads: Indices, rows: Indices, per_head: Indices | None
) -> NormCut | None:
    """Of a norm over the channels of each head, which stay the same in all, or over those of all heads."""
    if energy is None:
        return None
    return norm_cut(energy.flatten(), rows) if per_head is None else norm_cut(energy[heads].mean(0), per_head)
