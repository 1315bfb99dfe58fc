"""What an objective hands to the engine."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ObjectiveOutput:
    """What came of one microbatch.

    Attributes:
        loss_sum: float32 scalar in the graph; the engine divides by the global weight.
        metrics: Detached sums by name, to be divided by the same weight.
        document_losses: float32 ``(S,)``, detached: the weighted cross-entropy of each document, whatever else is in
            the sum; of pairs what each adds to it.
    """

    loss_sum: Tensor
    metrics: dict[str, Tensor]
    document_losses: Tensor
