"""Map each parameter of the smaller decoder to rows, columns and a scale of a parameter of the larger one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mmscale.prune.choice import BlockChoice, Indices, NormCut, UnitChoice


@dataclass(frozen=True)
class Cut:
    """Rows, columns and scale of a parameter of the source.

    Attributes:
        name: Name of the parameter in the source.
        rows: Kept indices of the first dimension; None keeps all.
        columns: Kept indices of the second dimension; None keeps all, or there is no second dimension.
        scale: Factor of the kept values.
    """

    name: str
    rows: Indices | None = None
    columns: Indices | None = None
    scale: float = 1.0

    def apply(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the kept values of the complete parameter, scaled."""
        values = values if self.rows is None else values[self.rows]
        values = values if self.columns is None else values[:, self.columns]
        return values if self.scale == 1.0 else values * self.scale


def cut_of(name: str, choice: UnitChoice, second: Mapping[str, str]) -> Cut:
    """Return the cut that gives the parameter ``name`` of the smaller decoder.

    If the smaller model ties embedding and head but the source does not, the tied table comes from the head. A tied
    table learns to resemble the head (Press and Wolf 2017, arXiv 1608.05859). Before training, the head's table and the
    embedding's give about the same loss; after 25 steps the head's gives a much lower one (``docs/benchmarks.md``).

    Args:
        name: Name of the parameter in the smaller model; the embedding's name for a tied one.
        choice: The kept units.
        second: Name of each table that the smaller model ties to the head -> its name in the head.
    """
    path, _, leaf = name.rpartition(".")
    if path == "decoder.norm":
        return _norm_cut(name, choice.norm)
    if not path.startswith("decoder.layers."):  # Embedding and head: a row for each token.
        return Cut(second.get(name, name), columns=choice.norm.channels)
    number, _, inner = path.removeprefix("decoder.layers.").partition(".")
    block = choice.blocks[int(number)]
    source = f"decoder.layers.{block.number}.{inner}.{leaf}"
    part = inner.rpartition(".")[2]
    if (norm := _kept_norm(part, block)) is not None:
        return _norm_cut(source, norm, block.query_scale if part == "q_norm" else 1.0)
    rows, columns = _projection(part, block, choice.norm.channels)
    scale = block.query_scale if part == "q_proj" and block.query_norm is None else 1.0
    return Cut(source, rows, columns if leaf == "weight" else None, scale)


def _norm_cut(name: str, norm: NormCut, scale: float = 1.0) -> Cut:
    """Return the cut of a norm's weight, or of its bias, which needs no factor."""
    return Cut(name, rows=norm.channels, scale=norm.factor * scale if name.endswith(".weight") else 1.0)


def _kept_norm(part: str, block: BlockChoice) -> NormCut | None:
    return {
        "input_layernorm": block.attention_norm,
        "post_attention_layernorm": block.mlp_norm,
        "q_norm": block.query_norm,
        "k_norm": block.key_norm,
    }.get(part)


def _projection(part: str, block: BlockChoice, channels: Indices) -> tuple[Indices, Indices]:
    """Return the kept rows and columns of a projection."""
    return {
        "q_proj": (block.queries, channels),
        "k_proj": (block.keys, channels),
        "v_proj": (block.values, channels),
        "o_proj": (channels, block.outputs),
        "gate_proj": (block.neurons, channels),
        "up_proj": (block.neurons, channels),
        "down_proj": (channels, block.neurons),
    }[part]
