"""Low-rank adapters: a linear layer with a small trainable update next to its weight.

    LoRA    W x + b  +  s B A x                       s = alpha / rank
    DoRA    m / ||W + s B A|| * (W + s B A) x  +  b   the norm is that of each row, and a constant in the gradient

The layer keeps the names ``weight`` and ``bias``, so the weights of a model without adapters load unchanged. The new
parameters are ``lora_A`` ``(rank, in)``, ``lora_B`` ``(out, rank)`` and, with DoRA, ``magnitude`` ``(out,)``.

Source: Hu et al. 2021, "LoRA" (arXiv 2106.09685), section 4.1; Liu et al. 2024, "DoRA" (arXiv 2402.09353), sections 4.1
and 4.3 (the norm as a constant). Initial values and dropout are those of Hugging Face's ``peft``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mmscale.nn.dropout import Dropout, SubLayer

ADAPTER_PARAMETERS = ("lora_A", "lora_B", "magnitude")
"""Names of the parameters that ``AdaptedLinear`` adds."""


class AdaptedLinear(nn.Linear):
    """A linear layer with a low-rank update.

    Args:
        base: The layer to replace. The new layer shares its parameters and its settings for initial values.
        rank: Rows of ``lora_A``.
        scaling: Factor of the update: alpha / rank.
        magnitude: Whether the length of each row of the weight is a parameter of its own (DoRA).

    Attributes:
        masks: Dropout masks of the current microbatch for the input of the update; None for no dropout. The model sets
            them before each forward pass in training. Evaluation ignores them.
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float, *, magnitude: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        for name in ("init_std", "init_residual_gain"):
            if hasattr(base, name):
                setattr(self, name, getattr(base, name))
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(self.out_features, rank))
        self.magnitude = nn.Parameter(base.weight.new_ones(self.out_features)) if magnitude else None
        self.scaling = scaling
        self.uniform_init = {"lora_A": 1 / math.sqrt(self.in_features)}  # Kaiming uniform with a = sqrt(5).
        self.constant_init = {"lora_B": 0.0}
        self.row_norm_init = {"magnitude": "weight"}
        self.masks: Dropout | None = None

    def forward(self, rows: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        masks = self.masks if self.training else None
        dropped = rows if masks is None else masks(rows, SubLayer.ATTENTION)
        update = F.linear(F.linear(dropped, self.lora_A), self.lora_B) * self.scaling
        if self.magnitude is None:
            return F.linear(rows, self.weight, self.bias) + update
        factor = self.magnitude / self._row_norms()
        if masks is None:
            scaled = (F.linear(rows, self.weight) + update) * factor
            return scaled if self.bias is None else scaled + self.bias
        # Dropout changes the part that the adapter adds to the plain layer, and nothing else.
        return F.linear(rows, self.weight, self.bias) + (factor - 1) * F.linear(dropped, self.weight) + factor * update

    @torch.no_grad()
    def _row_norms(self) -> Float[Tensor, " out_features"]:
        return torch.linalg.norm(torch.addmm(self.weight, self.lora_B, self.lora_A, alpha=self.scaling), dim=1)


def merged_rows(
    weight: Float[Tensor, "rows in_features"],
    lora_a: Float[Tensor, "rank in_features"],
    lora_b: Float[Tensor, "rows rank"],
    magnitude: Float[Tensor, " rows"] | None,
    scaling: float,
) -> Float[Tensor, "rows in_features"]:
    """Return rows of the weight of a plain layer that computes what the adapted layer computes in evaluation."""
    merged = torch.addmm(weight, lora_b, lora_a, alpha=scaling)
    return merged if magnitude is None else merged * (magnitude / torch.linalg.norm(merged, dim=1)).unsqueeze(1)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return the layers with adapters, by their path in ``model``."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that adapters add to a model; tied ones once."""
    layers: Iterable[AdaptedLinear] = adapted_layers(model).values()
    found = (getattr(layer, name) for layer in layers for name in ADAPTER_PARAMETERS)
    return list(dict.fromkeys(parameter for parameter in found if parameter is not None))
