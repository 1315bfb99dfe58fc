"""Score units by their activations on calibration batches. Needs only forward passes.

    channel of the residual stream   absolute output of the norms, summed over all norms
    neuron, query head               norm of its contribution to its block's output
    block                            1 - cosine of its input and its output
    channel of values                norm of its contribution to the output, by query head
    channel of queries and keys      mean absolute query times mean absolute key, by query head

Each score is a mean over tokens. The paper scores neurons and heads by their activations before the output projection.
Here the score includes that projection, for two reasons. The score does not change if a unit's activations are
multiplied by a factor and its output weights are divided by the factor. An unused query head gets a low score, although
its activations, which are averages of shared values, look normal.

Source: Muralidharan et al. 2024 (arXiv 2407.14679, section 2.2), with the mean as aggregate; for blocks Men et al.
2024, "ShortGPT" (arXiv 2403.03853). The scores of value, query and key channels are mmscale's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import MultimodalBatch
from mmscale.errors import ConfigError
from mmscale.models.decoder import Decoder
from mmscale.models.multimodal import MultimodalModel
from mmscale.nn.block import Mlp, QkNorm, SelfAttention, TransformerBlock
from mmscale.prune.scores import BlockScores, Scores


class _TokenSums:
    """Float64 sums over valid tokens, by (block, quantity). Block -1 is the end of the decoder."""

    def __init__(self) -> None:
        self.valid = torch.empty(0, dtype=torch.bool)
        self.tokens = 0
        self._sums: dict[tuple[int, str], Tensor] = {}

    def begin(self, valid: Tensor) -> None:
        """Start a batch. ``valid`` is the mask of the tokens that are summed."""
        self.valid = valid
        self.tokens += int(valid.sum())

    def rows(self, values: Tensor) -> Tensor:
        """Return the rows of valid tokens, float32."""
        return values[self.valid].float()

    def add(self, block: int, quantity: str, values: Tensor) -> None:
        """Add the values of valid tokens, ``(tokens, ...)``."""
        total = values.sum(0, dtype=torch.float64)
        before = self._sums.get((block, quantity))
        self._sums[block, quantity] = total if before is None else before + total

    def mean(self, block: int, quantity: str) -> Tensor:
        """Return the mean over all valid tokens, float32, on the host."""
        return (self._sums[block, quantity] / self.tokens).float().cpu()


@torch.no_grad()
def scores_of_activations(model: MultimodalModel, batches: Iterable[MultimodalBatch]) -> tuple[Scores, int]:
    """Score every unit of the decoder.

    Args:
        model: The larger model with its weights. Its feed-forwards must be dense. Is in evaluation mode afterwards.
        batches: Batches on the model's device. Padding and dummy documents are not counted.

    Returns:
        The scores, and the number of tokens over which they are means.

    Raises:
        ConfigError: the batches have no valid token.
    """
    model.eval()
    sums = _TokenSums()
    with ExitStack() as hooks:
        for handle in _register_hooks(model.decoder, sums):
            hooks.callback(handle.remove)
        for batch in batches:
            sums.begin(batch.valid)
            model(batch)
    if not sums.tokens:
        raise ConfigError("the calibration batches hold no valid token: give data, and at least one batch")
    return _scores(model.decoder, sums), sums.tokens


def _register_hooks(decoder: Decoder, sums: _TokenSums) -> list[Any]:
    handles = [decoder.norm.register_forward_hook(_norm_hook(sums, -1, "energy", stream=True))]
    for number, block in enumerate(decoder.layers):
        assert isinstance(block, TransformerBlock)
        assert isinstance(block.mlp, Mlp)  # ``conflicts`` rejects experts.
        attention = block.self_attn
        handles += [
            block.register_forward_hook(_influence_hook(sums, number)),
            block.input_layernorm.register_forward_hook(_norm_hook(sums, number, "attention_energy", stream=True)),
            block.post_attention_layernorm.register_forward_hook(_norm_hook(sums, number, "mlp_energy", stream=True)),
            block.mlp.down_proj.register_forward_pre_hook(_neuron_hook(sums, number)),
            attention.o_proj.register_forward_pre_hook(_head_hook(sums, number, attention)),
        ]
        for name, heads in (("q", attention.num_heads), ("k", attention.num_kv_heads)):
            normed = attention.qk_norm is not QkNorm.NONE
            last = getattr(attention, f"{name}_norm" if normed else f"{name}_proj")
            handles.append(last.register_forward_hook(_vector_hook(sums, number, name, heads)))
            if normed:
                handles.append(last.register_forward_hook(_norm_hook(sums, number, f"{name}_energy", stream=False)))
    return handles


def _norm_hook(sums: _TokenSums, block: int, quantity: str, *, stream: bool) -> Any:
    """Return a hook that sums the energy shares of a norm's input; with ``stream`` also its absolute output."""

    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        squares = sums.rows(args[0]).square()
        sums.add(block, quantity, squares / squares.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny))
        if stream:
            sums.add(-1, "channels", sums.rows(output).abs())

    return hook


