"""Treatment of bad samples: skip them, list them, or stop the run.

    sample --known?--> make --raises--> kind --FaultConfig--> skip | quarantine | fail,  limits --> TooManyFaultsError

The next sample of the same lane replaces a skipped one, so other lanes are not affected. Each lane has its own fault
counters, in the order of its samples, and they are part of its resume state. A run therefore gives up at the same
sample for any number of ranks and workers, resumed or not. Lost shards are an exception: each process counts failed
reads and lost shards itself.

A quarantine list that grows during a run changes no batch. A remembered fault has the same kind, reason and count as
the fault of a new attempt, so it does not matter which process remembers which sample. A lost or truncated list costs
time only. This requires that the fault follows from the stored bytes alone, so only ``checksum`` and ``decode`` faults
are remembered. A ``text``, ``document`` or ``unexpected`` fault may depend on random choices of the epoch, such as the
caption or the crop. A sample with such a fault is listed and tried again. To exclude it for good, start a new run with
the list in ``data.faults.exclude``; the list is then part of the run's fingerprint. Not for: storage of known faults
(``KnownFaults``).
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
"""Kinds of faults that follow from the stored bytes alone, so that another attempt fails in the same way."""


class Action(str, Enum):
    """Treatment of a bad sample."""

    SKIP = "skip"
    """Skip the sample, count it, and report it with its reason."""
    QUARANTINE = "quarantine"
    """As ``skip``, and add the sample to the run's quarantine list; after a ``checksum`` or ``decode`` fault the sample
    is not tried again."""
    FAIL = "fail"
    """Stop the run."""


class ShardAction(str, Enum):
    """Treatment of a shard that cannot be read."""

    SKIP = "skip"
    """Skip and report its samples. A process does not open a lost shard again."""
    FAIL = "fail"
    """Stop the run."""


class FaultConfig(StrictConfig):
    """Treatment of bad samples and lost shards."""

    on_error: Action = Action.SKIP
    """Treatment of the kinds of faults below that are null: ``skip`` the sample, also list it (``quarantine``), or stop
    the run (``fail``)."""
    checksum: Action | None = None
    """The bytes of the sample changed since they were indexed."""
    decode: Action | None = None
    """An image cannot be decoded or is too large."""
    text: Action | None = None
    """Text or JSON is malformed, a field is missing, or an answer is empty."""
    no_image: Action | None = None
    """The sample has no image, and its template (``template.images``) or a contrastive model requires one."""
    document: Action | None = None
    """The sample gives no valid document, or one that no pack can hold."""
    unexpected: Action | None = None
    """Another exception, for example of a library."""
    shard: ShardAction = ShardAction.FAIL
    """A shard is missing, stale, truncated or unreadable: stop the run (``fail``), or ``skip`` its samples."""
    max_consecutive: int = Field(default=32, ge=1)
    """The run stops after this many bad samples in a row in one lane, because single samples are then unlikely to be
    the cause. Excluded samples and those of lost shards do not count."""
    max_share: float = Field(default=0.25, gt=0, le=1)
    """The run stops if more than this share of the last ``share_window`` samples of a lane were bad. It also stops if
    lost shards contain more than this share of a data set's samples, or all of them. For a data set without a manifest,
    the share of lost shards counts instead."""
    share_window: int = Field(default=256, ge=1, le=65536)
    """Number of samples of a lane over which ``max_share`` is measured."""
    exclude: tuple[Path, ...] = ()
    """Lists of samples that the run excludes from its first step on: ``RUN/faults`` of an earlier run over the same
    manifests, files of it, or lists of ``mmscale data dedup``."""

    def action(self, kind: FaultKind) -> Action:
        """Return the treatment of a kind of fault."""
        if kind is FaultKind.EXCLUDED:
            return Action.SKIP
        own: Action | ShardAction | None = getattr(self, kind.value)
        return self.on_error if own is None else Action(own.value)

    def quarantines(self, kind: FaultKind) -> bool:
        """Return whether samples with this kind of fault are quarantined and not tried again."""
        return kind in LASTING and self.action(kind) is Action.QUARANTINE


@dataclass(frozen=True)
class Skipped:
    """A sample that was skipped.

    Attributes:
        dataset: Name of the data set.
        epoch: Epoch of the data set.
        index: Number of the sample in the data set.
        lane: Lane that drew the sample.
        shard: Path or URL of its tar; ``?`` if unknown.
        key: Its key in the tar; ``?`` if unknown.
        kind: Kind of the fault.
        reason: Message of the fault.
        offset: First byte of the sample in its shard; None if the shard is lost or streamed.
        action: ``skip`` or ``quarantine``.
        recalled: Whether the process remembered the fault and did not try the sample. Depends on the number of workers,
            so equality ignores it. (For a sample of a lost shard, ``key`` and ``offset`` depend on it too.)
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
    recalled: bool = field(default=False, compare=False)

    def record(self) -> dict[str, str | int | None]:
        """Return the JSON object for a list of faults: without time, so that equal runs write equal lists."""
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
    """A fault of a sample.

    Attributes:
        error: The error.
        counts: Whether the fault counts for the limits. Faults of lost shards and excluded samples do not.
        recalled: Whether the fault was remembered and the sample was not tried.
    """

    error: SampleError
    counts: bool = True
    recalled: bool = False


