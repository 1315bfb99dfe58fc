"""One lane of a data set that is a webdataset pipeline of the user's own, or has stages after our streamed reading.

    pipeline ──one pass an epoch──> 0 1 2 3 4 5 ...      lane l: samples l, l + L, l + 2L, ... of each epoch
    pipeline of a lane, shards + stages ──> 0 1 2 ...    lane l: all samples of its own pass

A cursor is (epoch, 0, count): the lane drew ``count`` samples of this epoch. A resume reads the pipeline again from the
start of the epoch and skips the counted samples. Order is the pipeline's own. Lanes of a process share one pass of a
pipeline that is not split by lane, and a sample waits in memory until its lane asks for it.
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
from data_pipeline.loader.user_code import Epoch
from data_pipeline.order.fault_lists import RunFaults
from data_pipeline.order.fault_policy import Fault, ShardAction
from data_pipeline.order.state import Cursor, Drawn, Place
from data_pipeline.sample import Provenance, Sample
from data_pipeline.shards.sample_reader import assemble

_MOST_KEPT = 4096
"""Samples that wait for slower lanes of a process; beyond them the slowest lane reads the pipeline for itself."""


_END = object()


class _Entry(NamedTuple):
    """A sample of a pipeline, or the error of one."""

    key: str
    shard: str
    found: Mapping[str, Any] | SampleError | ShardError


class _Pass:
    """One reading of an epoch from its first sample, shared by the lanes in ``needs``.

    Args:
        entries: The samples.
        epoch: The epoch.
        num_lanes: Lanes that take turns; sample i belongs to lane ``i % num_lanes``.
        needs: Of each lane that shares the pass, the epoch and the number of the first sample that it still needs.
    """

    def __init__(
        self, entries: Iterator[_Entry], epoch: int, num_lanes: int, needs: dict[int, tuple[int, int]]
    ) -> None:
        self._entries, self._epoch, self._num_lanes, self._needs = entries, epoch, num_lanes, needs
        self._at = 0
        self._kept: dict[int, _Entry] = {}

    def has(self, number: int) -> bool:
        """Whether the sample can still be taken from this pass."""
        return number >= self._at or number in self._kept

    def take(self, number: int) -> _Entry | None:
        """The sample; None after the last one of the epoch.

        Raises:
            PipelineError: the user's code failed.
        """
        if number in self._kept:
            return self._kept.pop(number)
        for entry in self._entries:
            at, self._at = self._at, self._at + 1
            if at == number:
                return entry
            need = self._needs.get(at % self._num_lanes)
            if need is not None and (self._epoch, at) >= need:
                self._keep(at, entry)
        return None

    def _keep(self, number: int, entry: _Entry) -> None:
        self._kept[number] = entry
        if len(self._kept) > _MOST_KEPT:
            slowest = min(self._kept) % self._num_lanes
            self._needs.pop(slowest, None)
            self._kept = {at: kept for at, kept in self._kept.items() if at % self._num_lanes != slowest}


@dataclass(frozen=True)
class PipelineSet:
    """Values that the lanes of a process share.

    Attributes:
        dataset: Name of the data set.
        target: The user's pipeline; None where ``streamed`` is read.
        stages: Stages after it.
        streamed: Our own reading of ``shards``.
        path: Names of the code, for messages.
        is_split: Whether each lane has a pass of its own.
        seed: Seed of the data set.
        max_text_bytes: A larger ``txt`` or ``json`` member is a bad sample.
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
            DataConfigError: it cannot be imported, or ``data.faults.exclude`` names samples of this data set.
        """
        if config.name in faults.exclusions:
            raise DataConfigError(
                f"data set {config.name}: data.faults.exclude names samples by number, which a pipeline may change; "
                "leave them out in the pipeline, for example with wds.select"
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
        """Unknown: 0."""
        return 0

    def lane(self, lane: int, num_lanes: int) -> PipelineLane:
        """The samples of one lane."""
        self._needs.setdefault(lane, (0, 0))
        return PipelineLane(self, lane, num_lanes)

    def need(self, lane: int, epoch: int, number: int) -> None:
        """Note the first sample that a lane still needs; passes of earlier epochs than any lane needs are dropped."""
        self._needs[lane] = (epoch, number)
        first = min(needed for needed, _ in self._needs.values())
        for done in [old for old in self._passes if old < first]:
            del self._passes[done]

    def common_pass(self, epoch: int, num_lanes: int) -> _Pass:
        """The pass of an epoch that the lanes of this process share."""
        if epoch not in self._passes:
            entries = self.entries(Epoch(epoch, 0, num_lanes, self.seed))
            self._passes[epoch] = _Pass(entries, epoch, num_lanes, self._needs)
        return self._passes[epoch]

    def entries(self, at: Epoch) -> Iterator[_Entry]:
        """The samples of an epoch with the errors of single samples among them.

        Raises:
            PipelineError: the user's code failed, or gave something that is no sample.
        """
        skipped = list[SampleError | ShardError]()
        number, progress = 0, "before its first sample"
        try:
            source = self.target if self.streamed is None else self._streamed(at, skipped)
            samples = user_code.one_epoch(source, self.stages, at, skipped.append)
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
                key, shard = user_code.place_of(sample, number)
                yield _Entry(key, shard, sample)
                progress, number = f"after sample {key!r} (number {number} of epoch {at.epoch})", number + 1
        except DataPipelineError:
            raise
        except Exception as error:
            if out_of_memory(error) is not None:
                raise
            raise user_code.user_error(self.dataset, self.path, progress, error) from error

    def _streamed(self, at: Epoch, skipped: list[SampleError | ShardError]) -> Iterator[dict[str, Any]]:
        """Our own samples of a lane's shards, as webdataset has them."""
        assert self.streamed is not None
        lane = self.streamed.lane(at.lane, at.num_lanes)
        for place, shard, key, found in lane.epoch(at.epoch):
            if isinstance(found, ShardError) and self.streamed.faults.config.shard is not ShardAction.FAIL:
                found = lane.faults.shard_failed(place.sample, found).error
            if isinstance(found, SampleError | ShardError):
                skipped.append(found)
            else:
                yield {"__key__": key, "__url__": shard, **found}
        lane.close()


