"""Embed a model in a larger one that computes the same: units added at random positions contribute exactly zero.

The code follows the formulas of the layers in the direction opposite to pruning, and shares no code with
``mmscale.prune``. Two sets of weights touch an added unit; one is random, and the other is zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmscale.models.build import build_model
from mmscale.models.config import ModelConfig
from mmscale.models.multimodal import MultimodalModel
from mmscale.nn.block import QkNorm


@dataclass
class Positions:
    """Indices of the small decoder's units in the large one; lists are by block number in the small one."""

    channels: Tensor
    blocks: list[int]
    neurons: list[Tensor]
    heads: list[Tensor]
    groups: list[Tensor]
    query_key: list[Tensor]
    value: list[Tensor]


def draw_positions(small: ModelConfig, large: ModelConfig, blocks: list[int], generator: torch.Generator) -> Positions:
    """Draw random positions. Rotated channels get the channels of the large RoPE with the same frequencies."""

    def positions(before: int, after: int) -> Tensor:
        return torch.randperm(before, generator=generator)[:after]

    s, b = small.decoder, large.decoder
    width, small_width = b.attention.resolved_head_dim(b.hidden_dim), s.attention.resolved_head_dim(s.hidden_dim)
    each, small_each = (c.attention.num_heads // c.attention.kv_heads for c in (b, s))
    rotated = 0 if b.rope is None else int(width * b.rope.fraction)
    kept = 0 if s.rope is None else int(small_width * s.rope.fraction)
    pairs = [i * (rotated // kept) for i in range(kept // 2)] if kept else []
    rotated_channels = torch.tensor(pairs + [i + rotated // 2 for i in pairs], dtype=torch.int64)
    found = Positions(positions(b.hidden_dim, s.hidden_dim), blocks, [], [], [], [], [])
    for _ in blocks:
        groups = positions(b.attention.kv_heads, s.attention.kv_heads)
        found.groups.append(groups)
        found.heads.append(torch.cat([group * each + positions(each, small_each) for group in groups]))
        others = [rotated + positions(width - rotated, small_width - kept) for _ in groups]
        if s.attention.qk_norm is QkNorm.HEAD:
            others = others[:1] * len(groups)  # One norm weight serves all heads.
        found.query_key.append(torch.stack([torch.cat([rotated_channels, channels]) for channels in others]))
        found.value.append(torch.stack([positions(width, small_width) for _ in groups]))
        found.neurons.append(positions(b.mlp.hidden_dim, s.mlp.hidden_dim))  # type: ignore[union-attr]
    return found


def grow(model: MultimodalModel, large: ModelConfig, blocks: list[int], seed: int = 0) -> MultimodalModel:
    """Return a model of the configuration ``large`` with the logits of ``model``, whose blocks become ``blocks``."""
    generator = torch.Generator().manual_seed(seed)
    small = model.config
    at = draw_positions(small, large, blocks, generator)
    grown = build_model(large, seed=None)
    new = dict(grown.named_parameters())
    with torch.no_grad():
        for values in new.values():
            values.normal_(std=0.3, generator=generator)
        for name, values in model.named_parameters():
            if not name.startswith("decoder.layers."):
                _stream(new[name], values, at.channels, written="embed_tokens" in name)
        for number in range(large.decoder.num_layers):
            prefix = f"decoder.layers.{number}."
            block = {name.removeprefix(prefix): each for name, each in new.items() if name.startswith(prefix)}
            if number in blocks:
                _block(block, model.decoder.layers[blocks.index(number)], at, blocks.index(number), small, large)
            else:
                for name in ("self_attn.o_proj", "mlp.down_proj"):
                    for leaf in ("weight", "bias"):
                        block.get(f"{name}.{leaf}", torch.zeros(0)).zero_()
    return grown.eval()


def _stream(new: Tensor, values: Tensor, channels: Tensor, *, written: bool) -> None:
    """Fill a norm or an embedding table. A ``written`` table writes to the stream, so its added channels become 0."""
    if written:
        new.zero_()
    if values.dim() == 1:
        new[channels] = values * math.sqrt(len(values) / len(new))  # The norm's mean square is smaller by this ratio.
    else:
        new[:, channels] = values


def _block(
    new: dict[str, Tensor], old: Any, at: Positions, number: int, small: ModelConfig, large: ModelConfig
) -> None:
    channels, groups, heads = at.channels, at.groups[number], at.heads[number]
    qk_norm = small.decoder.attention.qk_norm
    width = large.decoder.attention.resolved_head_dim(large.decoder.hidden_dim)
    small_width = small.decoder.attention.resolved_head_dim(small.decoder.hidden_dim)
    each = len(heads) // len(groups)
    inner, value = at.query_key[number], at.value[number]

    def rows(units: Tensor, of_units: Tensor) -> Tensor:
        return torch.cat([unit * width + inside for unit, inside in zip(units, of_units, strict=True)])

    queries = rows(heads, inner.repeat_interleave(each, 0))
    keys, values = rows(groups, inner), rows(groups, value)
    outputs = rows(heads, value.repeat_interleave(each, 0))
    for name in ("input_layernorm", "post_attention_layernorm"):
        for leaf, parameter in getattr(old, name).named_parameters():
            _stream(new[f"{name}.{leaf}"], parameter, channels, written=False)
    wider = math.sqrt(width / small_width)  # Dot products are divided by the root of their width.
    attention = old.self_attn
    for name, indices in (("q_proj", queries), ("k_proj", keys), ("v_proj", values)):
        scale = wider if name == "q_proj" and qk_norm is QkNorm.NONE else 1.0
        kept = groups if name != "q_proj" else heads
        # Set to zero: values of added heads and channels; queries of added channels; both if a norm reads them.
        zero = _zeroed(name, qk_norm, kept, width)
        _fill_input(new, f"self_attn.{name}", getattr(attention, name), indices, channels, zero, scale)
    if qk_norm is not QkNorm.NONE:
        for name, indices, scale in (("q_norm", queries, wider), ("k_norm", keys, 1.0)):
            target, own = new[f"self_attn.{name}.weight"], getattr(attention, name).weight
            kept_channels = inner[0] if qk_norm is QkNorm.HEAD else indices
            target[kept_channels] = own * math.sqrt(len(own) / len(target)) * scale
    unused = _unused(heads, groups, width, large)
    _fill_output(new, "self_attn.o_proj", attention.o_proj, channels, outputs, unused=unused)
    neurons = at.neurons[number]
    for name in ("gate_proj", "up_proj"):
        if hasattr(old.mlp, name):
            _fill_input(new, f"mlp.{name}", getattr(old.mlp, name), neurons, channels, None, 1.0)
    _fill_output(new, "mlp.down_proj", old.mlp.down_proj, channels, neurons, unused=neurons[:0])


def _zeroed(name: str, qk_norm: QkNorm, kept: Tensor, width: int) -> Tensor | None:
    """Return the rows to set to zero before the small model's rows are written; None for all rows."""
    if name == "k_proj" and qk_norm is QkNorm.NONE:
        return torch.arange(0)
    if name == "q_proj" and qk_norm is not QkNorm.FULL:
        return (kept[:, None] * width + torch.arange(width)).flatten()  # Added heads may attend anywhere.
    return None


def _unused(heads: Tensor, groups: Tensor, width: int, large: ModelConfig) -> Tensor:
    """Return the columns of ``o_proj`` of heads that were added to kept groups."""
    each = large.decoder.attention.num_heads // large.decoder.attention.kv_heads
    added = sorted({int(group) * each + n for group in groups for n in range(each)} - set(heads.tolist()))
    return (torch.tensor(added, dtype=torch.int64)[:, None] * width + torch.arange(width)).flatten()


def _fill_input(
    new: dict[str, Tensor], name: str, old: Any, rows: Tensor, channels: Tensor, zero: Tensor | None, scale: float
) -> None:
    """Fill a projection that reads the stream. Its weights for added channels stay random: these channels are zero."""
    for leaf in ("weight", "bias") if old.bias is not None else ("weight",):
        empty = torch.zeros(len(new[f"{name}.{leaf}"]), dtype=torch.bool)
        empty[slice(None) if zero is None else zero] = True
        empty[rows] = False
        new[f"{name}.{leaf}"][empty] = 0
    new[f"{name}.weight"][rows[:, None], channels] = old.weight * scale
    if old.bias is not None:
        new[f"{name}.bias"][rows] = old.bias * scale


def _fill_output(
    new: dict[str, Tensor], name: str, old: Any, channels: Tensor, columns: Tensor, unused: Tensor
) -> None:
    """Fill a projection that writes to the stream, with zero rows for added channels and zero ``unused`` columns."""
    weight = new[f"{name}.weight"]
    others = torch.ones(len(weight), dtype=torch.bool)
    others[channels] = False
    weight[others] = 0
    weight[:, unused] = 0
    weight[channels[:, None], columns] = old.weight
    if old.bias is not None:
        new[f"{name}.bias"].zero_()
        new[f"{name}.bias"][channels] = old.bias
