"""Scores from the weights alone: no data, one tensor in memory at a time.

A unit is worth what is written into it times what is read out of it, each as the root of the sum of squares of the
weights that touch it: a unit with only one of the two does nothing. Of a head that is values and output: queries and
keys say where it looks, not how much it says. How much a block changes the stream no weight tells, so ``influence`` is
left open.

Shares of energy take every input of a projection as equally strong: channel c of the stream holds the mean square of
column c of the embedding, and the sum of squares of row c of each projection that writes to it before.

Source: magnitude scores as in Han et al. 2015 (arXiv 1506.02626), over the structures of Muralidharan et al. 2024.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmscale.models.decoder import DecoderConfig
from mmscale.nn.block import NormPlacement, QkNorm
from mmscale.prune.scores import BlockScores, Scores

Read = Callable[[str], Tensor]
"""A parameter of the source by name, float32, whole."""


class _Block:
    """The parameters of a block, as squares."""

    def __init__(self, config: DecoderConfig, read: Read, number: int) -> None:
        self.config, self._read, self._prefix = config, read, f"decoder.layers.{number}"
        attention = config.attention
        self.groups = attention.kv_heads
        self.head_dim = attention.resolved_head_dim(config.hidden_dim)
        self.reads = torch.zeros(config.hidden_dim)
        """What the projections read of each channel of the stream; grows with every call of ``into``."""

    def into(self, name: str, norm: Tensor) -> Tensor:
        """Sum of squares of each row of a projection that reads the stream, bias included."""
        square = self._read(f"{self._prefix}.{name}.weight").square()
        self.reads += norm.square() * square.sum(0)
        return square.sum(1) + self._bias(name)

    def out_of(self, name: str) -> tuple[Tensor, Tensor]:
        """Sums of squares of a projection that writes to the stream: of each column, and of each row with its bias."""
        square = self._read(f"{self._prefix}.{name}.weight").square()
        return square.sum(0), square.sum(1) + self._bias(name)

    def norm(self, name: str) -> Tensor:
        """The scale of a norm."""
        return self._read(f"{self._prefix}.{name}.weight")

    def _bias(self, name: str) -> Tensor:
        attention, mlp = self.config.attention, self.config.mlp
        biased = {"self_attn.o_proj": attention.out_bias}.get(name, attention.qkv_bias)
        if name.startswith("mlp."):
            biased = mlp.bias  # type: ignore[union-attr]  # Experts are refused.
        return self._read(f"{self._prefix}.{name}.bias").square() if biased else torch.zeros(())

    def of_heads(self, rows: Tensor) -> Tensor:
        """``(G, heads, K)`` of the rows of queries, keys, values or of the columns of the output."""
        return rows.view(self.groups, -1, self.head_dim)


def scores_of_weights(config: DecoderConfig, read: Read) -> Scores:
    """Scores of every unit of a dense decoder."""
    stream = read("decoder.embed_tokens.weight").square().mean(0)
    reads, blocks = torch.zeros_like(stream), []
    for number in range(config.num_layers):
        block = _Block(config, read, number)
        scores, stream = _block_scores(block, stream)
        blocks.append(scores)
        reads += block.reads
    head = "decoder.embed_tokens.weight" if config.tie_embeddings else "head.weight"
    reads += read("decoder.norm.weight").square() * read(head).square().sum(0)
    return Scores((stream * reads).sqrt(), _shares(stream), tuple(blocks))


def _block_scores(block: _Block, stream: Tensor) -> tuple[BlockScores, Tensor]:
    """The scores, and the energy of the stream behind the block."""
    config = block.config
    pre = config.norm_placement is NormPlacement.PRE
    before, after = block.norm("input_layernorm"), block.norm("post_attention_layernorm")
    ones = torch.ones_like(before)
    q, k, v = (block.into(f"self_attn.{name}_proj", before if pre else ones) for name in "qkv")
    columns, written = block.out_of("self_attn.o_proj")
    attention_energy = stream if pre else written
    stream = stream + (written if pre else _normed(written, before))
    names = ["mlp.gate_proj", "mlp.up_proj"] if config.mlp.gated else ["mlp.up_proj"]  # type: ignore[union-attr]
    neurons = torch.stack([block.into(name, after if pre else ones) for name in names]).prod(0)
    out_columns, written = block.out_of("mlp.down_proj")
    mlp_energy = stream if pre else written
    stream = stream + (written if pre else _normed(written, after))
    queries, keys, values, outputs = (block.of_heads(each) for each in (q, k, v, columns))
    how = config.attention.qk_norm
    scores = BlockScores(
        heads=(values.sum(2) * outputs.sum(2)).flatten().sqrt(),
        neurons=(neurons * out_columns).sqrt(),
        query_key=(queries * keys).flatten(0, 1).sqrt(),
        value=(values * outputs).flatten(0, 1).sqrt(),
        attention_energy=_shares(attention_energy),
        mlp_energy=_shares(mlp_energy),
        query_energy=_norm_shares(queries, how),
        key_energy=_norm_shares(keys, how),
    )
    return scores, stream


def _normed(written: Tensor, scale: Tensor) -> Tensor:
    """Energy of what a norm makes of a branch."""
    return _shares(written) * len(written) * scale.square()


def _shares(energy: Tensor) -> Tensor:
    return energy / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)


def _norm_shares(energy: Tensor, how: QkNorm) -> Tensor | None:
    if how is QkNorm.NONE:
        return None
    heads = energy.flatten(0, 1)
    return torch.stack([_shares(head) for head in heads]) if how is QkNorm.HEAD else _shares(heads)
