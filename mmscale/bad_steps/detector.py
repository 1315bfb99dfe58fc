"""Detect bad steps: loss or gradient norm is not finite, or far above the values of the previous steps.

    x = log(loss), or log(gradient norm)                   both are positive and vary by factors
    threshold = exp(median(x) + k * max(1.4826 * MAD(x), 0.05))   over the last steps

Median and MAD (the median distance from the median) are robust until half of the window is bad. A mean and a standard
deviation would be shifted by the first spike and miss the second. The factor 1.4826 makes the MAD equal to the standard
deviation for normal x, so ``k`` counts standard deviations. It is ``loss_deviations`` or ``norm_deviations``. The floor
of 0.05 (five percent) is for windows with little variation, in which any change would count as a spike.

Values of rejected steps enter the window too. If the level has changed permanently (other data), the threshold follows,
unless the run halts first after ``max_in_row`` bad steps.

The decision is the same on all ranks, since loss and norm are. Not for: the consequence of a bad step
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
    """The consequence of a bad step."""

    SKIP = "skip"
    """Skip the update and continue with the next batch."""
    HALT = "halt"
    """End the run with an error message and exit code 1."""
    ROLL_BACK = "roll_back"
    """Restart from an earlier checkpoint, and skip the data since then."""


class BadStepsConfig(StrictConfig):
    """The ``bad_steps`` block of a run: which updates are rejected, on all ranks, and what happens then."""

    policy: Policy = Policy.SKIP
    """``skip`` the update, ``halt`` the run, or ``roll_back`` to a checkpoint and skip the data since then."""
    loss_deviations: float | None = Field(default=None, gt=0)
    """A loss is a spike if its logarithm is more than this many robust standard deviations above the median of the
    window; above 0. null: only a loss that is not finite is bad."""
    norm_deviations: float | None = Field(default=None, gt=0)
    """The same for the gradient norm before clipping."""
    window_steps: int = Field(default=128, ge=8, le=4096)
    """Number of steps in the window, 8 to 4096. A stage begins with an empty window."""
    min_steps: int = Field(default=32, ge=4)
    """Steps in the window before a step can count as a spike; 4 to ``window_steps``."""
    roll_back_steps: int = Field(default=10, ge=1)
    """``roll_back`` uses the newest checkpoint of the stage that is at least this many steps before the bad step; at
    least 1. If there is none, it uses the oldest checkpoint of the stage."""
    max_in_row: int = Field(default=10, ge=1)
    """Largest number of bad steps in a row with ``skip``, or of roll backs in a row without passing the furthest bad
    step; at least 1. One more ends the run, since the data are then unlikely to be the cause."""

    @model_validator(mode="after")
    def _check(self) -> BadStepsConfig:
        if self.min_steps > self.window_steps:
            raise ValueError(f"min_steps={self.min_steps} is more than window_steps={self.window_steps}")
        return self


@dataclass(frozen=True)
class BadStep:
    """Why a step is bad, and the thresholds for loss and gradient norm."""

    reason: str
    thresholds: Mapping[str, float | None]


def threshold(values: Iterable[float], deviations: float) -> float:
    """Return the largest value that is no spike compared with ``values``, which must be positive."""
    logs = [math.log(value) for value in values]
    center = median(logs)
    spread = _NORMAL * median(abs(x - center) for x in logs)
    return math.exp(center + deviations * max(spread, _FLOOR))


class SpikeDetector:
    """Compare each step with the steps before it.

    Args:
        config: The ``bad_steps`` block.
        state: The values that the method ``state`` returned; None at the beginning.

    Attributes:
        num_bad: Bad steps so far. After a roll back, those up to its checkpoint.
        in_row: Number of bad steps since the last good step.
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
        """Return the state as JSON values, for an exact resume."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "num_bad": self.num_bad,
            "in_row": self.in_row,
        }

    def begin_stage(self) -> None:
        """Empty the window: values of another stage are not comparable."""
        self._losses.clear()
        self._norms.clear()

    def thresholds(self) -> dict[str, float | None]:
        """Return the ``loss`` and ``grad_norm`` above which the next step is a spike; None without a limit.

        There is no limit if it is not configured, or before ``min_steps`` steps.
        """
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
            reason = "another rank rejected it"  # Possible if ranks with different hardware round the norm differently.
        bad = None if reason is None else BadStep(reason, self.thresholds())
        for values, value in ((self._losses, loss), (self._norms, norm)):
            if math.isfinite(value) and value > 0:
                values.append(value)
        self.num_bad += bad is not None
        self.in_row = self.in_row + 1 if bad is not None else 0
        return bad
