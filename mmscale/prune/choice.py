"""Choose the units to keep from their scores: indices on every axis, in their old order.

heads    q0 q1 | q2 q3 | q4 q5      choose key heads by the scores of their best query heads, then query heads in them
         k0    | k1    | k2         -> each query head keeps its own key head
rotated  pairs (i, i + R/2) of frequency theta^(-2i/R)
         keep every (R/R')-th pair: theta^(-2 (i R/R') / R) = theta^(-2i/R'), the frequencies of the smaller model

R and R' are the numbers of rotated channels of a head in the larger and in the smaller model.
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
    """The kept channels of a norm, and the factor of its scale.

    A norm over D channels that is cut to D' channels divides by another root mean square. If the kept channels have the
    share s of the energy, the factor ``sqrt(s D / D')`` preserves their normalised values. The factor is 1 if the
    removed channels had average energy, and ``sqrt(D / D')`` if they had none.
    """

    channels: Indices
    factor: float


@dataclass(frozen=True)
class BlockChoice:
    """The kept units of one block.

    Attributes:
        number: Number of the block in the source.
        neurons: Kept channels of the feed-forward.
        queries: Kept rows of ``q_proj``: head * K + channel.
        keys: Kept rows of ``k_proj``.
        values: Kept rows of ``v_proj``.
        outputs: Kept columns of ``o_proj``.
        query_scale: Factor of the queries, applied to ``q_norm`` if there is one, else to ``q_proj``. It is
            ``sqrt(K' / K)``, because attention divides dot products by the root of the head width.
        attention_norm: Cut of ``input_layernorm``.
        mlp_norm: Cut of ``post_attention_layernorm``.
        query_norm: Cut of ``q_norm``; None without one.
        key_norm: Cut of ``k_norm``; None without one.
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
class UnitChoice:
    """The kept units of a decoder.

    Attributes:
        norm: Cut of the last norm. Its channels are the kept channels of the residual stream in every block.
        blocks: The kept blocks, in order.
    """

    norm: NormCut
    blocks: tuple[BlockChoice, ...]


def choose_units(source: DecoderConfig, target: DecoderConfig, scores: Scores) -> UnitChoice:
    """Choose the units with the highest scores on every axis; among equal scores the first.

    Args:
        source: The larger decoder.
        target: The smaller decoder. ``limits.conflicts`` must be empty for it.
        scores: Scores of the larger decoder.
    """
    channels = best(scores.channels, target.hidden_dim)
    numbers = kept_blocks(source.num_layers, target.num_layers, scores.influence)
    blocks = tuple(_choose_block(source, target, number, scores.blocks[number], channels) for number in numbers)
    return UnitChoice(norm_cut(scores.energy, channels), blocks)


def best(scores: Float[Tensor, " units"], count: int) -> Indices:
    """Return the indices of the ``count`` highest scores, in ascending order."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def kept_blocks(before: int, after: int, influence: Float[Tensor, " L"] | None) -> list[int]:
    """Return the numbers of the blocks to keep: those with the highest influence; evenly spaced ones if it is None.

    Evenly spaced blocks include the first and the last block. A single block is the first.
    """
    if influence is not None:
        return best(influence, after).tolist()
    return [round(n * (before - 1) / max(after - 1, 1)) for n in range(after)]


def norm_cut(energy: Float[Tensor, " D"], kept: Indices) -> NormCut:
    """Return the cut of a norm over all D channels."""
    return NormCut(kept, math.sqrt(float(energy[kept].sum()) * len(energy) / len(kept)))


def _choose_block(
    source: DecoderConfig, target: DecoderConfig, number: int, scores: BlockScores, channels: Indices
) -> BlockChoice:
    assert isinstance(target.mlp, DenseMlpConfig)
    width = source.attention.resolved_head_dim(source.hidden_dim)
    kept_width = target.attention.resolved_head_dim(target.hidden_dim)
    groups, heads = _choose_heads(scores.heads.view(source.attention.kv_heads, -1), target)
    # Score the channels of a key head by its kept query heads only.
    query_key, value_scores = (
        each[heads].view(len(groups), -1, width).sum(1) for each in (scores.query_key, scores.value)
    )
    inner = _query_key_channels(source, target, query_key)
    value = torch.stack([best(row, kept_width) for row in value_scores])
    each = len(heads) // len(groups)
    queries, keys = _rows(heads, inner.repeat_interleave(each, 0), width), _rows(groups, inner, width)
    per_head = inner[0] if source.attention.qk_norm is QkNorm.HEAD else None
    return BlockChoice(
        number=number,
        neurons=best(scores.neurons, target.mlp.hidden_dim),
        queries=queries,
        keys=keys,
        values=_rows(groups, value, width),
        outputs=_rows(heads, value.repeat_interleave(each, 0), width),
        query_scale=math.sqrt(kept_width / width),
        attention_norm=norm_cut(scores.attention_energy, channels),
        mlp_norm=norm_cut(scores.mlp_energy, channels),
        query_norm=_head_norm(scores.query_energy, heads, queries, per_head),
        key_norm=_head_norm(scores.key_energy, groups, keys, per_head),
    )


def _choose_heads(scores: Float[Tensor, "G heads"], target: DecoderConfig) -> tuple[Indices, Indices]:
    """Choose key heads, and the query heads of each. Query heads are numbered over all key heads."""
    each = target.attention.num_heads // target.attention.kv_heads
    groups = best(scores.topk(each, dim=1).values.sum(1), target.attention.kv_heads)
    heads = [group * scores.shape[1] + best(scores[group], each) for group in groups.tolist()]
    return groups, torch.cat(heads)


def _query_key_channels(
    source: DecoderConfig, target: DecoderConfig, scores: Float[Tensor, "G K"]
) -> Int[Tensor, "G kept"]:
    """Choose the channels of each key head and its query heads: rotated ones by frequency, others by score."""
    kept_width = target.attention.resolved_head_dim(target.hidden_dim)
    rotated = kept_rotated = 0
    if source.rope is not None and target.rope is not None:
        rotated, kept_rotated = rotated_width(scores.shape[1], source.rope), rotated_width(kept_width, target.rope)
    first = torch.arange(0, rotated // 2, rotated // max(kept_rotated, 1) or 1)
    rotated_channels = torch.cat([first, first + rotated // 2])
    others = scores[:, rotated:]
    if source.attention.qk_norm is QkNorm.HEAD:
        others = others.sum(0, keepdim=True).expand_as(others)  # One norm weight serves all heads.
    return torch.stack(
        [torch.cat([rotated_channels, rotated + best(row, kept_width - kept_rotated)]) for row in others]
    )


def _rows(heads: Indices, channels: Int[Tensor, "heads kept"], width: int) -> Indices:
    """Return the rows of a projection that belong to the given channels of each head."""
    return (heads[:, None] * width + channels).flatten()


def _head_norm(
    energy: Float[Tensor, "heads K"] | None, heads: Indices, rows: Indices, per_head: Indices | None
) -> NormCut | None:
    """Return the cut of ``q_norm`` or ``k_norm``; None if there is no norm.

    Args:
        energy: Energy shares of the norm's input.
        heads: Kept heads.
        rows: Kept rows of the projection, for a norm over all heads.
        per_head: Kept channels of every head, for a norm over the channels of each head; else None.
    """
    if energy is None:
        return None
    return norm_cut(energy.flatten(), rows) if per_head is None else norm_cut(energy[heads].mean(0), per_head)
