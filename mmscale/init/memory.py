"""An estimate of the memory of a training run, from the shapes of a model.

With N values of which n are trained, W ranks and w bytes of a weight, a rank holds, besides activations,

    stage 1    w N + w n + 12 n / W          12 bytes: a float32 master and AdamW's two moments
    stage 2    w N + (w + 12) n / W
    stage 3    (w N + (w + 12) n) / W

(Rajbhandari et al. 2020, arXiv 1910.02054, section 3). At stage 3 a rank also gathers the weights of one module, and
has their whole gradient before it is reduced: 2 w M for the largest module, which may be all experts of a block.

The activations of a row (a token of the decoder, a patch of the tower) are estimated by the inputs and outputs of the
linear layers that it passes, times a factor for norms, activations and attention. A token passes A of E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mmscale.models.build import build_weights
from mmscale.models.config import ModelConfig
from mmscale.nn.cross_entropy import chunk_rows
from mmscale.nn.experts import Experts
from mmscale.nn.router import Router

_OPTIMIZER_BYTES = 12
_FACTOR = 1.5
"""Activations for each input and output value of a linear layer. Measured on a CPU (bf16, 45 M parameters, packs of
1024 tokens): 0.93 of the estimate for text, 0.88 for images in a trained tower. Not measured on CUDA."""
_PROCESS_BYTES = 3 << 29
"""Memory of a rank without a model: torch, DeepSpeed and loader; on CUDA the context, kernels and buffers. Measured on
a CPU: 1.2 GiB for text, 1.8 GiB with images."""


@dataclass(frozen=True)
class MemoryModel:
    """Cost of a model on any machine.

    Attributes:
        total: Number of parameters.
        trained: Number of trained parameters.
        value_bytes: Bytes of a weight or an activation: 2 or 4.
        token_values: Activations of one token: those of the decoder and of the connector.
        block_values: The part of ``token_values`` in the decoder's largest block.
        patch_values: Activations of one patch in the tower; 0 if the tower is frozen, since it keeps none.
        largest_module: Number of parameters of the largest module, without its submodules.
        blocks: Number of blocks of the decoder.
        width: Width of the decoder's stream.
        vocab_size: Rows of the head.
        device: ``cpu`` or ``cuda``.
    """

    total: int
    trained: int
    value_bytes: int
    token_values: int
    block_values: int
    patch_values: int
    largest_module: int
    blocks: int
    width: int
    vocab_size: int
    device: str

    def fixed_bytes(self, zero_stage: int, ranks: int, *, copies: bool) -> int:
        """Return the bytes of one rank without activations.

        Args:
            zero_stage: ZeRO stage, 1 to 3.
            ranks: Number of ranks.
            copies: Whether checkpoints are copied before they are written, in the same memory (on a CPU).
        """
        weights, gradients = self.value_bytes * self.total, self.value_bytes * self.trained
        optimizer = _OPTIMIZER_BYTES * self.trained
        shared = optimizer + (gradients if zero_stage >= 2 else 0) + (weights if zero_stage == 3 else 0)
        whole = weights + gradients + optimizer - shared
        held = whole + shared // ranks
        if zero_stage == 3 and ranks > 1:
            held += 2 * self.value_bytes * self.largest_module
        copy = (weights + optimizer) // ranks if copies and self.device == "cpu" else 0
        logits = 3 * 4 * self.vocab_size * chunk_rows(self.vocab_size, torch.device(self.device))
        return _PROCESS_BYTES + held + copy + logits

    def activation_bytes(self, tokens: float, patches: float, *, recompute: bool) -> int:
        """Return the bytes of the activations of one microbatch.

        Args:
            tokens: Tokens in the decoder.
            patches: Patches in the tower.
            recompute: Whether the decoder recomputes its blocks: then it keeps the input of each, and one whole block.
        """
        per_token = self.token_values
        if recompute:
            per_token = self.blocks * self.width + self.block_values
        return int(self.value_bytes * _FACTOR * (tokens * per_token + patches * self.patch_values))


def memory_model(config: ModelConfig, trained: frozenset[str], value_bytes: int, device: str) -> MemoryModel:
    """Return the memory model of ``config``, of which the components ``trained`` are trained."""
    model = build_weights(config)
    parts = model.components()
    chosen = [parameter for name, part in parts.items() if name in trained or "all" in trained for parameter in part]
    vision_learns = bool(trained & {"vision", "all"}) or (
        config.adapters is not None and config.adapters.targets.vision
    )
    values = {name: _values(getattr(model, name, None)) for name in ("vision", "connector", "decoder")}
    return MemoryModel(
        total=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in set(chosen)),
        value_bytes=value_bytes,
        token_values=values["decoder"] + values["connector"],
        block_values=max(map(_values, model.get_submodule("decoder.layers").children())),
        patch_values=values["vision"] if vision_learns else 0,
        largest_module=max(
            sum(parameter.numel() for parameter in module.parameters(recurse=False)) for module in model.modules()
        ),
        blocks=config.decoder.num_layers,
        width=config.decoder.hidden_dim,
        vocab_size=config.decoder.vocab_size,
        device=device,
    )


def _values(part: nn.Module | None) -> int:
    """Return the input and output values of one row in all linear layers of a component."""
    found = 0
    for module in () if part is None else part.modules():
        if isinstance(module, nn.Linear):
            found += module.in_features + module.out_features
        elif isinstance(module, Router):
            found += sum(module.weight.shape)
        elif isinstance(module, Experts):  # It keeps rows, and their gate and up projections.
            found += module.experts_per_token * sum(module.gate_up_proj.shape[-2:])
    return found
