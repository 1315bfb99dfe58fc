"""What objectives share: their result, and the ranks that share a step; the base class of those of other packages.

``stages.N.objective`` selects an objective of another package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from data_pipeline.batch import MultimodalBatch
from data_pipeline.io.own_code import OwnKinds
from data_pipeline.io.strict import StrictConfig
from mmscale.nn.router import RouterTensors


@dataclass(frozen=True)
class ObjectiveOutput:
    """Loss and metrics of one microbatch.

    Attributes:
        loss_sum: float32 scalar with gradient. The engine divides it by the weight of the whole step.
        metrics: Detached sums by name. The engine divides them by the same weight.
        document_losses: float32 ``(S,)``, detached. The next-token objective gives the weighted cross-entropy of each
            document, without auxiliary losses, z loss or teachers. The contrastive objective gives each pair's term of
            ``loss_sum``, at the pair's text segment.
        router: Sums of the model's routers (``ModelOutput.router``), which the engine reports and from which it moves
            the routers' biases. None for a model without experts.
        statistics: int64 or float64 tensors of any shapes: sums that the engine adds over all microbatches and ranks
            and passes to the objective's ``after_step``. The engine reads them after the backward pass, which may
            change them. Empty for an objective without this method.
        parts: Parts of the loss with weights of their own: detached ``(sum, weight)`` by name, the same names in every
            microbatch of a run. The engine reports the quotient over the whole step, and nothing if the weight is 0.
    """

    loss_sum: Tensor
    metrics: dict[str, Tensor]
    document_losses: Tensor
    router: RouterTensors | None = None
    statistics: tuple[Tensor, ...] = ()
    parts: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@runtime_checkable
class WorldInfo(Protocol):
    """The ranks that share a step, and the device of this rank's model. ``mmscale.dist.World`` implements it."""

    @property
    def rank(self) -> int: ...
    @property
    def device(self) -> torch.device: ...

    def gather_rows(self, rows: Tensor) -> list[Tensor]:
        """Return the rows of every rank, by rank. Ranks may have different numbers of rows. All ranks must call."""
        ...


class OneRank:
    """The only rank of a step, on the CPU."""

    rank, device = 0, torch.device("cpu")

    def gather_rows(self, rows: Tensor) -> list[Tensor]:
        """Return ``[rows]``.

        Raises:
            ValueError: this process is one of several ranks.
        """
        if torch.distributed.is_initialized() and (ranks := torch.distributed.get_world_size()) > 1:
            raise ValueError(
                f"{ranks} ranks share a step, but the objective would use the rows of one: build it with "
                "world=, the result of mmscale.dist.init_distributed"
            )
        return [rows]


class ObjectiveBase(StrictConfig, ABC):
    """Settings and loss of an objective. A subclass has a field for each setting."""

    kind: str
    """Path of the class, ``module:attr``, or the name of its entry point."""
    teachers: ClassVar[tuple[Any, ...]] = ()
    """Always empty: teachers belong to the next-token objective (``stages.N.distill``)."""

    def weight(self, batch: MultimodalBatch) -> float:
        """Return the divisor of ``loss_sum``: by default the sum of the loss weights. Must not run the model."""
        return batch.weight

    @abstractmethod
    def __call__(self, model: Any, batch: MultimodalBatch) -> ObjectiveOutput:
        """Run the model on one microbatch and return the loss."""


OwnObjective = Annotated[ObjectiveBase, OwnKinds(ObjectiveBase, "mmscale.objectives")]
