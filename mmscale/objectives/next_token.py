"""Next-token prediction, with optional distillation from teachers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from data_pipeline.batch import MultimodalBatch
from mmscale.models.multimodal import MultimodalModel
from mmscale.nn.cross_entropy import ZLoss
from mmscale.objectives.outputs import ObjectiveOutput
from mmscale.objectives.teacher import Teacher


class NextToken:
    """Weighted cross-entropy of each next token, plus the model's auxiliary losses.

    Each teacher replaces a share of the cross-entropy by the divergence from its prediction (``SoftTarget``).

    Args:
        z_coefficient: Coefficient of the z loss on the logits (``ZLoss``); 0 for none.
        teachers: Frozen models that run on the same batches. The sum of their shares must be at most 1; not checked
            here.
    """

    def __init__(self, z_coefficient: float = 0.0, teachers: Sequence[Teacher] = ()) -> None:
        self.z_coefficient = z_coefficient
        self.teachers = tuple(teachers)

    def weight(self, batch: MultimodalBatch) -> float:
        """Return the divisor of ``loss_sum``: the sum of the loss weights. Does not run the model."""
        return batch.weight

    def __call__(self, model: MultimodalModel, batch: MultimodalBatch) -> ObjectiveOutput:
        """Run the teachers, then the model, on one microbatch and return the loss."""
        # Run the teachers first: their activations are freed before the student's are stored for its backward pass.
        teacher_hidden = [teacher(batch) for teacher in self.teachers]
        output = model(batch)
        rows = torch.zeros_like(batch.loss_weights)
        z_loss = ZLoss(self.z_coefficient, torch.zeros_like(rows)) if self.z_coefficient else None
        soft = [
            teacher.soft_target(hidden, torch.zeros_like(rows))
            for teacher, hidden in zip(self.teachers, teacher_hidden, strict=True)
        ]
        loss = model.head(
            output.hidden, batch.labels, batch.loss_weights, row_losses=rows, z_loss=z_loss, soft_targets=soft
        )
        metrics = {"cross_entropy": rows.sum()}
        for number, target in enumerate(soft):
            name = "distillation" if len(soft) == 1 else f"distillation_{number}"
            metrics[name] = target.row_losses.sum()
        if z_loss is not None:
            metrics["softmax_z"] = z_loss.row_squares.sum()
        for name, aux in output.aux.items():
            scaled = aux.value * batch.weight
            loss = loss + aux.coefficient * scaled
            metrics[name] = scaled.detach()
        # Sum of each segment's rows, in float32 and in a fixed order.
        segment_losses = torch.segment_reduce(rows, "sum", offsets=batch.segments.cu.long())
        return ObjectiveOutput(loss, metrics, segment_losses)
