"""A frozen model whose predictions a student follows, token by token.

    batch --teacher's body--> rows ----------------------> SoftTarget --> the student's head: loss, a chunk at a time
            teacher's head ---> its matrices, for a moment -^

It is no part of the student: it has no component, no optimizer state, and is in no checkpoint. Whoever runs the student
registers it with a module of its own (``engine/graph.py``), so ZeRO-3 shards it and gathers it block by block.
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
    """Gives a head's matrices away, whole under ZeRO-3 too.

    There a parameter is whole inside its module's forward only. Then it loses its values, but a view keeps them. So
    both heads are whole while the loss is computed, and each was gathered once, however many chunks there are.
    """

    extra_weight: nn.Parameter | None

    def __init__(self, head: LanguageHead) -> None:
        super().__init__()
        self.weight = head.weight
        self.register_parameter("extra_weight", head.extra_weight)

    def forward(self) -> tuple[Tensor, ...]:
        """``(V, D)`` and, where the head has extra rows, those. They take memory until the last reference is gone."""
        matrices = (self.weight, self.extra_weight)
        return tuple(matrix.detach() for matrix in matrices if matrix is not None)


class Teacher(nn.Module):
    """A frozen model beside the student, always in evaluation mode.

    Args:
        model: Reads the student's batches; mutated: nothing of it learns.
        share: Of the loss.
        temperature: Of both distributions.

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
        """Stays in evaluation mode, whatever becomes of the modules around it."""
        del mode
        return super().train(mode=False)

    @torch.no_grad()
    def forward(self, batch: MultimodalBatch) -> Tensor:
        """The rows before the head, ``(T, D of the teacher)``."""
        return self.model(batch).hidden

    @torch.no_grad()
    def soft_target(self, hidden: Tensor, row_losses: Tensor) -> SoftTarget:
        """What the student's head needs of rows that ``forward`` gave. Call it right before that head."""
        return SoftTarget(hidden, self.matrices(), self.share, self.temperature, row_losses)

    def units(self) -> Sequence[nn.Module]:
        """Blocks that ZeRO-3 should gather as one."""
        return self.model.checkpoint_units()

    def flops(self, batch: MultimodalBatch) -> TrainingFlops:
        """Operations of its forward pass, with logits for the rows that carry loss."""
        return self.model.training_flops(batch, ())
