"""The last moment before an update: the gradient is reduced, its norm is known, nothing has moved.

    backward --DeepSpeed: norm of the whole gradient--> Gate: may it? --yes--> the optimizer's step
                                                                     --no--->  nothing

DeepSpeed computes the norm inside of its own ``step`` and calls the client optimizer right after, once for each group
of parameters (once for each sub-group at stage 3). So it is the client optimizer's ``step`` that is guarded: while it
does nothing, masters, moments and step counts stay as they are, and what DeepSpeed does afterwards (round the masters,
gather the weights) gives the same weights again. At stage 0 in fp32 there is no wrapper; the optimizer asks by itself.

The attribute ``_global_grad_norm`` was read in DeepSpeed 0.19; all its wrappers set it before they step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Question = Callable[[float], bool]
"""Whether a step whose gradient has this norm is refused."""


class Gate:
    """Stands between a DeepSpeed engine and its optimizer.

    Args:
        deepspeed_engine: What ``deepspeed.initialize`` returned.
    """

    def __init__(self, deepspeed_engine: Any) -> None:
        self._engine = deepspeed_engine
        self._question: Question | None = None
        self._refused: bool | None = None
        optimizer = deepspeed_engine.basic_optimizer
        if hasattr(optimizer, "refuses"):
            optimizer.refuses = self._refuses
        else:
            self._step = optimizer.step
            optimizer.step = self._guarded_step

    def step(self, question: Question | None) -> bool:
        """Lets DeepSpeed step. All ranks must call.

        Args:
            question: Asked once, when the norm is known and finite, with the same norm on all ranks; it may
                communicate. Not asked where DeepSpeed itself refuses the step for a norm that is not finite.

        Returns:
            Whether the answer was to refuse.
        """
        self._question, self._refused = question, None
        try:
            self._engine.step()
        finally:
            self._question = None
        return bool(self._refused)

    def _refuses(self, norm: float) -> bool:
        if self._refused is None:
            self._refused = self._question is not None and self._question(norm)
        return self._refused

    def _guarded_step(self, *arguments: Any, **options: Any) -> Any:
        if self._refuses(float(self._engine.optimizer._global_grad_norm)):
            return None
        return self._step(*arguments, **options)
