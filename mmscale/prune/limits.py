"""Whether a model can be cut out of another one; every reason why not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from mmscale.models.config import ModelConfig
from mmscale.models.decoder import DecoderConfig
from mmscale.nn.block import DenseMlpConfig, NormKind, QkNorm
from mmscale.nn.rope import YarnScaling, rotated_width

_KIND = (
    "norm.kind",
    "norm_placement",
    "rope.theta",
    "rope.fraction",
    "attention.qkv_bias",
    "attention.out_bias",
    "attention.qk_norm",
    "mlp.activation",
    "mlp.gated",
    "mlp.bias",
)
"""What no cut can change. Stretched rotations may differ: they are no weights, and the smaller model is trained on."""

_TOWER = (
    "only decoders are pruned: leave out vision and connector here, and a stage puts the result under them "
    "(stages.N.weights with components: [decoder])"
)


class Refusal(NamedTuple):
    """Why the smaller model cannot be had."""

    path: str
    """The field at fault, from the top of the model's file."""
    reason: str


def refusals(source: ModelConfig, target: ModelConfig) -> list[Refusal]:
    """Everything that stands in the way of cutting ``target`` out of ``source``; an empty list if nothing does."""
    if target.vision is not None:
        return [Refusal("vision", _TOWER)]
    return [Refusal(f"decoder.{path}", reason) for path, reason in _of_decoders(source.decoder, target.decoder)]


def _of_decoders(source: DecoderConfig, target: DecoderConfig) -> Iterator[Refusal]:
    if not (isinstance(source.mlp, DenseMlpConfig) and isinstance(target.mlp, DenseMlpConfig)):
        yield Refusal("mlp.kind", "experts are not pruned, only dense feed-forwards")
        return
    for path in ("vocab_size", "extra_tokens"):
        if _value(source, path) != _value(target, path):
            yield Refusal(path, f"{_shown(source, path)} in the source; the vocabulary stays as it is")
    for path in _KIND:
        if _value(source, path) != _value(target, path):
            yield Refusal(path, f"{_shown(source, path)} in the source, and no cut can change it")
    sizes, wanted = axes(source), axes(target)
    larger = [axis for axis in sizes if wanted[axis] > sizes[axis]]
    for axis in larger:
        yield Refusal(axis, f"{wanted[axis]} is more than the source's {sizes[axis]}; pruning only takes away")
    if larger:
        return
    if wanted == sizes and source.tie_embeddings == target.tie_embeddings:
        yield Refusal("hidden_dim", "the model is as large as the source in every axis: there is nothing to prune")
    yield from _of_heads(source, target)
    yield from _of_norms(source, target)


def axes(decoder: DecoderConfig) -> dict[str, int]:
    """What can be made smaller: sizes by field."""
    assert isinstance(decoder.mlp, DenseMlpConfig)
    return {
        "num_layers": decoder.num_layers,
        "hidden_dim": decoder.hidden_dim,
        "mlp.hidden_dim": decoder.mlp.hidden_dim,
        "attention.num_heads": decoder.attention.num_heads,
        "attention.num_kv_heads": decoder.attention.kv_heads,
        "attention.head_dim": decoder.attention.resolved_head_dim(decoder.hidden_dim),
    }


def _of_heads(source: DecoderConfig, target: DecoderConfig) -> Iterator[Refusal]:
    mine, theirs = (each.attention.num_heads // each.attention.kv_heads for each in (target, source))
    if mine > theirs:
        yield Refusal(
            "attention.num_kv_heads",
            f"{mine} query heads would share a key head, {theirs} do in the source; queries do not change their keys, "
            f"so keep at least {-(-target.attention.num_heads // theirs)} key heads or fewer query heads",
        )
    if source.rope is None or target.rope is None:
        return
    large, small = axes(source)["attention.head_dim"], axes(target)["attention.head_dim"]
    before, after = rotated_width(large, source.rope), rotated_width(small, target.rope)
    if before % after or small - after > large - before:
        fitting = [2 * half for half in range(1, before // 2 + 1) if before % (2 * half) == 0]
        yield Refusal(
            "attention.head_dim",
            f"{after} rotated channels cannot have the frequencies of {before}; possible are {fitting}",
        )
    if source.rope.sections != target.rope.sections and large == small:
        yield Refusal("rope.sections", f"{_shown(source, 'rope.sections')} in the source, and no cut can change it")
    if large != small and (source.rope.sections or target.rope.sections):
        yield Refusal("attention.head_dim", "heads whose frequencies are shared among axes (rope.sections) stay whole")
    if large != small and isinstance(source.rope.scaling, YarnScaling):
        yield Refusal("attention.head_dim", "the frequencies of rope.scaling.kind=yarn follow from a head's width")


def _of_norms(source: DecoderConfig, target: DecoderConfig) -> Iterator[Refusal]:
    """A layer norm subtracts the mean over all channels, which those that stay do not know."""
    sizes, wanted = axes(source), axes(target)
    if source.norm.kind is NormKind.LAYER and sizes["hidden_dim"] != wanted["hidden_dim"]:
        yield Refusal("hidden_dim", f"a stream of layer norms keeps its width, {sizes['hidden_dim']}")
    how = source.attention.qk_norm
    kinds = [(each.attention.qk_norm_config or each.norm).kind for each in (source, target)]
    if how is QkNorm.NONE:
        return
    if kinds[0] is not kinds[1]:
        yield Refusal("attention.qk_norm_config", f"{kinds[0].value} in the source, and no cut can change it")
    names = ["attention.head_dim"]
    names += ["attention.num_heads", "attention.num_kv_heads"] if how is QkNorm.FULL else []
    for name in names if kinds[0] is NormKind.LAYER else ():
        if sizes[name] != wanted[name]:
            yield Refusal(name, f"queries and keys under a layer norm keep the source's {sizes[name]}")


def _value(decoder: DecoderConfig, path: str) -> Any:
    value: Any = decoder
    for name in path.split("."):
        value = None if value is None else getattr(value, name)
    return value


def _shown(decoder: DecoderConfig, path: str) -> str:
    value = _value(decoder, path)
    return "null" if value is None else str(getattr(value, "value", value))
