"""The module that DeepSpeed wraps: model and objective in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


class TeacherLike(Protocol):
    """A frozen module that an objective runs beside the model."""

    def units(self) -> Sequence[nn.Module]:
        """Blocks that ZeRO-3 should gather as one."""
        ...

    def flops(self, batch: Any) -> Any:
        """``model`` and ``hardware``: operations of its part in one microbatch."""
        ...


class ObjectiveLike(Protocol):
    """What the engine needs of an objective."""

    @property
    def teachers(self) -> Sequence[Any]:
        """Modules that are ``TeacherLike``; built with ``construct``, all parameters frozen."""
        ...

    def weight(self, batch: Any) -> float:
        """Weight of the microbatch, known on the host before the forward pass."""
        ...

    def __call__(self, model: Any, batch: Any) -> Any:
        """``loss_sum`` (scalar with graph), ``metrics`` (sums) and ``document_losses``, both without graph."""
        ...


@runtime_checkable
class SeesWholeStep(Protocol):
    """An objective whose loss of one microbatch depends on all others of the step."""

    def prepare(self, model: Any, microbatches: Sequence[Any]) -> Sequence[Any]:
        """Microbatches as the objective takes them, told what it must know of the others. All ranks must call.

        Args:
            model: In evaluation mode and without gradients; all ranks must make the same calls.
            microbatches: This rank's part of the step.
        """
        ...


class LossGraph(nn.Module):
    """Calls every sub-module of a training step inside one ``forward``.

    ZeRO-3 gathers and frees weights in hooks of module calls and learns their order from this module's forward; a head
    that were called outside of it would upset that order. Teachers are registered here and not with the model, so they
    are sharded and gathered with it and are no part of it.
    """

    def __init__(self, model: nn.Module, objective: ObjectiveLike) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.teachers = nn.ModuleList(objective.teachers)

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss summed over the microbatch, its metric sums, and the losses of its documents."""
        output = self.objective(self.model, batch)
        metrics = {name: value.detach() for name, value in output.metrics.items()}
        return output.loss_sum, metrics, output.document_losses.detach()
