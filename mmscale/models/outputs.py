"""Results of a model's forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class AuxLoss:
    """An auxiliary loss, averaged over the valid tokens of the batch.

    The main loss is a weighted sum over tokens, so an objective adds ``coefficient * value * batch.weight``. Divided by
    the global weight, this is the weighted mean over all microbatches, whichever ranks process them.

    Attributes:
        value: Scalar with gradient.
        coefficient: Weight of the loss, from the configuration.
    """

    value: Tensor
    coefficient: float


@dataclass(frozen=True)
class ModelOutput:
    """Result of a forward pass.

    Attributes:
        hidden: ``(T, D)``, after the final norm. ``model.head`` computes logits or the loss from it.
        aux: Auxiliary losses by name.
    """

    hidden: Tensor
    aux: dict[str, AuxLoss] = field(default_factory=dict)
