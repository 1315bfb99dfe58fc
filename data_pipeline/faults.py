"""What happens to a bad sample: skip and count it, or stop.

A skipped sample's place is taken by the next sample of the same lane, so no other lane moves. Missing shards, stale
indices and disks that fail are never skipped: they are not about one sample.

The counters belong to a lane, count in the lane's own order and are part of its resume state, so a run gives up at the
same sample whatever the number of ranks and workers, resumed or not.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from pydantic import Field

from data_pipeline.errors import DataPipelineError, FaultKind, SampleError, StateError, TooManyFaultsError
from data_pipeline.strict import StrictConfig

R = TypeVar("R")


class Action(str, Enum):
    """What a bad sample does."""

    SKIP = "skip"
    """It is left out, counted and reported with its reason."""
    FAIL = "fail"
    """It ends the run."""


class FaultConfig(StrictConfig):
    """Treatment of bad samples."""

    on_error: Action = Action.SKIP
    """``skip`` or ``fail``: for every kind of fault without a line of its own."""
    checksum: Action | None = None
    """Bytes that changed since they were indexed."""
    decode: Action | None = None
    """An image that cannot be decoded or is refused."""
    text: Action | None = None
    """Damaged text or JSON, a missing field, an empty answer."""
    document: Action | None = None
    """A sample that makes no document or fits into no pack."""
    unexpected: Action | None = None
    """An exception that nobody foresaw."""
    max_consecutive: int = Field(default=32, ge=1)
    """Bad samples in a row in one lane that end the run in spite of ``skip``: then it is not the samples."""
    max_share: float = Field(default=0.25, gt=0, le=1)
    """Share of bad ones among the last ``share_window`` samples of a lane above which the run ends; 1 never does."""
    share_window: int = Field(default=256, ge=1, le=65536)
    """Samples over which ``max_share`` is measured."""

    def action(self, kind: FaultKind) -> Action:
        """What a fault of this kind does."""
        own: Action | None = getattr(self, kind.value)
        return self.on_error if own is None else own


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out."""

    dataset: str
    epoch: int
    index: int
    lane: int
    shard: str
    key: str
    kind: FaultKind
    reason: str


class FaultPolicy:
    """Runs the making of one document under the policy and counts the faults of one lane.

    Args:
        config: The policy.
        state: What ``state`` gave; empty at the beginning of a run.

    Raises:
        StateError: ``state`` is not of this form.
    """

    def __init__(self, config: FaultConfig, state: tuple[int, ...] = ()) -> None:
        self.config = config
        self._consecutive = state[0] if state else 0
        ages = state[1:]
        if min(state, default=0) < 0 or any(a >= b for a, b in itertools.pairwise(ages)):
            raise StateError(f"fault counters {state[:8]}: expected a count and rising ages of faults")
        self._seen = 0
        self._faults = deque(-age for age in reversed(ages) if age < config.share_window)

    def state(self) -> tuple[int, ...]:
        """Faults in a row, then how many samples ago each fault of the window was, latest first."""
        return (self._consecutive, *(self._seen - at for at in reversed(self._faults)))

    def attempt(self, make: Callable[[], R], locate: Callable[[], tuple[str, str]]) -> R | SampleError:
        """What ``make`` returns, or the fault to report; ``locate`` gives shard and key for errors that name none.

        Raises:
            SampleError: the policy for its kind is ``fail``.
            TooManyFaultsError: too many faults, in a row or of the last samples.
            DataPipelineError: whatever is not about one sample.
        """
        try:
            result = make()
        except SampleError as error:
            return self._fault(error)
        except (DataPipelineError, MemoryError):
            raise
        except Exception as error:  # A sample that breaks a library in a new way must not end a week of training.
            reason = f"{type(error).__name__}: {error}"
            return self._fault(SampleError(reason, kind=FaultKind.UNEXPECTED).located(*locate()))
        self._count()
        self._consecutive = 0
        return result

    def _count(self) -> None:
        self._seen += 1
        while self._faults and self._seen - self._faults[0] >= self.config.share_window:
            self._faults.popleft()

    def _fault(self, error: SampleError) -> SampleError:
        if self.config.action(error.kind) is Action.FAIL:
            raise error
        self._count()
        self._faults.append(self._seen)
        self._consecutive += 1
        self._check_limits(error)
        return error

    def _check_limits(self, error: SampleError) -> None:
        config = self.config
        if self._consecutive >= config.max_consecutive:
            raise TooManyFaultsError(
                f"{self._consecutive} bad samples in a row (data.faults.max_consecutive={config.max_consecutive}); "
                f"the last: {error}"
            ) from error
        if len(self._faults) > config.max_share * config.share_window:
            raise TooManyFaultsError(
                f"{len(self._faults)} of the last {config.share_window} samples of a lane were bad "
                f"(data.faults.max_share={config.max_share:g}); the last: {error}"
            ) from error
