"""What happens to a bad sample: skip it, put it on a list, or stop.

    sample --known?--> make --raises--> kind --FaultConfig--> skip | quarantine | fail,  limits --> TooManyFaultsError

A skipped sample's place is taken by the next sample of the same lane, so no other lane moves. The counters belong to a
lane, count in the lane's own order and are part of its resume state, so a run gives up at the same sample whatever the
number of ranks and workers, resumed or not.

Why a quarantine list that grows while the run reads changes no batch: what ``known`` recalls fails just as it would if
it were tried, with the same kind and reason, counted alike. So it makes no difference which process knows which sample,
and a list that is lost, cut short or read late costs time only. This holds for what follows from the stored bytes
alone, ``checksum`` and ``decode``, so nothing else is recalled. A ``text``, ``document`` or ``unexpected`` fault may
depend on what the epoch draws (another caption, another crop), and a lane cannot know what another lane, in another
process, found out in an earlier epoch: such a sample is listed, and tried again. To leave it out for good, a run takes
the list as ``exclude`` from its first step on; the list is then a part of its fingerprint. Not for: what is known of a
sample or a shard (``KnownFaults``).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from pydantic import Field

from data_pipeline.errors import (
    DataPipelineError,
    FaultKind,
    ManifestError,
    SampleError,
    ShardError,
    StateError,
    TooManyFaultsError,
    out_of_memory,
)
from data_pipeline.io.strict import StrictConfig

R = TypeVar("R")

LASTING = frozenset({FaultKind.CHECKSUM, FaultKind.DECODE})
"""Kinds that follow from the stored bytes alone: trying again would end alike."""


class Action(str, Enum):
    """What a bad sample does."""

    SKIP = "skip"
    """It is left out, counted and reported with its reason."""
    QUARANTINE = "quarantine"
    """The same, and it is written on the list of the run; where trying again is futile, it is not tried again."""
    FAIL = "fail"
    """It ends the run."""


class ShardAction(str, Enum):
    """What a shard that cannot be used does."""

    SKIP = "skip"
    """Its samples are left out, counted and reported; a lost shard is not opened again by the process that lost it."""
    FAIL = "fail"
    """It ends the run."""


class FaultConfig(StrictConfig):
    """Treatment of bad samples and lost shards."""

    on_error: Action = Action.SKIP
    """``skip``, ``quarantine`` or ``fail``: for every kind of fault below without a line of its own."""
    checksum: Action | None = None
    """Bytes that changed since they were indexed."""
    decode: Action | None = None
    """An image that cannot be decoded or is refused."""
    text: Action | None = None
    """Damaged text or JSON, a missing field, an empty answer."""
    no_image: Action | None = None
    """A sample without an image under a template that requires one (``template.images``)."""
    document: Action | None = None
    """A sample that makes no document or fits into no pack."""
    unexpected: Action | None = None
    """An exception that nobody foresaw."""
    shard: ShardAction = ShardAction.FAIL
    """A shard that is missing, stale, truncated or unreadable: ``fail``, or ``skip`` its samples."""
    max_consecutive: int = Field(default=32, ge=1)
    """Bad samples in a row in one lane that end the run all the same: then it is not the samples. Samples of lost
    shards are left out of this count."""
    max_share: float = Field(default=0.25, gt=0, le=1)
    """Share of bad ones among the last ``share_window`` samples of a lane above which the run ends; and the share of a
    data set's samples that may be in lost shards."""
    share_window: int = Field(default=256, ge=1, le=65536)
    """Samples of a lane over which ``max_share`` is measured."""
    exclude: tuple[Path, ...] = ()
    """Lists of earlier runs over the same manifests (``RUN/faults``, or files of it) or of ``mmscale data dedup``: what
    they name is left out from the first step on."""

    def action(self, kind: FaultKind) -> Action:
        """What a fault of this kind does."""
        if kind is FaultKind.EXCLUDED:
            return Action.SKIP
        own: Action | ShardAction | None = getattr(self, kind.value)
        return self.on_error if own is None else Action(own.value)

    def quarantines(self, kind: FaultKind) -> bool:
        """Whether samples with this fault need not be tried again, once they are known."""
        return kind in LASTING and self.action(kind) is Action.QUARANTINE


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out.

    Attributes:
        offset: First byte of the sample in its shard; None if the shard is lost or streamed.
        action: ``skip`` or ``quarantine``.
        again: Whether this process knew it for bad, and did not try it. The only thing here that depends on workers.
    """

    dataset: str
    epoch: int
    index: int
    lane: int
    shard: str
    key: str
    kind: FaultKind
    reason: str
    offset: int | None = None
    action: Action = Action.SKIP
    again: bool = field(default=False, compare=False)

    def record(self) -> dict[str, str | int | None]:
        """What a list of faults says of it: a JSON object without time, equal in every run over the same data."""
        return {
            "dataset": self.dataset,
            "epoch": self.epoch,
            "index": self.index,
            "lane": self.lane,
            "shard": self.shard,
            "key": self.key,
            "offset": self.offset,
            "kind": self.kind.value,
            "reason": self.reason,
        }


class Fault(NamedTuple):
    """A fault and how it is treated.

    ``counts`` says whether it is about this sample: those of a lost shard say nothing about how the samples are.
    """

    error: SampleError
    counts: bool = True
    again: bool = False


class KnownFaults(Protocol):
    """What a process knows of the bad samples of one data set; samples are named by their number."""

    def recall(self, sample: int) -> Fault | None:
        """A fault that trying would only show again."""

    def locate(self, sample: int) -> tuple[str, str]:
        """Shard and key, for errors that name none."""

    def offset(self, sample: int) -> int | None:
        """First byte of the sample in its shard, if anybody knows."""

    def shard_failed(self, sample: int, error: ShardError | ManifestError) -> Fault:
        """Takes note that the sample's shard could not be opened or read.

        Raises:
            TooManyFaultsError: too much of the data set is lost.
        """

    def keep(self, sample: int, error: SampleError) -> None:
        """Takes note of a fault that trying again would show again."""

    def succeeded(self, sample: int) -> None:
        """Takes note that the sample could be read."""


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

    def attempt(self, make: Callable[[], R], known: KnownFaults, sample: int) -> R | Fault:
        """What ``make`` returns, or the fault to report.

        Args:
            make: Makes the document of a sample.
            known: Knows the data set's faults, and is told what becomes of this sample.
            sample: Number of the sample.

        Raises:
            SampleError: the policy for its kind is ``fail``.
            ShardError, ManifestError: the shard cannot be used, and the policy for that is ``fail``.
            TooManyFaultsError: too many faults, in a row or of the last samples, or too much of a data set is lost.
            DataPipelineError: whatever is not about a sample or a shard.
        """
        fault = known.recall(sample)
        if fault is None:
            try:
                result = make()
            except Exception as error:
                if out_of_memory(error) is not None:
                    raise  # The sample is not to blame, and to leave it out would change the order.
                fault = self._fault_of(error, known, sample)
                _drop_frames(error)
        if fault is None:
            known.succeeded(sample)
            self._count()
            self._consecutive = 0
            return result
        return self._fault(fault, known, sample)

    def _fault_of(self, error: Exception, known: KnownFaults, sample: int) -> Fault:
        """What an error is to the sample; raises it if it is none of the sample's or of the shard's."""
        if isinstance(error, SampleError):
            return Fault(error)
        if isinstance(error, ShardError | ManifestError) and self.config.shard is not ShardAction.FAIL:
            return known.shard_failed(sample, error)
        if isinstance(error, DataPipelineError):
            raise error
        # A sample that breaks a library in a new way must not end a week of training.
        reason = f"{type(error).__name__}: {error}"
        return Fault(SampleError(reason, kind=FaultKind.UNEXPECTED).located(*known.locate(sample)))

    def skipped(
        self, fault: Fault, dataset: str, epoch: int, index: int, lane: int, offset: int | None = None
    ) -> Skipped:
        """The line that reports a fault."""
        error = fault.error
        place = (dataset, epoch, index, lane, error.shard, error.key)
        return Skipped(*place, error.kind, error.reason, offset, self.config.action(error.kind), fault.again)

    def _count(self) -> None:
        self._seen += 1
        while self._faults and self._seen - self._faults[0] >= self.config.share_window:
            self._faults.popleft()

    def _fault(self, fault: Fault, known: KnownFaults, sample: int) -> Fault:
        action = self.config.action(fault.error.kind)
        if action is Action.FAIL:
            raise fault.error
        if action is Action.QUARANTINE and fault.error.kind in LASTING and not fault.again:
            known.keep(sample, fault.error)
        if fault.counts:
            self._count()
            self._faults.append(self._seen)
            self._consecutive += 1
            self._check_limits(fault.error)
        return fault

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


def _drop_frames(error: BaseException | None) -> None:
    """Lets go of all that was under way when an error was raised, packs of pixels among it: its complaint is kept."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
