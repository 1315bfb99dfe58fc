"""Results of a model's forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmscale.nn.router import RouterTensors


@dataclass(frozen=True)
class ModelOutput:
    """Result of a forward pass.

    Attributes:
        hidden: ``(T, D)``, after the final norm. ``model.head`` computes logits or the loss from it.
        router: Sums of the routers of all blocks, stacked, over the valid rows; None for a model without experts. An
            objective adds the losses of ``mmscale.objectives.router``.
    """

    hidden: Tensor
    router: RouterTensors | None = None
