"""The last moment before an update: the gradient is reduced, its norm is known, nothing has moved.

    backward --DeepSpeed: norm of the whole gradient--> Gate: may it? --yes--> (scale components) --> optimizer's step
                                                                     --no--->  nothing

DeepSpeed computes the norm inside of its own ``step`` and calls the client optimizer right after, once for each group
of parameters (once for each sub-group at stage 3). So it is the client optimizer's ``step`` that is guarded: while it
does nothing, masters, moments and step counts stay as they are, and what DeepSpeed does afterwards (round the masters,
gather the weights) gives the same weights again. At stage 0 in fp32 there is no wrapper; the optimizer asks by itself.

It is also where components are clipped on their own. Whatever the stage, the format, the optimizer or where its state
rests, the gradient that the client optimizer is about to read lies in ``grad`` of what is in its groups now: averaged,
freed of the loss scale, fp32, read once and dropped. And each group belongs to one component.

The attribute ``_global_grad_norm`` was read in DeepSpeed 0.19; all its wrappers set it before they step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Question = Callable[[float], bool]
"""Whether a step whose gradient has this norm is refused."""


class Gate:
    """Stands between a DeepSpeed engine and its optimizer.

    Args:
        deepspeed_engine: What ``deepspeed.initialize`` returned.
    """

    def __init__(self, deepspeed_engine: Any) -> None:
        self._engine = deepspeed_engine
        self._optimizer = deepspeed_engine.basic_optimizer
        self._question: Question | None = None
        self._factors: Mapping[str, float] = {}
        self._refused: bool | None = None
        if hasattr(self._optimizer, "permits"):
            self._optimizer.permits = self._permits
        else:
            self._step = self._optimizer.step
            self._optimizer.step = self._guarded_step

    def step(self, question: Question | None, factors: Mapping[str, float]) -> bool:
        """Lets DeepSpeed step. All ranks must call.

        Args:
            question: Asked once, when the norm is known and finite, with the same norm on all ranks; it may
                communicate. Not asked where DeepSpeed itself refuses the step for a norm that is not finite.
            factors: By component, what its gradient is multiplied with before the optimizer sees it; 1 where none is.

        Returns:
            Whether the answer was to refuse.
        """
        self._question, self._factors, self._refused = question, factors, None
        try:
            self._engine.step()
        finally:
            self._question = None
        return bool(self._refused)

    def _permits(self, norm: float) -> bool:
        """Whether what is in the optimizer's groups now may be stepped; if so, its gradient is scaled."""
        if self._refused is None:
            self._refused = self._question is not None and self._question(norm)
        if not self._refused:
            for group in self._optimizer.param_groups:
                gradients = [values.grad for values in group["params"] if values.grad is not None]
                factor = self._factors.get(group["component"], 1.0)
                if gradients and factor != 1.0:
                    torch._foreach_mul_(gradients, factor)
        return not self._refused

    def _guarded_step(self, *arguments: Any, **options: Any) -> Any:
        if not self._permits(float(self._engine.optimizer._global_grad_norm)):
            return None
        return self._step(*arguments, **options)
