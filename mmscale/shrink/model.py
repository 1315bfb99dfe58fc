"""Make a smoke-test model from any model configuration: the same kinds of blocks, flags and ratios, but small sizes.

    widths        one or two key heads of 8 channels or slightly more; keeps up to 8 queries per key head, and the
                  ratio of D to H * K.
    depth         2 blocks; 4 if a part is in every n-th block with n > 1, which becomes every second block; more if
                  the feature layers of a tower need them. With ``keep_depth``, all blocks.
    experts       at most 2 per token and 16 in all, in proportion to the model's.
    images        a quarter of the patches per side, patches of 4 pixels; few learned queries.
    vocabulary    2,048 rows, the number of ids of the bundled tokenizer.
    positions     a decoder's position table keeps its length, so documents fit.

Widths are recognised by the names of their fields. Any other field gives its own limit with ``ShrunkTo`` in its type
(``mmscale/nn/sizes.py``), so a new part needs no rule here. Use: tests that train one step of every shipped model, and
runs of a recipe that take seconds. The smoke-test model is too small to learn anything useful.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, TypeVar, cast

from pydantic import BaseModel

from mmscale.models.config import AnyModelConfig, TokenizerConfig
from mmscale.nn.sizes import ShrunkTo

C = TypeVar("C", bound=AnyModelConfig)
Block = dict[str, Any]

_VOCABULARY = 2048
_HEAD_DIM = 8
_MAX_GROUP = 8
_MAX_WIDTH = 128
_MIN_SIDE = 6
_QUERIES = 32
"""Learned queries of a model for each one of its smoke-test model."""
_OTHER_WIDTH = 48
"""Width of layers outside of towers, such as a projector's. Most towers have another width, which exposes mix-ups."""


