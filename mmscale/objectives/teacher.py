"""A frozen teacher for distillation: the student learns to predict the teacher's distribution of each token.

    batch --teacher's body--> rows -----------> SoftTarget --> the student's head computes the loss chunk by chunk
            teacher's head --> its matrices ----^

The teacher is not part of the student: it has no component and no optimizer state, and no checkpoint contains it. The
engine registers it in the module that it runs (``engine/graph.py``), so that ZeRO-3 shards it and gathers it block by
block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data_pipeline.batch import MultimodalBatch
from mmscale.models.flops import TrainingFlops
from mmscale.models.multimodal import MultimodalModel
from mmscale.models.vocabulary import LanguageHead
from mmscale.nn.cross_entropy import SoftTarget


class HeadMatrices(nn.Module):
    """Returns the matrices of a head, whole even under ZeRO-3.

    ZeRO-3 makes a parameter whole only during the forward pass of its module and frees it afterwards. A view returned
    from that forward pass keeps the values. Each matrix is therefore gathered once for all chunks of the loss.
    """

    extra_weight: nn.Parameter | None

    def __init__(self, head: LanguageHead) -> None:
        super().__init__()
        self.weight = head.weight
        self.register_parameter("extra_weight", head.extra_weight)

    def forward(self) -> tuple[Tensor, ...]:
        """Return the matrix ``(V, D)`` and that of the extra rows, if any.

        Under ZeRO-3, the memory of the whole matrices is in use until the caller drops the tensors.
        """
        matrices = (self.weight, self.extra_weight)
        return tuple(matrix.detach() for matrix in matrices if matrix is not None)


class Teacher(nn.Module):
    """A frozen model that is always in evaluation mode.

    Args:
        model: Runs on the student's batches. Mutated: none of its parameters requires a gradient afterwards.
        share: Share of the loss.
        temperature: Divides the logits of teacher and student.

    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2.
    """

    def __init__(self, model: MultimodalModel, share: float, temperature: float) -> None:
        super().__init__()
        self.model = model.requires_grad_(requires_grad=False)
        self.matrices = HeadMatrices(model.head)
        self.share = share
        self.temperature = temperature
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Keep evaluation mode, whatever ``mode`` is: a parent module may switch to training mode."""
        del mode
        return super().train(mode=False)

    @torch.no_grad()
    def forward(self, batch: MultimodalBatch) -> Tensor:
        """Return the rows before the head, ``(T, D of the teacher)``."""
        return self.model(batch).hidden

    @torch.no_grad()
    def soft_target(self, hidden: Tensor, row_losses: Tensor) -> SoftTarget:
        """Return the target for the student's head, from the result of ``forward``.

        Call it right before that head: the target holds the teacher's whole head matrices.
        """
        return SoftTarget(hidden, self.matrices(), self.share, self.temperature, row_losses)

    def units(self) -> Sequence[nn.Module]:
        """Return the blocks whose parameters ZeRO-3 should gather together."""
        return self.model.checkpoint_units()

    def flops(self, batch: MultimodalBatch) -> TrainingFlops:
        """Return the operations of the teacher's forward pass, with logits for the rows that carry loss."""
        return self.model.training_flops(batch, ())
