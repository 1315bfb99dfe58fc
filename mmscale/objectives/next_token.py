"""Next-token prediction."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from data_pipeline.batch import MultimodalBatch
from mmscale.models.multimodal import MultimodalModel


@dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective hands to the engine.

    Attributes:
        loss_sum: float32 scalar in the graph; the engine divides by the global weight.
        metrics: Detached sums by name, to be divided by the same weight.
    """

    loss_sum: Tensor
    metrics: dict[str, Tensor]


class NextToken:
    """Weighted cross-entropy of each next token, plus the model's auxiliary losses."""

    def weight(self, batch: MultimodalBatch) -> float:
        """What ``loss_sum`` is to be divided by, known on the host before any forward."""
        return batch.weight

    def __call__(self, model: MultimodalModel, batch: MultimodalBatch) -> ObjectiveOutput:
        """Runs the model on one microbatch."""
        output = model(batch)
        loss = model.head(output.hidden, labels=batch.labels, loss_weights=batch.loss_weights)
        metrics = {"cross_entropy": loss.detach()}
        for name, aux in output.aux.items():
            scaled = aux.value * batch.weight
            loss = loss + aux.coefficient * scaled
            metrics[name] = scaled.detach()
        return ObjectiveOutput(loss, metrics)
