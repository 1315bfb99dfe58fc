"""The result that an objective returns to the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

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
