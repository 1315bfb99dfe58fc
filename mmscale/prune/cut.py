"""Where each parameter of the smaller decoder lies in the larger one's, and by what it is multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mmscale.prune.choice import BlockChoice, Choice, Indices, NormCut


@dataclass(frozen=True)
class Cut:
    """Rows and columns of a parameter of the source.

    Attributes:
        name: Of the parameter in the source.
        rows: Along the first dimension; None for all.
        columns: Along the second; None for all, or where there is none.
        scale: Of the values.
    """

    name: str
    rows: Indices | None = None
    columns: Indices | None = None
    scale: float = 1.0

    def of(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The values that stay, of the whole parameter."""
        values = values if self.rows is None else values[self.rows]
        values = values if self.columns is None else values[:, self.columns]
        return values if self.scale == 1.0 else values * self.scale


def cut_of(name: str, choice: Choice, second: Mapping[str, str]) -> Cut:
    """The cut that gives the parameter ``name`` of the smaller decoder.

    A smaller model with one table for embedding and head, cut out of one with two, gets the head: a table that is
    trained in both roles comes to resemble it (Press and Wolf 2017, arXiv 1608.05859), and training from it is ahead
    from the first steps on (``docs/pruning.md``).

    Args:
        name: Of the parameter; of a tied one the embedding's.
        choice: What stays.
        second: Of each tied parameter the head's name for it.
    """
    path, _, leaf = name.rpartition(".")
    if path == "decoder.norm":
        return _of_norm(name, choice.norm)
    if not path.startswith("decoder.layers."):  # Embedding and head: a row for each token.
        return Cut(second.get(name, name), columns=choice.norm.channels)
    number, _, inner = path.removeprefix("decoder.layers.").partition(".")
    block = choice.blocks[int(number)]
    source = f"decoder.layers.{block.number}.{inner}.{leaf}"
    part = inner.rpartition(".")[2]
    if (norm := _norm(part, block)) is not None:
        return _of_norm(source, norm, block.query_scale if part == "q_norm" else 1.0)
    rows, columns = _projection(part, block, choice.norm.channels)
    scale = block.query_scale if part == "q_proj" and block.query_norm is None else 1.0
    return Cut(source, rows, columns if leaf == "weight" else None, scale)


def _of_norm(name: str, norm: NormCut, scale: float = 1.0) -> Cut:
    """Of its scale, or of its bias, which no root mean square divides."""
    return Cut(name, rows=norm.channels, scale=norm.factor * scale if name.endswith(".weight") else 1.0)


def _norm(part: str, block: BlockChoice) -> NormCut | None:
    return {
        "input_layernorm": block.attention_norm,
        "post_attention_layernorm": block.mlp_norm,
        "q_norm": block.query_norm,
        "k_norm": block.key_norm,
    }.get(part)


def _projection(part: str, block: BlockChoice, channels: Indices) -> tuple[Indices, Indices]:
    """Rows and columns."""
    return {
        "q_proj": (block.queries, channels),
        "k_proj": (block.keys, channels),
        "v_proj": (block.values, channels),
        "o_proj": (channels, block.outputs),
        "gate_proj": (block.neurons, channels),
        "up_proj": (block.neurons, channels),
        "down_proj": (channels, block.neurons),
    }[part]
