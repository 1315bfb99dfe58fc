"""Check whether a model can be cut out of a larger one, and list the conflicts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from mmscale.models.config import ModelConfig
from mmscale.models.decoder import DecoderConfig
from mmscale.nn.block import DenseMlpConfig, NormKind, QkNorm
from mmscale.nn.rope import YarnScaling, rotated_width

_FIXED_FIELDS = (
    "norm.kind",
    "norm_placement",
    "rope.theta",
    "rope.fraction",
    "attention.qkv_bias",
    "attention.key_bias",
    "attention.out_bias",
    "attention.qk_norm",
    "mlp.activation",
    "mlp.gated",
    "mlp.bias",
)
"""Fields that must be equal in both models. ``rope.scaling`` may differ: it has no weights, and training adapts."""

_TOWER_REASON = (
    "only decoders are pruned: leave out vision and connector here, and a stage puts the result under them "
    "(stages.N.weights with components: [decoder])"
)


class Conflict(NamedTuple):
    """A reason why the smaller model cannot be cut out of the source."""

    path: str
    """Dotted path of the field in the configuration of the smaller model."""
    reason: str


def conflicts(source: ModelConfig, target: ModelConfig) -> list[Conflict]:
    """Return the conflicts that prevent cutting ``target`` out of ``source``; an empty list if there are none.

    A vision block in ``target``, experts and axes larger than the source's each end the check, so later conflicts may
    be missing in the list.
    """
    if target.vision is not None:
        return [Conflict("vision", _TOWER_REASON)]
    if source.adapters is not None or target.adapters is not None:
        return [Conflict("adapters", "layers with adapters are not pruned: export the source with its adapters merged")]
    return [Conflict(f"decoder.{path}", reason) for path, reason in _decoder_conflicts(source.decoder, target.decoder)]


def _decoder_conflicts(source: DecoderConfig, target: DecoderConfig) -> Iterator[Conflict]:
    if not (isinstance(source.mlp, DenseMlpConfig) and isinstance(target.mlp, DenseMlpConfig)):
        yield Conflict("mlp.kind", "experts are not pruned, only dense feed-forwards")
        return
    if source.separate_image_tokens is not None or target.separate_image_tokens is not None:
        yield Conflict("image_tokens", "a separate embedding and head of image tokens are not pruned")
        return
    for path in ("vocab_size", "extra_tokens"):
        if _value(source, path) != _value(target, path):
            yield Conflict(path, f"{_format(source, path)} in the source; pruning keeps the vocabulary")
    for path in _FIXED_FIELDS:
        if _value(source, path) != _value(target, path):
            yield Conflict(path, f"{_format(source, path)} in the source, and no cut can change it")
    sizes, wanted = axes(source), axes(target)
    larger = [axis for axis in sizes if wanted[axis] > sizes[axis]]
    for axis in larger:
        yield Conflict(axis, f"{wanted[axis]} is more than the source's {sizes[axis]}; pruning only removes units")
    if larger:
        return
    if wanted == sizes and source.tie_embeddings == target.tie_embeddings:
        yield Conflict("hidden_dim", "the model is as large as the source on every axis: there is nothing to prune")
    yield from _head_conflicts(source, target)
    yield from _norm_conflicts(source, target)


def axes(decoder: DecoderConfig) -> dict[str, int]:
    """Return the sizes that pruning can reduce, by field."""
    assert isinstance(decoder.mlp, DenseMlpConfig)
    return {
        "num_layers": decoder.num_layers,
        "hidden_dim": decoder.hidden_dim,
        "mlp.hidden_dim": decoder.mlp.hidden_dim,
        "attention.num_heads": decoder.attention.num_heads,
        "attention.num_kv_heads": decoder.attention.kv_heads,
        "attention.head_dim": decoder.attention.resolved_head_dim(decoder.hidden_dim),
    }


def _head_conflicts(source: DecoderConfig, target: DecoderConfig) -> Iterator[Conflict]:
    mine, theirs = (each.attention.num_heads // each.attention.kv_heads for each in (target, source))
    if mine > theirs:
        yield Conflict(
            "attention.num_kv_heads",
            f"{mine} query heads would share a key head, but {theirs} do in the source; each query head keeps its key "
            f"head, so keep at least {-(-target.attention.num_heads // theirs)} key heads, or fewer query heads",
        )
    if source.rope is None or target.rope is None:
        return
    large, small = axes(source)["attention.head_dim"], axes(target)["attention.head_dim"]
    before, after = rotated_width(large, source.rope), rotated_width(small, target.rope)
    if before % after or small - after > large - before:
        fitting = [2 * half for half in range(1, before // 2 + 1) if before % (2 * half) == 0]
        yield Conflict(
            "attention.head_dim",
            f"{after} rotated channels cannot have the frequencies of {before}; expected one of {fitting}",
        )
    if source.rope.sections != target.rope.sections and large == small:
        yield Conflict("rope.sections", f"{_format(source, 'rope.sections')} in the source, and no cut can change it")
    if large != small and (source.rope.sections or target.rope.sections):
        yield Conflict("attention.head_dim", "heads with RoPE sections (rope.sections) cannot be made narrower")
    if large != small and isinstance(source.rope.scaling, YarnScaling):
        yield Conflict(
            "attention.head_dim", "heads cannot be made narrower: rope.scaling.kind=yarn depends on their width"
        )


def _norm_conflicts(source: DecoderConfig, target: DecoderConfig) -> Iterator[Conflict]:
    """Yield the conflicts of norms. A layer norm subtracts the mean of all channels, so its channels cannot be cut."""
    sizes, wanted = axes(source), axes(target)
    if source.norm.kind is NormKind.LAYER and sizes["hidden_dim"] != wanted["hidden_dim"]:
        yield Conflict("hidden_dim", f"a residual stream with layer norms must keep its width, {sizes['hidden_dim']}")
    how = source.attention.qk_norm
    kinds = [(each.attention.qk_norm_config or each.norm).kind for each in (source, target)]
    if how is QkNorm.NONE:
        return
    if kinds[0] is not kinds[1]:
        yield Conflict("attention.qk_norm_config", f"{kinds[0].value} in the source, and no cut can change it")
    names = ["attention.head_dim"]
    names += ["attention.num_heads", "attention.num_kv_heads"] if how is QkNorm.FULL else []
    for name in names if kinds[0] is NormKind.LAYER else ():
        if sizes[name] != wanted[name]:
            yield Conflict(name, f"queries and keys with a layer norm must keep the source's {sizes[name]}")


def _value(decoder: DecoderConfig, path: str) -> Any:
    value: Any = decoder
    for name in path.split("."):
        value = None if value is None else getattr(value, name)
    return value


def _format(decoder: DecoderConfig, path: str) -> str:
    value = _value(decoder, path)
    return "null" if value is None else str(getattr(value, "value", value))