def shrink(config: C, *, keep_depth: bool = False) -> C:
    """Return the smoke-test configuration of ``config``. Its parameters have the same names, except block numbers.

    Args:
        config: A model, a tower or an image tokenizer.
        keep_depth: Keep the number of blocks, and which of them have another part. All parameters then have the same
            names.
    """
    block = config.model_dump()
    merge = max(_values_named(block, "merge"), default=1)
    depth = None if keep_depth else 2 * min(2, max(_values_named(block, "every"), default=1))
    small = _shrink_block(block, config, depth, merge)
    if isinstance(config, TokenizerConfig):
        stride = config.image_tokenizer.stride
        small["image_size"] = stride * shrunk_side(config.image_size // stride, merge)
    return cast(C, type(config).model_validate(small))


def shrunk_side(side: int, merge: int) -> int:
    """Return the side of a grid in the smoke-test model, in patches: a quarter of ``side``, a multiple of ``merge``.

    The result is at least 6, or ``side`` if that is smaller, rounded down to a multiple of ``merge``.
    """
    return merge * max(math.ceil(side / (4 * merge)), min(side, _MIN_SIDE) // merge)


def _shrink_block(block: Block, part: BaseModel, depth: int | None, merge: int) -> Block:
    """Return the shrunk values of a block and of all blocks in it.

    Args:
        block: Values of ``part``.
        part: Configuration object of the block; its class has the ``ShrunkTo`` limits.
        depth: Number of blocks of a tower without feature layers; None to keep each tower's number.
        merge: Side of the square of patches that becomes one feature.
    """
    if "num_heads" in block:
        own: Block = {**_shrink_heads(block), "head_dim": _HEAD_DIM}
        queries = block.get("queries", ())
        # A dictionary, because two sides may become one.
        own["queries"] = list({shrunk_side(side, 1): math.ceil(each / _QUERIES) for side, each in queries}.items())
        return {
            name: _shrink_block(value, getattr(part, name), depth, merge)
            if isinstance(value, dict)
            else own.get(name, value)
            for name, value in block.items()
        }
    out: Block = {}
    for name, value in block.items():
        if isinstance(value, dict):
            shrink_part = _shrink_tower if "num_layers" in value else _shrink_block
            out[name] = shrink_part(value, getattr(part, name), depth, merge)
        elif name == "grid":
            out[name] = [shrunk_side(side, merge) for side in value]
        else:
            out[name] = _shrink_value(part, name, value, keep_depth=depth is None)
    return out | (_shrink_experts(block) if "num_experts" in block else {})


_SIZES: dict[str, int] = {
    "vocab_size": _VOCABULARY,
    "hidden_dim": _OTHER_WIDTH,
    "dim": _OTHER_WIDTH,
    "expert_dim": 16,
    "shared_dim": 32,
}
"""Size of each field with this name, in any block. 0 and null stay."""


def _shrink_value(part: BaseModel, name: str, value: Any, *, keep_depth: bool) -> Any:
    """Return the shrunk value of a field that is not a block."""
    if name in _SIZES and value:
        return _SIZES[name]
    metadata = type(part).model_fields[name].metadata
    limits = [each.most for each in metadata if isinstance(each, ShrunkTo) and not (keep_depth and each.counts_blocks)]
    return min(value, *limits) if limits and value is not None else value


def _shrink_tower(block: Block, part: BaseModel, depth: int | None, merge: int) -> Block:
    """Shrink a tower or decoder: the heads determine its width, and the width its feed-forward dimension."""
    head_dim, rope = _head_dim(block.get("rope"))
    old, heads = block["attention"], _shrink_heads(block["attention"], head_dim)
    width = old["head_dim"] or block["hidden_dim"] // old["num_heads"]
    ratio = Fraction(block["hidden_dim"], old["num_heads"] * width)  # D / (H * K), usually 1.
    dim = math.ceil(ratio * heads["num_heads"] * head_dim / 8) * 8
    attention = {**old, **heads, "head_dim": head_dim if old["head_dim"] else None}
    layers, features = _shrink_depth(block, depth)
    others = {name: value for name, value in block.items() if name not in ("attention", "rope")}
    out = _shrink_block(others, part, depth, merge)
    out["mlp"] = _shrink_mlp(out["mlp"], block["mlp"], dim, block["hidden_dim"])
    out |= {"hidden_dim": dim, "num_layers": layers, "attention": attention}
    out |= {"rope": rope} if "rope" in block else {}
    if out.get("windows"):  # The last block attends whole frames, if any does.
        whole = block["windows"]["frame_layers"]
        own = whole if layers == block["num_layers"] else [layers - 1] * bool(whole and layers > 1)
        out["windows"] = {**out["windows"], "frame_layers": own}
    return out | ({"feature_layers": features} if "feature_layers" in block else {})


def _shrink_heads(attention: Block, head_dim: int = _HEAD_DIM) -> Block:
    """Return the numbers of heads: two key heads (one if two would be too wide) with their queries."""
    kv_heads = attention.get("num_kv_heads") or attention["num_heads"]
    group = min(attention["num_heads"] // kv_heads, _MAX_GROUP)
    few = min(kv_heads, 2 if 2 * group * head_dim <= _MAX_WIDTH else 1)
    return {"num_heads": group * few, "num_kv_heads": few if attention.get("num_kv_heads") else None}


def _head_dim(rope: Block | None) -> tuple[int, Block | None]:
    """Return the width of a head, and the values of its RoPE block.

    With RoPE sections, it is the smallest width whose rotated part holds the sections in their ratio.
    """
    if rope is None or rope["sections"] is None:
        return _HEAD_DIM, rope
    parts = [part // math.gcd(*rope["sections"]) for part in rope["sections"]]
    dims = range(_HEAD_DIM, 1024, _HEAD_DIM)
    head_dim = next(dim for dim in dims if int(dim * rope["fraction"]) == 2 * sum(parts))
    return head_dim, {**rope, "sections": parts}


def _shrink_depth(block: Block, depth: int | None) -> tuple[int, list[int]]:
    """Return the number of blocks, and the new ``feature_layers``: equally many, in the same order."""
    features = block.get("feature_layers", ())
    if depth is None:
        return block["num_layers"], list(features)
    ranks = sorted(set(features))
    if not ranks:
        return depth, []
    # Keep at most one block after the last feature layer. Without last_output keep all: idle_layers counts them.
    blocks_after = block["num_layers"] - 1 - ranks[-1]
    blocks_after = min(blocks_after, 1) if block["last_output"] else blocks_after
    layers = max(depth, len(ranks) + blocks_after)
    return layers, [layers - blocks_after - len(ranks) + ranks.index(layer) for layer in features]


def _shrink_mlp(mlp: Block, old: Block, dim: int, old_dim: int) -> Block:
    """Return the feed-forward block with dense widths in proportion to ``dim / old_dim``, at most ``3 * dim``."""
    out = {name: _shrink_mlp(mlp[name], value, dim, old_dim) for name, value in old.items() if isinstance(value, dict)}
    if "hidden_dim" in old:
        out["hidden_dim"] = min(8 * math.ceil(old["hidden_dim"] * dim / old_dim / 8), 3 * dim)
    return {**mlp, **out}


def _shrink_experts(block: Block) -> Block:
    used = min(block["experts_per_token"], 2)
    return {
        "experts_per_token": used,
        "num_experts": min(used * block["num_experts"] // block["experts_per_token"], 16),
    }


def _values_named(block: Block, name: str) -> Iterator[int]:
    """Yield the values of all fields with this name, in the block and in all blocks below."""
    for key, value in block.items():
        if isinstance(value, dict):
            yield from _values_named(value, name)
        elif key == name:
            yield value
