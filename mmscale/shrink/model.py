"""A tiny twin of any model: the same blocks, flags and ratios, other sizes.

    widths        from few narrow heads; queries per key head (up to 8) stay, and so does a head width that is not D / H
    depth         two blocks, or two periods of what comes every n-th block, n at most 2
    experts       at most two a token, of in proportion as many
    pictures      a quarter of the patches a side, patches of 4 pixels
    vocabulary    2,048 rows, as many as the bundled tokenizer has ids
    positions     a decoder's table stays as long: documents must fit

Widths are recognised by the names of their fields. A field of another size states its limit itself, by ``ShrunkTo`` in
its type (``mmscale/nn/sizes.py``), so a new part needs no rule here. For: tests that train a step of every shipped
model, and runs of a recipe in seconds. Not for: training anything worth keeping.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, TypeVar

from pydantic import BaseModel

from mmscale.models.config import ModelConfig, TowerConfig
from mmscale.nn.sizes import ShrunkTo

C = TypeVar("C", ModelConfig, TowerConfig)
Block = dict[str, Any]

_VOCABULARY = 2048
_HEAD_DIM = 8
_MAX_GROUP = 8
_WIDEST = 128
_LEAST_SIDE = 6
_LOOSE_WIDTH = 48
"""Of layers outside of towers, such as a projector's: unlike any tower's width."""


def shrink(config: C) -> C:
    """The twin of ``config``: parameters of the same names but for the numbers of blocks, below two million values."""
    block = config.model_dump()
    merge = max(_values(block, "merge"), default=1)
    depth = 2 * min(2, max(_values(block, "every"), default=1))
    return type(config).model_validate(_walked(block, config, depth, merge))


def shrunk_side(side: int, merge: int) -> int:
    """Patches a side instead of ``side``: a quarter, in whole merged features, but six where there are as many."""
    return merge * max(math.ceil(side / (4 * merge)), min(side, _LEAST_SIDE) // merge)


def _walked(block: Block, part: BaseModel, depth: int, merge: int) -> Block:
    """The values ``block`` of ``part``, with every block below."""
    if "num_heads" in block:
        own: Block = {**_heads(block), "head_dim": _HEAD_DIM}
        return {
            name: _walked(value, getattr(part, name), depth, merge) if isinstance(value, dict) else own.get(name, value)
            for name, value in block.items()
        }
    out: Block = {}
    for name, value in block.items():
        if isinstance(value, dict):
            walk = _tower if "num_layers" in value else _walked
            out[name] = walk(value, getattr(part, name), depth, merge)
        elif name == "grid":
            out[name] = [shrunk_side(side, merge) for side in value]
        else:
            out[name] = _size(part, name, value)
    return out | (_experts(block) if "num_experts" in block else {})


_SIZES: dict[str, int] = {
    "vocab_size": _VOCABULARY,
    "hidden_dim": _LOOSE_WIDTH,
    "dim": _LOOSE_WIDTH,
    "expert_dim": 16,
    "shared_dim": 32,
}
"""Sizes by the name of their field, in whichever block it is; 0 and null stay."""


def _size(part: BaseModel, name: str, value: Any) -> Any:
    """The size of a field that is no block."""
    if name in _SIZES and value:
        return _SIZES[name]
    limits = [each.most for each in type(part).model_fields[name].metadata if isinstance(each, ShrunkTo)]
    return min(value, *limits) if limits and value is not None else value


def _tower(block: Block, part: BaseModel, depth: int, merge: int) -> Block:
    """Blocks on one residual stream: width from heads, feed-forward and depth in proportion."""
    head_dim, rope = _head_dim(block.get("rope"))
    old, heads = block["attention"], _heads(block["attention"], head_dim)
    width = old["head_dim"] or block["hidden_dim"] // old["num_heads"]
    own = Fraction(block["hidden_dim"], old["num_heads"] * width)  # 1 where the heads fill the stream.
    dim = math.ceil(own * heads["num_heads"] * head_dim / 8) * 8
    attention = {**old, **heads, "head_dim": head_dim if old["head_dim"] else None}
    layers, features = _depth(block, depth)
    others = {name: value for name, value in block.items() if name not in ("attention", "rope")}
    out = _walked(others, part, depth, merge)
    out["mlp"] = _feed_forward(out["mlp"], block["mlp"], dim, block["hidden_dim"])
    out |= {"hidden_dim": dim, "num_layers": layers, "attention": attention}
    out |= {"rope": rope} if "rope" in block else {}
    return out | ({"feature_layers": features} if "feature_layers" in block else {})


def _heads(attention: Block, head_dim: int = _HEAD_DIM) -> Block:
    """Two key heads if there are more than one, each with its queries; one where two would make a wide stream."""
    kv_heads = attention.get("num_kv_heads") or attention["num_heads"]
    group = min(attention["num_heads"] // kv_heads, _MAX_GROUP)
    few = min(kv_heads, 2 if 2 * group * head_dim <= _WIDEST else 1)
    return {"num_heads": group * few, "num_kv_heads": few if attention.get("num_kv_heads") else None}


def _head_dim(rope: Block | None) -> tuple[int, Block | None]:
    """The least width of a head whose rotated part is even and holds the sections in their ratio, and those."""
    if rope is None or rope["sections"] is None:
        return _HEAD_DIM, rope
    parts = [part // math.gcd(*rope["sections"]) for part in rope["sections"]]
    dims = range(_HEAD_DIM, 1024, _HEAD_DIM)
    head_dim = next(dim for dim in dims if int(dim * rope["fraction"]) == 2 * sum(parts))
    return head_dim, {**rope, "sections": parts}


def _depth(block: Block, depth: int) -> tuple[int, list[int]]:
    """Blocks, and which of them hand out features: as many, in the same order, the last one if it did."""
    features = block.get("feature_layers", ())
    ranks = sorted(set(features))
    if not ranks:
        return depth, []
    # Blocks behind the last of them: none, one of many, or all where each is there for a reason of its own.
    behind = block["num_layers"] - 1 - ranks[-1]
    behind = min(behind, 1) if block["last_output"] else behind
    layers = max(depth, len(ranks) + behind)
    return layers, [layers - behind - len(ranks) + ranks.index(layer) for layer in features]


def _feed_forward(mlp: Block, old: Block, dim: int, old_dim: int) -> Block:
    """Dense widths in proportion to the stream's, at most three times as wide."""
    out = {
        name: _feed_forward(mlp[name], value, dim, old_dim) for name, value in old.items() if isinstance(value, dict)
    }
    if "hidden_dim" in old:
        out["hidden_dim"] = min(8 * math.ceil(old["hidden_dim"] * dim / old_dim / 8), 3 * dim)
    return {**mlp, **out}


def _experts(block: Block) -> Block:
    used = min(block["experts_per_token"], 2)
    return {
        "experts_per_token": used,
        "num_experts": min(used * block["num_experts"] // block["experts_per_token"], 16),
    }


def _values(block: Block, name: str) -> Iterator[int]:
    """All values of fields of this name."""
    for key, value in block.items():
        if isinstance(value, dict):
            yield from _values(value, name)
        elif key == name:
            yield value
