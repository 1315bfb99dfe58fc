"""The base class of objectives that other packages define; ``stages.N.objective`` selects one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar

from data_pipeline.batch import MultimodalBatch
from data_pipeline.io.own_code import OwnKinds
from data_pipeline.io.strict import StrictConfig
from mmscale.objectives.outputs import ObjectiveOutput


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
