"""Normalisation layers and the one switch between them."""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.io.strict import StrictConfig
from mmscale.nn.sizes import Epsilon


class NormKind(str, Enum):
    """Which normalisation."""

    RMS = "rmsnorm"
    LAYER = "layernorm"


class NormConfig(StrictConfig):
    """A normalisation over the last dimension."""

    kind: NormKind = NormKind.RMS
    """``rmsnorm`` (Llama, Qwen, Mistral) or ``layernorm`` (CLIP, SigLIP, Persimmon)."""
    eps: Epsilon = 1e-5
    """Added to the mean square (or the variance) before the root."""


class RMSNorm(nn.Module):
    """Divides by the root mean square, computed in float32, then scales.

    Source: Zhang and Sennrich 2019, "Root mean square layer normalization".
    """

    constant_init: ClassVar[dict[str, float]] = {"weight": 1.0}

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def build_norm(config: NormConfig, dim: int) -> nn.Module:
    """A norm of ``dim`` channels."""
    if config.kind is NormKind.RMS:
        return RMSNorm(dim, config.eps)
    return nn.LayerNorm(dim, eps=config.eps)
