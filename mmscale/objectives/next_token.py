"""Next-token prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.batch import MultimodalBatch, Segments
from mmscale.models.multimodal import MultimodalModel
from mmscale.nn.cross_entropy import ZLoss
from mmscale.objectives.outputs import ObjectiveOutput


class NextToken:
    """Weighted cross-entropy of each next token, plus the model's auxiliary losses.

    Args:
        z_coefficient: Of the z loss on the logits (``ZLoss``); 0 for none.
    """

    def __init__(self, z_coefficient: float = 0.0) -> None:
        self.z_coefficient = z_coefficient

    def weight(self, batch: MultimodalBatch) -> float:
        """What ``loss_sum`` is to be divided by, known on the host before any forward."""
        return batch.weight

    def __call__(self, model: MultimodalModel, batch: MultimodalBatch) -> ObjectiveOutput:
        """Runs the model on one microbatch."""
        output = model(batch)
        rows = torch.zeros_like(batch.loss_weights)
        z_loss = ZLoss(self.z_coefficient, torch.zeros_like(rows)) if self.z_coefficient else None
        loss = model.head(output.hidden, batch.labels, batch.loss_weights, row_losses=rows, z_loss=z_loss)
        metrics = {"cross_entropy": loss.detach()}
        if z_loss is not None:
            metrics["softmax_z"] = z_loss.row_squares.sum()
            metrics["cross_entropy"] = loss.detach() - self.z_coefficient * metrics["softmax_z"]
        for name, aux in output.aux.items():
            scaled = aux.value * batch.weight
            loss = loss + aux.coefficient * scaled
            metrics[name] = scaled.detach()
        return ObjectiveOutput(loss, metrics, _segment_sums(rows, batch.segments))


def _segment_sums(rows: Tensor, segments: Segments) -> Tensor:
    """Sum of each segment's rows, in float32 and in a fixed order."""
    return torch.segment_reduce(rows, "sum", offsets=segments.cu.long())
