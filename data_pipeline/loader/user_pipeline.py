"""The samples of one lane from a user's webdataset pipeline, or from streamed shards with the user's stages.

    pipeline ──one pass per epoch──> 0 1 2 3 4 5 ...     lane l: samples l, l + L, l + 2L, ... of each epoch
    pipeline of a lane, shards + stages ──> 0 1 2 ...    lane l: all samples of its own pass

The pipeline determines the order. A cursor is (epoch, 0, count): the lane drew ``count`` samples of this epoch. A
resumed run reads the pipeline again from the start of the epoch and skips these samples. If the pipeline is not split
by lane, the lanes of a process share one pass, and a sample stays in memory until its lane reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data_pipeline.config import DatasetConfig
from data_pipeline.errors import (
    DataConfigError,
    DataPipelineError,
    ManifestError,
    PipelineError,
    SampleError,
    ShardError,
    out_of_memory,
)
from data_pipeline.loader import user_code
from data_pipeline.loader.front_to_back import StreamedSet
from data_pipeline.loader.user_code import LaneEpoch
from data_pipeline.order.fault_lists import RunFaults
from data_pipeline.order.fault_policy import Fault, ShardAction
from data_pipeline.order.state import Cursor, Drawn, SamplePosition
from data_pipeline.sample import Provenance, Sample
from data_pipeline.shards.sample_reader import assemble

_MAX_KEPT = 4096
"""Most samples that a shared pass keeps for slower lanes; with more, the slowest lane reads the pipeline on its own."""


_END = object()


class _Entry(NamedTuple):
    """A sample of a pipeline, or the error of a sample."""

    key: str
    shard: str
    found: Mapping[str, Any] | SampleError | ShardError


class _Pass:
    """One pass over the samples of an epoch. It keeps the samples that the lanes in ``needs`` have not read yet.

    Args:
        entries: The samples of the epoch, from the first one.
        epoch: The epoch.
        num_lanes: Number of lanes; sample i belongs to lane ``i % num_lanes``.
        needs: For each lane that shares the pass, the epoch and the number of the first sample that it still needs.
            The caller updates it. The pass removes a lane that falls too far behind.
    """

    def __init__(
        self, entries: Iterator[_Entry], epoch: int, num_lanes: int, needs: dict[int, tuple[int, int]]
    ) -> None:
        self._entries, self._epoch, self._num_lanes, self._needs = entries, epoch, num_lanes, needs
        self._num_read = 0
        self._kept: dict[int, _Entry] = {}

    def has(self, number: int) -> bool:
        """Return whether the sample is kept or was not read yet."""
        return number >= self._num_read or number in self._kept

    def pop_sample(self, number: int) -> _Entry | None:
        """Return a sample and forget it; None after the last one of the epoch. Call ``has`` first.

        Raises:
            PipelineError: the user's code failed.
        """
        if number in self._kept:
            return self._kept.pop(number)
        for entry in self._entries:
            current, self._num_read = self._num_read, self._num_read + 1
            if current == number:
                return entry
            need = self._needs.get(current % self._num_lanes)
            if need is not None and (self._epoch, current) >= need:
                self._keep(current, entry)
        return None

    def _keep(self, number: int, entry: _Entry) -> None:
        self._kept[number] = entry
        if len(self._kept) > _MAX_KEPT:
            slowest = min(self._kept) % self._num_lanes
            self._needs.pop(slowest, None)
            self._kept = {i: kept for i, kept in self._kept.items() if i % self._num_lanes != slowest}


@dataclass(frozen=True)
class PipelineSet:
    """A data set that runs the user's code: a ``SampleSource``. The lanes of a process share it.

    Attributes:
        dataset: Name of the data set.
        target: The user's pipeline; None if ``streamed`` is given.
        stages: Stages after the pipeline or the streamed shards.
        streamed: The data set of plain tars, if ``shards`` is configured.
        path: Import paths of the code, for messages.
        is_split: Whether each lane has a pass of its own.
        seed: Seed of the data set.
        max_text_bytes: Largest ``txt`` or ``json`` member; a larger one makes a bad sample.
    """

    dataset: str
    target: Any
    stages: tuple[Any, ...]
    streamed: StreamedSet | None
    path: str
    is_split: bool
    seed: int
    max_text_bytes: int
    _passes: dict[int, _Pass] = field(default_factory=dict)
    _needs: dict[int, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def open(cls, config: DatasetConfig, seed: int, faults: RunFaults, streamed: StreamedSet | None) -> PipelineSet:
        """Import the user's code.

        Raises:
            DataConfigError: the code cannot be imported, or ``data.faults.exclude`` names samples of this data set.
            PipelineError: the user's factory failed.
        """
        if config.name in faults.exclusions:
            raise DataConfigError(
                f"data set {config.name}: data.faults.exclude names samples by number, and a pipeline may change these "
                "numbers; leave the samples out in the pipeline, for example with wds.select"
            )
        target = None if config.pipeline is None else user_code.load(config.pipeline, config.name)
        stages = tuple(user_code.load(path, config.name) for path in config.stages)
        path = ", ".join(config.code)
        try:
            is_split = streamed is not None or user_code.is_split(target)
        except DataPipelineError:
            raise
        except Exception as error:
            raise user_code.user_error(config.name, path, "before its first sample", error) from error
        return cls(config.name, target, stages, streamed, path, is_split, seed, config.max_text_bytes)

    @property
    def num_samples(self) -> int:
        """0: unknown."""
        return 0

    def lane(self, lane: int, num_lanes: int) -> PipelineLane:
        """Return the samples of one lane."""
        self._needs.setdefault(lane, (0, 0))
        return PipelineLane(self, lane, num_lanes)

    def record_need(self, lane: int, epoch: int, number: int) -> None:
        """Record the first sample that a lane still needs. Drops the passes of epochs that no lane needs any more."""
        self._needs[lane] = (epoch, number)
        first = min(needed for needed, _ in self._needs.values())
        for done in [old for old in self._passes if old < first]:
            del self._passes[done]

    def common_pass(self, epoch: int, num_lanes: int) -> _Pass:
        """Return the pass of an epoch that the lanes of this process share; begins it if necessary."""
        if epoch not in self._passes:
            entries = self.entries(LaneEpoch(epoch, 0, num_lanes, self.seed))
            self._passes[epoch] = _Pass(entries, epoch, num_lanes, self._needs)
        return self._passes[epoch]

    def entries(self, lane_epoch: LaneEpoch) -> Iterator[_Entry]:
        """Yield the samples of an epoch, and the errors of single samples in their place.

        Raises:
            PipelineError: the user's code failed, or yielded an object that is no sample.
        """
        skipped = list[SampleError | ShardError]()
        number, progress = 0, "before its first sample"
        try:
            source = self.target if self.streamed is None else self._streamed(lane_epoch, skipped)
            samples = user_code.one_epoch(source, self.stages, lane_epoch, skipped.append)
            while True:
                sample = next(samples, _END)
                for error in skipped:
                    yield _Entry(getattr(error, "key", "?"), getattr(error, "shard", "?"), error)
                    number += 1
                skipped.clear()
                if sample is _END:
                    return
                if not isinstance(sample, Mapping):
                    raise TypeError(f"a sample is a {type(sample).__name__}, expected a dict with __key__")
                key, shard = user_code.key_and_shard(sample, number)
                yield _Entry(key, shard, sample)
                progress, number = f"after sample {key!r} (number {number} of epoch {lane_epoch.epoch})", number + 1
        except DataPipelineError:
            raise
        except Exception as error:
            if out_of_memory(error) is not None:
                raise
            raise user_code.user_error(self.dataset, self.path, progress, error) from error

    def _streamed(self, lane_epoch: LaneEpoch, skipped: list[SampleError | ShardError]) -> Iterator[dict[str, Any]]:
        """Yield the samples of a lane's shards in webdataset's form.

        The errors of bad samples are appended to ``skipped``.
        """
        assert self.streamed is not None
        lane = self.streamed.lane(lane_epoch.lane, lane_epoch.num_lanes)
        for position, shard, key, found in lane.epoch(lane_epoch.epoch):
            if isinstance(found, ShardError) and self.streamed.faults.config.shard is not ShardAction.FAIL:
                found = lane.faults.record_shard_failure(position.sample, found).error
            if isinstance(found, SampleError | ShardError):
                skipped.append(found)
            else:
                yield {"__key__": key, "__url__": shard, **found}
        lane.close()


class PipelineLane:
    """The samples of one lane: a ``LaneSource``.

    Args:
        shared: The data set.
        lane: Number of this lane.
        num_lanes: Number of lanes.
    """

    random_access = False

    def __init__(self, shared: PipelineSet, lane: int, num_lanes: int) -> None:
        self._set, self._lane, self._num_lanes = shared, lane, num_lanes
        self.faults = PipelineFaults(self)
        self._own: tuple[int, _Pass] | None = None
        self._last: tuple[int, int, _Entry | None] | None = None

    def prepare(self, cursor: Cursor, waiting: Sequence[Drawn]) -> None:
        """Record the first sample that is needed, so that the shared pass keeps none before it."""
        needed = [(drawn.epoch, drawn.sample) for drawn in waiting]
        self._set.record_need(self._lane, *min([*needed, (cursor.epoch, self._number(cursor.offset))]))

    def resolve(self, cursor: Cursor) -> tuple[SamplePosition, Cursor]:
        """Return the sample at ``cursor`` and the cursor after it. Reads the pipeline up to the sample.

        Raises:
            DataConfigError: the pipeline gives the lane no sample.
            PipelineError: the user's code failed.
        """
        epoch, _, count = cursor
        empty = 0
        while self._entry(epoch, count) is None:
            empty += count == 0
            # With fewer streamed shards than lanes, a lane has no shard in some epochs.
            if empty > (0 if self._set.streamed is None else 2 * self._num_lanes):
                raise DataConfigError(
                    f"data set {self._set.dataset}: {self._set.path} gives lane {self._lane} no sample in epoch "
                    f"{epoch}; it must give at least one for each of data.lanes={self._num_lanes}"
                )
            epoch, count = epoch + 1, 0
        return SamplePosition(self._number(count), epoch), Cursor(epoch, 0, count + 1)

    def read(self, sample: int, epoch: int = 0) -> Sample:
        """Return a sample with its members in reading order.

        Raises:
            SampleError: a stage failed on the sample, or a member is malformed.
            ShardError: the shard is damaged at the sample.
            PipelineError: the user's code failed, or the pipeline no longer yields the sample.
        """
        entry = self._entry(epoch, sample // self._num_lanes)
        if entry is None:
            raise PipelineError(
                f"data set {self._set.dataset}: {self._set.path} no longer gives sample {sample} of epoch {epoch}; a "
                "pipeline must give the same samples each time it is read"
            )
        if isinstance(entry.found, SampleError | ShardError):
            raise entry.found
        origin = Provenance(self._set.dataset, entry.shard, entry.key, sample, epoch)
        try:
            members = user_code.members_of(entry.found)
        except SampleError as error:
            raise error.located(entry.shard, entry.key) from error
        return assemble(members, origin, max_text_bytes=self._set.max_text_bytes)

    def read_without_images(self, sample: int, epoch: int = 0) -> Sample:
        """As ``read``."""
        return self.read(sample, epoch)

    def last_shard_and_key(self) -> tuple[str, str]:
        """Return shard and key of the sample that was read last; ``?`` if unknown."""
        entry = None if self._last is None else self._last[2]
        return ("?", "?") if entry is None else (entry.shard, entry.key)

    def _number(self, count: int) -> int:
        return count * self._num_lanes + self._lane

    def _entry(self, epoch: int, count: int) -> _Entry | None:
        """Return a sample of the lane; None after the last one of the epoch.

        For a sample that was passed already, the pipeline is read again from the start of the epoch.
        """
        if self._last is None or self._last[:2] != (epoch, count):
            self._last = (epoch, count, self._read_entry(epoch, count))
        return self._last[2]

    def _read_entry(self, epoch: int, count: int) -> _Entry | None:
        shared = self._set
        number = count if shared.is_split else self._number(count)
        own = self._own[1] if self._own is not None and self._own[0] == epoch else None
        if own is None and not shared.is_split:
            common = shared.common_pass(epoch, self._num_lanes)
            if common.has(number):
                self._own = None
                entry = common.pop_sample(number)
                shared.record_need(self._lane, epoch, number + 1)
                return entry
            shared.record_need(self._lane, epoch + 1, 0)
        if own is None or not own.has(number):
            entries = shared.entries(LaneEpoch(epoch, self._lane, self._num_lanes, shared.seed))
            own = _Pass(entries, epoch, self._num_lanes, needs={})
            self._own = (epoch, own)
        return own.pop_sample(number)


@dataclass(frozen=True)
class PipelineFaults:
    """The ``KnownFaults`` of a pipeline. It remembers no fault: a number may be another sample in another epoch."""

    lane: PipelineLane

    def recall(self, sample: int) -> None:
        """Return None: every sample must be tried."""

    def locate(self, sample: int) -> tuple[str, str]:
        """Return shard and key of the sample that was read last."""
        return self.lane.last_shard_and_key()

    def offset(self, sample: int) -> None:
        """Return None: the offset is unknown."""

    def record_shard_failure(self, sample: int, error: ShardError | ManifestError) -> Fault:
        """Stop the run with this error. For streamed shards the policy was applied before the user's stages.

        Raises:
            ShardError, ManifestError: always.
        """
        raise error

    def remember(self, sample: int, error: SampleError) -> None:
        """Do nothing."""

    def record_success(self, sample: int) -> None:
        """Do nothing."""
