"""What models return."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class AuxLoss:
    """A loss beside the main one, averaged over the valid tokens of the batch.

    A main loss is a weighted sum over tokens, so an objective adds ``coefficient * value * batch.weight``: divided by
    the global weight that is the weighted mean over microbatches, the same however they are dealt to ranks.

    Attributes:
        value: Scalar, in the graph.
        coefficient: From the configuration.
    """

    value: Tensor
    coefficient: float


@dataclass(frozen=True)
class ModelOutput:
    """Result of a forward.

    Attributes:
        hidden: ``(T, D)``, after the last norm; ``model.head`` makes logits or a loss of it.
        aux: Auxiliary losses by name.
    """

    hidden: Tensor
    aux: dict[str, AuxLoss] = field(default_factory=dict)
