"""Score units by the weights alone. Needs no data, and holds one tensor in memory at a time.

The score of a unit is the product of two norms: of the weights that write to it and of those that read from it. A unit
with only one of the two has no effect. For a gated neuron, the norms of gate and up are both factors. The score of a
head uses its values and output; its queries and keys only determine where it attends. The score of a channel of queries
and keys is the product of the norms of its query row and its key row. ``influence`` stays None, because weights do not
show how much a block changes the stream.

The energy shares assume that all inputs of a projection are equally strong. Under this assumption, the energy of
channel c of the stream is the mean square of column c of the embedding, plus the sum of squares of row c of each
earlier projection that writes to the stream. With post-norms, the sums of a branch are divided by their mean and then
multiplied by the squared scale of its norm.

Source: magnitude scores as in Han et al. 2015 (arXiv 1506.02626), for the structures of Muralidharan et al. 2024.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmscale.models.decoder import DecoderConfig
from mmscale.nn.block import NormPlacement, QkNorm
from mmscale.prune.scores import BlockScores, Scores

ReadParameter = Callable[[str], Tensor]
"""Returns a parameter of the source by name, unsharded, float32."""


class _BlockSquares:
    """Sums of squares of the parameters of one block."""

    def __init__(self, config: DecoderConfig, read: ReadParameter, number: int) -> None:
        self.config, self._read, self._prefix = config, read, f"decoder.layers.{number}"
        attention = config.attention
        self.groups = attention.kv_heads
        self.head_dim = attention.resolved_head_dim(config.hidden_dim)
        self.reads = torch.zeros(config.hidden_dim)
        """Sum of squares of the weights that read each channel of the stream; ``input_squares`` adds to it."""

    def input_squares(self, name: str, norm: Tensor) -> Tensor:
        """Return the sum of squares of each row, with its bias, of a projection that reads the stream.

        Args:
            name: Name of the projection in the block. Call once per projection, because the call adds to ``reads``.
            norm: Scale of the norm before the projection.
        """
        square = self._read(f"{self._prefix}.{name}.weight").square()
        self.reads += norm.square() * square.sum(0)
        return square.sum(1) + self._bias(name)

    def output_squares(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the sums of squares of a projection that writes to the stream: by column, and by row with bias."""
        square = self._read(f"{self._prefix}.{name}.weight").square()
        return square.sum(0), square.sum(1) + self._bias(name)

    def norm(self, name: str) -> Tensor:
        """Return the scale of a norm."""
        return self._read(f"{self._prefix}.{name}.weight")

    def _bias(self, name: str) -> Tensor:
        attention, mlp = self.config.attention, self.config.mlp
        own = {"self_attn.o_proj": attention.out_bias, "self_attn.k_proj": attention.qkv_bias and attention.key_bias}
        biased = own.get(name, attention.qkv_bias)
        if name.startswith("mlp."):
            biased = mlp.bias  # type: ignore[union-attr]  # ``conflicts`` rejects experts.
        return self._read(f"{self._prefix}.{name}.bias").square() if biased else torch.zeros(())

    def by_head(self, rows: Tensor) -> Tensor:
        """Reshape values of the rows of q, k or v, or of the columns of the output projection, to ``(G, heads, K)``."""
        return rows.view(self.groups, -1, self.head_dim)


def scores_of_weights(config: DecoderConfig, read: ReadParameter) -> Scores:
    """Score every unit of a dense decoder. Reads one parameter at a time, block by block."""
    stream = read("decoder.embed_tokens.weight").square().mean(0)
    reads, blocks = torch.zeros_like(stream), []
    for number in range(config.num_layers):
        block = _BlockSquares(config, read, number)
        scores, stream = _block_scores(block, stream)
        blocks.append(scores)
        reads += block.reads
    head = "decoder.embed_tokens.weight" if config.tie_embeddings else "head.weight"
    reads += read("decoder.norm.weight").square() * read(head).square().sum(0)
    return Scores((stream * reads).sqrt(), _shares(stream), tuple(blocks))


def _block_scores(block: _BlockSquares, stream: Tensor) -> tuple[BlockScores, Tensor]:
    """Return the scores of a block, and the energy of each channel of the stream after the block."""
    config = block.config
    pre = config.norm_placement is NormPlacement.PRE
    before, after = block.norm("input_layernorm"), block.norm("post_attention_layernorm")
    ones = torch.ones_like(before)
    q, k, v = (block.input_squares(f"self_attn.{name}_proj", before if pre else ones) for name in "qkv")
    columns, written = block.output_squares("self_attn.o_proj")
    attention_energy = stream if pre else written
    stream = stream + (written if pre else _norm_energy(written, before))
    names = ["mlp.gate_proj", "mlp.up_proj"] if config.mlp.gated else ["mlp.up_proj"]  # type: ignore[union-attr]
    neurons = torch.stack([block.input_squares(name, after if pre else ones) for name in names]).prod(0)
    out_columns, written = block.output_squares("mlp.down_proj")
    mlp_energy = stream if pre else written
    stream = stream + (written if pre else _norm_energy(written, after))
    queries, keys, values, outputs = (block.by_head(each) for each in (q, k, v, columns))
    kind = config.attention.qk_norm
    scores = BlockScores(
        heads=(values.sum(2) * outputs.sum(2)).flatten().sqrt(),
        neurons=(neurons * out_columns).sqrt(),
        query_key=(queries * keys).flatten(0, 1).sqrt(),
        value=(values * outputs).flatten(0, 1).sqrt(),
        attention_energy=_shares(attention_energy),
        mlp_energy=_shares(mlp_energy),
        query_energy=_norm_shares(queries, kind),
        key_energy=_norm_shares(keys, kind),
    )
    return scores, stream


def _norm_energy(written: Tensor, scale: Tensor) -> Tensor:
    """Return the energy of each channel of a branch after its norm (post-norm)."""
    return _shares(written) * len(written) * scale.square()


def _shares(energy: Tensor) -> Tensor:
    return energy / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)


def _norm_shares(energy: Tensor, kind: QkNorm) -> Tensor | None:
    if kind is QkNorm.NONE:
        return None
    heads = energy.flatten(0, 1)
    return torch.stack([_shares(head) for head in heads]) if kind is QkNorm.HEAD else _shares(heads)