def _influence_hook(sums: _TokenSums, block: int) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
        before, after = sums.rows(args[0]).double(), sums.rows(output[0]).double()
        sums.add(block, "influence", 1 - F.cosine_similarity(before, after, dim=-1))

    return hook


def _neuron_hook(sums: _TokenSums, block: int) -> Any:
    def hook(module: nn.Linear, args: tuple[Tensor]) -> None:
        sums.add(block, "neurons", sums.rows(args[0]).abs() * module.weight.float().norm(dim=0))

    return hook


def _head_hook(sums: _TokenSums, block: int, attention: SelfAttention) -> Any:
    def hook(module: nn.Linear, args: tuple[Tensor]) -> None:
        mixed = sums.rows(args[0]).unflatten(1, (attention.num_heads, attention.head_dim))
        outputs = module.weight.float().unflatten(1, (attention.num_heads, attention.head_dim))
        # Compute the squared norm of each head's output as a quadratic form: (T, H, K) instead of (T, H, D) in memory.
        forms = torch.einsum("dhk,dhl->hkl", outputs, outputs)
        squares = (torch.einsum("thk,hkl->thl", mixed, forms) * mixed).sum(-1)
        sums.add(block, "heads", squares.clamp(min=0).sqrt())
        sums.add(block, "value", mixed.abs() * outputs.norm(dim=0))

    return hook


def _vector_hook(sums: _TokenSums, block: int, name: str, heads: int) -> Any:
    """Return a hook that sums absolute queries or keys as ``(heads, K)``.

    The hooked module is a projection with output ``(T, heads * K)``, or a norm with output ``(T, heads, K)``.
    """

    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        sums.add(block, name, sums.rows(output).flatten(1).unflatten(1, (heads, -1)).abs())

    return hook


def _scores(decoder: Decoder, sums: _TokenSums) -> Scores:
    blocks = tuple(_block_scores(block.self_attn, sums, n) for n, block in enumerate(decoder.layers))
    influence = torch.stack([sums.mean(number, "influence") for number in range(len(blocks))])
    return Scores(sums.mean(-1, "channels"), sums.mean(-1, "energy"), blocks, influence)


def _block_scores(attention: Any, sums: _TokenSums, block: int) -> BlockScores:
    groups, head_dim = attention.num_kv_heads, attention.head_dim
    queries, keys = sums.mean(block, "q").view(groups, -1, head_dim), sums.mean(block, "k").unsqueeze(1)
    energies = {
        f"{role}_energy": sums.mean(block, f"{name}_energy").view(-1, head_dim)
        for role, name in (("query", "q"), ("key", "k"))
        if attention.qk_norm is not QkNorm.NONE
    }
    return BlockScores(
        heads=sums.mean(block, "heads"),
        neurons=sums.mean(block, "neurons"),
        query_key=(queries * keys).flatten(0, 1),
        value=sums.mean(block, "value"),
        attention_energy=sums.mean(block, "attention_energy"),
        mlp_energy=sums.mean(block, "mlp_energy"),
        **energies,
    )