class PipelineLane:
    """Places and samples of one lane.

    Args:
        shared: The data set.
        lane: This lane.
        num_lanes: All lanes.
    """

    random_access = False

    def __init__(self, shared: PipelineSet, lane: int, num_lanes: int) -> None:
        self._set, self._lane, self._num_lanes = shared, lane, num_lanes
        self.faults = PipelineFaults(self)
        self._own: tuple[int, _Pass] | None = None
        self._last: tuple[int, int, _Entry | None] | None = None

    def prepare(self, cursor: Cursor, waiting: Sequence[Drawn]) -> None:
        """Note the first sample that is needed, so that the shared pass keeps none before it."""
        places = [(drawn.epoch, drawn.sample) for drawn in waiting]
        self._set.need(self._lane, *min([*places, (cursor.epoch, self._number(cursor.offset))]))

    def resolve(self, cursor: Cursor) -> tuple[Place, Cursor]:
        """The sample at ``cursor`` and the cursor after it.

        Raises:
            DataConfigError: the pipeline gives the lane no sample.
            PipelineError: the user's code failed.
        """
        epoch, _, count = cursor
        empty = 0
        while self._entry(epoch, count) is None:
            empty += count == 0
            # Streamed shards may be fewer than lanes: then a lane has none in some epochs.
            if empty > (0 if self._set.streamed is None else 2 * self._num_lanes):
                raise DataConfigError(
                    f"data set {self._set.dataset}: {self._set.path} gives lane {self._lane} no sample in epoch "
                    f"{epoch}; it must give at least one for each of data.lanes={self._num_lanes}"
                )
            epoch, count = epoch + 1, 0
        return Place(self._number(count), epoch), Cursor(epoch, 0, count + 1)

    def read(self, sample: int, epoch: int = 0) -> Sample:
        """The sample with its members in reading order.

        Raises:
            SampleError: a stage failed on it, or a member is malformed.
            ShardError: the shard is damaged there.
            PipelineError: the pipeline does not give it any more.
        """
        entry = self._entry(epoch, sample // self._num_lanes)
        if entry is None:
            raise PipelineError(
                f"data set {self._set.dataset}: {self._set.path} no longer gives sample {sample} of epoch {epoch}; a "
                "pipeline must give equal samples whenever it is read"
            )
        if isinstance(entry.found, SampleError | ShardError):
            raise entry.found
        origin = Provenance(self._set.dataset, entry.shard, entry.key, sample, epoch)
        try:
            members = user_code.members_of(entry.found)
        except SampleError as error:
            raise error.located(entry.shard, entry.key) from error
        return assemble(members, origin, max_text_bytes=self._set.max_text_bytes)

    def read_outline(self, sample: int, epoch: int = 0) -> Sample:
        """As ``read``."""
        return self.read(sample, epoch)

    def last_place(self) -> tuple[str, str]:
        """Shard and key of the sample that was read last."""
        entry = None if self._last is None else self._last[2]
        return ("?", "?") if entry is None else (entry.shard, entry.key)

    def _number(self, count: int) -> int:
        return count * self._num_lanes + self._lane

    def _entry(self, epoch: int, count: int) -> _Entry | None:
        """The lane's sample; None after the last one of the epoch. Reads from the start again to go back."""
        if self._last is None or self._last[:2] != (epoch, count):
            self._last = (epoch, count, self._take(epoch, count))
        return self._last[2]

    def _take(self, epoch: int, count: int) -> _Entry | None:
        shared = self._set
        number = count if shared.is_split else self._number(count)
        own = self._own[1] if self._own is not None and self._own[0] == epoch else None
        if own is None and not shared.is_split:
            common = shared.common_pass(epoch, self._num_lanes)
            if common.has(number):
                self._own = None
                entry = common.take(number)
                shared.need(self._lane, epoch, number + 1)
                return entry
            shared.need(self._lane, epoch + 1, 0)
        if own is None or not own.has(number):
            entries = shared.entries(Epoch(epoch, self._lane, self._num_lanes, shared.seed))
            own = _Pass(entries, epoch, self._num_lanes, needs={})
            self._own = (epoch, own)
        return own.take(number)


@dataclass(frozen=True)
class PipelineFaults:
    """The ``KnownFaults`` of a pipeline. Nothing is remembered: another epoch may give another sample."""

    lane: PipelineLane

    def recall(self, sample: int) -> None:
        """No fault is known before the sample is read."""

    def locate(self, sample: int) -> tuple[str, str]:
        """Shard and key."""
        return self.lane.last_place()

    def offset(self, sample: int) -> None:
        """Unknown."""

    def shard_failed(self, sample: int, error: ShardError | ManifestError) -> Fault:
        """Stop the run: the user's pipeline, or the policy for streamed shards, let the error through.

        Raises:
            ShardError, ManifestError: always.
        """
        raise error

    def keep(self, sample: int, error: SampleError) -> None:
        """Nothing is kept."""

    def succeeded(self, sample: int) -> None:
        """Nothing is counted."""
