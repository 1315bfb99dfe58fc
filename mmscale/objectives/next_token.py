"""Next-token prediction, with optional distillation from teachers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.batch import MultimodalBatch
from mmscale.models.multimodal import MultimodalModel
from mmscale.nn.cross_entropy import ZLoss
from mmscale.nn.moe import MoeConfig
from mmscale.objectives.base import ObjectiveOutput, WorldInfo
from mmscale.objectives.router import PreparedBatch, RouterLosses, StepTotals, needs_whole_load
from mmscale.objectives.teacher import Teacher


class NextToken:
    """Weighted cross-entropy of each next token, plus the losses of the model's routers.

    Each teacher replaces a share of the cross-entropy by the divergence from its prediction (``SoftTarget``). For a
    model that draws, the cross-entropy of codes of images and that of other tokens are also reported separately.

    Args:
        z_coefficient: Coefficient of the z loss on the logits (``ZLoss``); 0 for none.
        teachers: Frozen models that run on the same batches. The sum of their shares must be at most 1; not checked
            here.
        world: The ranks that share a step; None for one rank on the CPU. Used only for a model with experts, which
            raises ``ValueError`` in its first step if there are several ranks and no ``world``.
    """

    def __init__(
        self, z_coefficient: float = 0.0, teachers: Sequence[Teacher] = (), world: WorldInfo | None = None
    ) -> None:
        self.z_coefficient = z_coefficient
        self.teachers = tuple(teachers)
        self._router = RouterLosses(world)

    def weight(self, batch: MultimodalBatch) -> float:
        """Return the divisor of ``loss_sum``: the sum of the loss weights. Does not run the model."""
        return batch.weight

    def needs_prepare(self, model: MultimodalModel, num_microbatches: int) -> bool:
        """Return whether a step must go through ``prepare``: with experts, if there are several microbatches."""
        return num_microbatches > 1 and isinstance(model.config.decoder.mlp, MoeConfig)

    def prepare_runs(self, model: MultimodalModel, num_microbatches: int) -> bool:
        """Return whether ``prepare`` runs the model, to add up the loads of experts."""
        mlp = model.config.decoder.mlp
        return self.needs_prepare(model, num_microbatches) and isinstance(mlp, MoeConfig) and needs_whole_load(mlp)

    def prepare(
        self, model: MultimodalModel, microbatches: Sequence[MultimodalBatch]
    ) -> Sequence[MultimodalBatch | PreparedBatch]:
        """Return the microbatches of a step in the form that ``__call__`` needs; see ``RouterLosses.prepare``."""
        if not self.needs_prepare(model, len(microbatches)):
            return microbatches
        return self._router.prepare(model, microbatches)

    def __call__(self, model: MultimodalModel, batch: MultimodalBatch | PreparedBatch) -> ObjectiveOutput:
        """Run the teachers, then the model, on one microbatch and return the loss.

        All ranks must call. If a model with experts has several microbatches in a step, they must come from
        ``prepare``.
        """
        if isinstance(batch, PreparedBatch):
            return self._loss(model, batch.batch, batch.totals)
        return self._loss(model, batch, None)

    def _loss(self, model: MultimodalModel, batch: MultimodalBatch, totals: StepTotals | None) -> ObjectiveOutput:
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
            output.hidden,
            batch.labels,
            batch.loss_weights,
            row_losses=rows,
            z_loss=z_loss,
            soft_targets=soft,
            learned=batch.learned,
        )
        metrics = {"cross_entropy": rows.sum()}
        for number, target in enumerate(soft):
            name = "distillation" if len(soft) == 1 else f"distillation_{number}"
            metrics[name] = target.row_losses.sum()
        if z_loss is not None:
            metrics["softmax_z"] = z_loss.row_squares.sum()
        mlp = model.config.decoder.mlp
        if output.router is not None and isinstance(mlp, MoeConfig):
            router_loss, router_metrics = self._router.losses(mlp, output.router, batch, totals)
            loss = loss + router_loss
            metrics |= router_metrics
        # Sum of each segment's rows, in float32 and in a fixed order.
        segment_losses = torch.segment_reduce(rows, "sum", offsets=batch.segments.cu.long())
        parts = {} if model.config.decoder.image_tokens is None else _by_modality(rows, batch)
        return ObjectiveOutput(loss, metrics, segment_losses, output.router, parts=parts)


def _by_modality(rows: Tensor, batch: MultimodalBatch) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the weighted cross-entropy and the weight of codes of images, and of all other tokens."""
    image = batch.drawn_labels
    image = torch.zeros_like(batch.labels, dtype=torch.bool) if image is None else image
    masks = {"cross_entropy_text": image, "cross_entropy_image": ~image}
    return {
        name: (rows.masked_fill(other, 0).sum(), batch.loss_weights.masked_fill(other, 0).sum())
        for name, other in masks.items()
    }
