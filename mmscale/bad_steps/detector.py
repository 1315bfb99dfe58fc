"""Which steps are bad: not finite, or far above what the steps before were like.

    x = log(loss), or log(gradient norm)                   both are positive and vary by factors
    threshold = exp(median(x) + k * max(1.4826 * MAD(x), 0.05))   over the last steps

Median and MAD (the median distance from the median) hold until half of the window is bad, while a mean and a
standard deviation are carried away by the first spike and hide the second. 1.4826 makes the MAD the standard deviation
where x is normal, so ``k`` counts standard deviations. The floor of 0.05 (five percent) is for windows that hardly
vary: without it the MAD of a flat curve would call any movement a spike. Refused values enter the window too: where the
level has moved for good (other data), the threshold follows, or the run has halted after ``max_in_row`` steps.

For: the decision, which is the same on all ranks since loss and norm are. Not for: what follows from it
(``mmscale.run.train``).

Source: Leys et al. 2013, "Detecting outliers: Do not use standard deviation around the mean, use absolute deviation
around the median".
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import Any

from pydantic import Field, model_validator

from data_pipeline.io.strict import StrictConfig

_NORMAL = 1.4826
"""Standard deviation over MAD of a normal distribution: 1 / Phi^-1(3/4)."""
_FLOOR = 0.05


class Policy(str, Enum):
    """What a bad step does."""

    SKIP = "skip"
    """Its update is left out; the run goes on with the next batch."""
    HALT = "halt"
    """It ends the run with a sentence and exit code 1."""
    ROLL_BACK = "roll_back"
    """The run goes back to a checkpoint, and the data since are left out."""


class BadStepsConfig(StrictConfig):
    """Steps whose update is refused, on all ranks together, before it is made."""

    policy: Policy = Policy.SKIP
    """``skip`` the update, ``halt`` the run, or ``roll_back`` to a checkpoint and leave out the data since."""
    loss_deviations: float | None = Field(default=None, gt=0)
    """A loss that lies this many robust standard deviations above the median of the window, in logarithms, is a spike;
    null: only a loss that is not finite is bad."""
    norm_deviations: float | None = Field(default=None, gt=0)
    """The same for the gradient's norm before clipping."""
    window_steps: int = Field(default=128, ge=8, le=4096)
    """Steps that the median is taken over; a stage begins with an empty window."""
    min_steps: int = Field(default=32, ge=4)
    """Steps in the window before anything counts as a spike; at most ``window_steps``."""
    roll_back_steps: int = Field(default=10, ge=1)
    """``roll_back`` goes to the newest checkpoint at least this many steps before the bad one, within the stage."""
    max_in_row: int = Field(default=10, ge=1)
    """Bad steps in a row that ``skip`` bears, or roll backs without getting further than ever before; one more ends the
    run: then it is not the data."""

    @model_validator(mode="after")
    def _check(self) -> BadStepsConfig:
        if self.min_steps > self.window_steps:
            raise ValueError(f"min_steps={self.min_steps} is more than window_steps={self.window_steps}")
        return self


@dataclass(frozen=True)
class BadStep:
    """Why a step is bad, and the thresholds that it was compared with."""

    reason: str
    thresholds: Mapping[str, float | None]


def threshold(values: Iterable[float], deviations: float) -> float:
    """The largest value that is no spike beside ``values``, all positive."""
    logs = [math.log(value) for value in values]
    center = median(logs)
    spread = _NORMAL * median(abs(x - center) for x in logs)
    return math.exp(center + deviations * max(spread, _FLOOR))


class SpikeDetector:
    """Compare each step with the steps before it.

    Args:
        config: The ``bad_steps`` block.
        state: What ``state`` gave; empty at the beginning.

    Attributes:
        num_bad: Steps that were refused, in this run and line of checkpoints.
        in_row: Of them the last ones without a good step between.
    """

    def __init__(self, config: BadStepsConfig, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self._config = config
        self._has_limits = config.loss_deviations is not None or config.norm_deviations is not None
        self._losses: deque[float] = deque(state.get("losses", ()), config.window_steps)
        self._norms: deque[float] = deque(state.get("norms", ()), config.window_steps)
        self.num_bad = int(state.get("num_bad", 0))
        self.in_row = int(state.get("in_row", 0))

    def state(self) -> dict[str, Any]:
        """JSON values to go on from, exactly."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "num_bad": self.num_bad,
            "in_row": self.in_row,
        }

    def begin_stage(self) -> None:
        """Forgets the window: losses and norms of another stage are no measure."""
        self._losses.clear()
        self._norms.clear()

    def thresholds(self) -> dict[str, float | None]:
        """``loss`` and ``grad_norm`` above which the next step is a spike; None where there is no limit (yet)."""
        limits = (self._losses, self._config.loss_deviations), (self._norms, self._config.norm_deviations)
        loss, norm = (
            threshold(values, deviations) if deviations is not None and len(values) >= self._config.min_steps else None
            for values, deviations in limits
        )
        return {"loss": loss, "grad_norm": norm}

    def reason(self, loss: float, norm: float) -> str | None:
        """Return why a step is bad, or None. Changes nothing."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"the {name} is not finite"
        if not self._has_limits:
            return None
        limits = self.thresholds()
        for name, value, limit in (("loss", loss, limits["loss"]), ("gradient norm", norm, limits["grad_norm"])):
            if limit is not None and value > limit:
                return f"the {name} of {value:.4g} is a spike: above {limit:.4g}"
        return None

    def record(self, loss: float, norm: float, applied: bool) -> BadStep | None:
        """Add a step that had weight to the window. Return why it was bad, or None."""
        reason = self.reason(loss, norm)
        if reason is None and not applied:
            reason = "another rank found it bad"  # Only where ranks of different hardware round the norm differently.
        bad = None if reason is None else BadStep(reason, self.thresholds())
        for values, value in ((self._losses, loss), (self._norms, norm)):
            if math.isfinite(value) and value > 0:
                values.append(value)
        self.num_bad += bad is not None
        self.in_row = self.in_row + 1 if bad is not None else 0
        return bad