class KnownFaults(Protocol):
    """The bad samples of one data set that a process knows. Samples are given by their number in the data set."""

    def recall(self, sample: int) -> Fault | None:
        """Return the fault of a sample that need not be tried; None if the sample must be tried."""

    def locate(self, sample: int) -> tuple[str, str]:
        """Return shard and key of a sample, for errors without them; ``?`` if unknown."""

    def offset(self, sample: int) -> int | None:
        """Return the first byte of a sample in its shard; None if unknown."""

    def record_shard_failure(self, sample: int, error: ShardError | ManifestError) -> Fault:
        """Record that the shard of a sample could not be opened or read, and return the fault of the sample.

        Raises:
            TooManyFaultsError: too much of the data set is lost.
        """

    def remember(self, sample: int, error: SampleError) -> None:
        """Remember a fault that another attempt would find again."""

    def record_success(self, sample: int) -> None:
        """Record that a sample could be read."""


class FaultPolicy:
    """Applies the policy to the samples of one lane, and counts their faults.

    Args:
        config: The policy.
        state: The counters that ``state`` returned; empty at the beginning of a run.

    Raises:
        StateError: ``state`` contains invalid counters.
    """

    def __init__(self, config: FaultConfig, state: tuple[int, ...] = ()) -> None:
        self.config = config
        self._consecutive = state[0] if state else 0
        ages = state[1:]
        if min(state, default=0) < 0 or any(a >= b for a, b in itertools.pairwise(ages)):
            raise StateError(f"fault counters {state[:8]}: expected a count and increasing ages of faults")
        self._seen = 0
        self._faults = deque(-age for age in reversed(ages) if age < config.share_window)

    def state(self) -> tuple[int, ...]:
        """Return the number of consecutive faults, then the age of each fault of the window in samples, ascending."""
        return (self._consecutive, *(self._seen - at for at in reversed(self._faults)))

    def attempt(self, make: Callable[[], R], known: KnownFaults, sample: int) -> R | Fault:
        """Return the result of ``make``, or the fault of a sample to skip. Updates the counters.

        Call it once for each sample of the lane, in order.

        Args:
            make: Makes the document of the sample. It is not called if the fault of the sample is known.
            known: The known faults of the data set; updated with the result.
            sample: Number of the sample.

        Raises:
            SampleError: the sample is bad, and the policy for the kind of fault is ``fail``.
            ShardError, ManifestError: the shard cannot be read, and the policy for shards is ``fail``.
            TooManyFaultsError: too many samples in a row or of the last samples are bad, or too many shards are lost.
            DataPipelineError: any other error of the data pipeline.
            Exception: an allocation failed (``errors.out_of_memory``).
        """
        fault = known.recall(sample)
        if fault is None:
            try:
                result = make()
            except Exception as error:
                if out_of_memory(error) is not None:
                    raise  # The sample is not the cause, and skipping it would change the order.
                fault = self._fault_of(error, known, sample)
                _drop_tracebacks(error)
        if fault is None:
            known.record_success(sample)
            self._count()
            self._consecutive = 0
            return result
        return self._treat(fault, known, sample)

    def _fault_of(self, error: Exception, known: KnownFaults, sample: int) -> Fault:
        """Convert an error to the fault of the sample; re-raise it if it concerns neither the sample nor its shard."""
        if isinstance(error, SampleError):
            return Fault(error)
        if isinstance(error, ShardError | ManifestError) and self.config.shard is not ShardAction.FAIL:
            return known.record_shard_failure(sample, error)
        if isinstance(error, DataPipelineError):
            raise error
        # A sample on which a library fails unexpectedly must not stop a week of training.
        reason = f"{type(error).__name__}: {error}"
        return Fault(SampleError(reason, kind=FaultKind.UNEXPECTED).located(*known.locate(sample)))

    def skipped(
        self, fault: Fault, dataset: str, epoch: int, index: int, lane: int, offset: int | None = None
    ) -> Skipped:
        """Return the record of a skipped sample."""
        error = fault.error
        origin = (dataset, epoch, index, lane, error.shard, error.key)
        return Skipped(*origin, error.kind, error.reason, offset, self.config.action(error.kind), fault.recalled)

    def _count(self) -> None:
        self._seen += 1
        while self._faults and self._seen - self._faults[0] >= self.config.share_window:
            self._faults.popleft()

    def _treat(self, fault: Fault, known: KnownFaults, sample: int) -> Fault:
        action = self.config.action(fault.error.kind)
        if action is Action.FAIL:
            raise fault.error
        if action is Action.QUARANTINE and fault.error.kind in LASTING and not fault.recalled:
            known.remember(sample, fault.error)
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


def _drop_tracebacks(error: BaseException | None) -> None:
    """Remove the tracebacks of an error and its causes: they would keep the pixels of their frames in memory."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
