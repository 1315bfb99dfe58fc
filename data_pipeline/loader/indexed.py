"""A data set with a manifest: order from ``lanes``, samples from ``sample_reader``, and what is known of bad ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zlib_ng.zlib_ng import crc32

from data_pipeline.errors import (
    DataConfigError,
    FaultKind,
    ManifestError,
    ReplacedError,
    SampleError,
    ShardError,
    TooManyFaultsError,
)
from data_pipeline.order.config import OrderConfig
from data_pipeline.order.fault_lists import RunFaults
from data_pipeline.order.fault_policy import Fault
from data_pipeline.order.lanes import Cursor, LaneOrder, Place
from data_pipeline.order.state import Drawn
from data_pipeline.sample import Sample
from data_pipeline.shards.sample_reader import SampleReader

_FAILED_READS = 3


@dataclass(frozen=True)
class IndexedSet:
    """What the lanes of a process share of an indexed data set.

    Attributes:
        reader: Reads its samples.
        seed: Of the order.
        order: How it is shuffled.
        faults: What the process knows of its bad samples.
    """

    reader: SampleReader
    seed: int
    order: OrderConfig
    faults: IndexedFaults

    @property
    def num_samples(self) -> int:
        return self.reader.manifest.num_samples

    def lane(self, lane: int, num_lanes: int) -> IndexedLane:
        """The samples of one lane."""
        return IndexedLane(self, lane, num_lanes)


class IndexedLane:
    """Places and samples of one lane.

    Args:
        shared: The data set.
        lane: This lane.
        num_lanes: All lanes; over them each sample occurs once an epoch.
    """

    random_access = True

    def __init__(self, shared: IndexedSet, lane: int, num_lanes: int) -> None:
        self._reader, self._lane, self.faults = shared.reader, lane, shared.faults
        order = shared.order
        self._order = LaneOrder(shared.num_samples, order.block_size, order.window_blocks, shared.seed, lane, num_lanes)
        self._at: Cursor | None = None
        self._expected: tuple[int, int] | None = None

    def resolve(self, cursor: Cursor) -> tuple[Place, Cursor]:
        """The sample at ``cursor`` and the cursor after it."""
        place, self._at = self._order.resolve(cursor)
        return place, self._at

    def prepare(self, cursor: Cursor, waiting: Sequence[Drawn]) -> None:
        """Starts to fetch what is needed from ``cursor`` on, if the data set is remote."""
        if self._reader.manifest.is_remote:
            self._expect(self._order.resolve(cursor)[1])

    def read(self, sample: int, epoch: int = 0) -> Sample:
        """As ``SampleReader.read``; says once a window what is needed in this window and the next."""
        if self._at is not None and self._reader.manifest.is_remote:
            self._expect(self._at)
        return self._reader.read(sample, epoch, self._lane)

    def _expect(self, at: Cursor) -> None:
        if self._expected != at[:2]:
            self._expected = at[:2]
            self._reader.expect(self._lane, self._order.blocks(at))

    def read_outline(self, sample: int, epoch: int = 0) -> Sample:
        """As ``SampleReader.read_outline``."""
        return self._reader.read_outline(sample, epoch)


class IndexedFaults:
    """Bad samples and lost shards of one data set, as far as this process knows: its ``KnownFaults``.

    Args:
        run: What the data sets share.
        reader: Of this data set.

    Raises:
        DataConfigError: every sample of the data set is excluded.
    """

    def __init__(self, run: RunFaults, reader: SampleReader) -> None:
        self._run, self._reader = run, reader
        self._excluded = run.exclusions.get(reader.dataset)
        self._lost: dict[int, SampleError] = {}
        self._lost_samples = 0
        self._failed_reads: dict[int, int] = {}
        if self._excluded is not None and len(self._excluded.indices) >= reader.manifest.num_samples:
            raise DataConfigError(f"data set {reader.dataset}: data.faults.exclude names every sample of it")

    def recall(self, sample: int) -> Fault | None:
        """The fault of a sample that need not be tried."""
        if self._excluded is not None and (at := self._excluded.position(sample)) is not None:
            return self._exclude(sample, int(self._excluded.key_crc32[at]))
        if self._lost:
            error = self._lost.get(self._reader.manifest.locate(sample)[0])
            if error is not None:
                return Fault(error, counts=False, again=True)
        if self._run.quarantined:
            error = self._run.quarantined.get((self._reader.dataset, sample))
            if error is not None:
                return Fault(error, again=True)
        return None

    def _exclude(self, sample: int, key_crc32: int) -> Fault:
        try:
            shard, key = self._reader.where(sample)
        except (ShardError, ManifestError):  # Its shard is lost; left out it is all the same.
            shard, key = self._shard_name(sample), "?"
        if key != "?" and crc32(key.encode()) != key_crc32:
            raise DataConfigError(
                f"data.faults.exclude: sample {sample} of data set {self._reader.dataset} is {shard}/{key}, "
                "the list names another key: it was made for another manifest"
            )
        reason = "named by data.faults.exclude"
        return Fault(SampleError(reason, kind=FaultKind.EXCLUDED, shard=shard, key=key), counts=False)

    def locate(self, sample: int) -> tuple[str, str]:
        """Shard and key, the key unknown if the shard is lost."""
        try:
            return self._reader.where(sample)
        except (ShardError, ManifestError):
            return self._shard_name(sample), "?"

    def offset(self, sample: int) -> int | None:
        """First byte of a sample in its shard; None if the shard is lost, which is not opened again for this."""
        if self._lost and self._reader.manifest.locate(sample)[0] in self._lost:
            return None
        try:
            return self._reader.offset(sample)
        except (ShardError, ManifestError):
            return None

    def _shard_name(self, sample: int) -> str:
        manifest = self._reader.manifest
        return str(manifest.shard_location(manifest.locate(sample)[0]))

    def shard_failed(self, sample: int, error: ShardError | ManifestError) -> Fault:
        """A shard that cannot be opened anew, was replaced, or fails three reads in a row, is lost; else one sample is.

        Raises:
            TooManyFaultsError: lost shards hold more than ``max_share`` of the data set.
        """
        number = self._reader.manifest.locate(sample)[0]
        self._reader.forget(number)
        key = "?"
        try:
            key = self._reader.where(sample)[1]
            self._failed_reads[number] = self._failed_reads.get(number, 0) + 1
            lost = isinstance(error, ReplacedError) or self._failed_reads[number] >= _FAILED_READS
        except (ShardError, ManifestError):
            lost = True
        fault = SampleError(str(error), kind=FaultKind.SHARD, shard=self._shard_name(sample), key=key)
        if lost:
            self._lose(number, fault)
        return Fault(fault, counts=not lost)

    def _lose(self, number: int, fault: SampleError) -> None:
        manifest, config = self._reader.manifest, self._run.config
        self._lost[number] = fault.located(fault.shard, "?")
        self._lost_samples += int(manifest.cu_samples[number + 1] - manifest.cu_samples[number])
        total = manifest.num_samples
        if self._lost_samples > config.max_share * total or self._lost_samples == total:
            raise TooManyFaultsError(
                f"{len(self._lost)} of the {manifest.num_shards} shards of data set {self._reader.dataset} are lost, "
                f"with {self._lost_samples} of {total} samples (data.faults.max_share={config.max_share:g}); "
                f"the last: {fault}"
            )

    def keep(self, sample: int, error: SampleError) -> None:
        """Holds a quarantined sample, while there is room."""
        self._run.hold(self._reader.dataset, sample, error)

    def succeeded(self, sample: int) -> None:
        """Ends the row of failed reads of the sample's shard."""
        if self._failed_reads:
            self._failed_reads.pop(self._reader.manifest.locate(sample)[0], None)
