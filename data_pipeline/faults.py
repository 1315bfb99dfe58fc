"""What happens to a bad sample: skip and count it, or stop.

A skipped sample's place is taken by the next sample of the same lane, so no other lane moves. Missing shards, stale
indices and disks that fail are never skipped: they are not about one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from pydantic import Field

from data_pipeline.errors import DataPipelineError, SampleError, TooManyFaultsError
from data_pipeline.strict import StrictConfig

R = TypeVar("R")


class OnError(str, Enum):
    """What a bad sample does."""

    SKIP = "skip"
    """It is left out, counted and reported with its reason."""
    FAIL = "fail"
    """It ends the run."""


class FaultConfig(StrictConfig):
    """Treatment of bad samples."""

    on_error: OnError = OnError.SKIP
    """``skip`` or ``fail``."""
    max_consecutive: int = Field(default=32, ge=1)
    """Bad samples in a row in one lane that end the run in spite of ``skip``: then it is not the samples."""


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out."""

    dataset: str
    index: int
    lane: int
    shard: str
    key: str
    reason: str


class FaultPolicy:
    """Runs the making of one document under the policy and counts faults in a row.

    Args:
        config: The policy.
        consecutive: Faults in a row so far (from a resume state).
    """

    def __init__(self, config: FaultConfig, consecutive: int = 0) -> None:
        self.config = config
        self.consecutive = consecutive

    def attempt(self, make: Callable[[], R], locate: Callable[[], tuple[str, str]]) -> R | SampleError:
        """What ``make`` returns, or the fault to report; ``locate`` gives shard and key for errors that name none.

        Raises:
            SampleError: the policy is ``fail``.
            TooManyFaultsError: too many faults in a row.
            DataPipelineError: whatever is not about one sample.
        """
        try:
            result = make()
        except SampleError as error:
            return self._fault(error)
        except (DataPipelineError, MemoryError):
            raise
        except Exception as error:  # A sample that breaks a library in a new way must not end a week of training.
            return self._fault(SampleError(f"{type(error).__name__}: {error}").located(*locate()))
        self.consecutive = 0
        return result

    def _fault(self, error: SampleError) -> SampleError:
        if self.config.on_error is OnError.FAIL:
            raise error
        self.consecutive += 1
        if self.consecutive >= self.config.max_consecutive:
            raise TooManyFaultsError(
                f"{self.consecutive} bad samples in a row (data.faults.max_consecutive={self.config.max_consecutive}); "
                f"the last: {error}"
            ) from error
        return error
