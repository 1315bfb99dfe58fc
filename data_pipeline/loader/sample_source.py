"""Where the samples of a lane come from, behind one interface: indexed shards here, other sources in their own files.

    DatasetConfig --OpenDataset.open--> Source --lane--> LaneSource: resolve, read, faults
        indexed shards (``IndexedSet``) | plain tars (``front_to_back``) | a pipeline of the user (``user_pipeline``)

Not for: which data set is next (``order/lanes``), reading ahead (``decode_ahead``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.errors import (
    DataConfigError,
    FaultKind,
    ManifestError,
    ReplacedError,
    SampleError,
    ShardError,
    TooManyFaultsError,
)
from data_pipeline.loader.front_to_back import StreamedSet, expand_shards
from data_pipeline.loader.user_pipeline import PipelineSet
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.config import OrderConfig
from data_pipeline.order.fault_lists import RunFaults
from data_pipeline.order.fault_policy import Fault, KnownFaults
from data_pipeline.order.lanes import LaneOrder, Ordered
from data_pipeline.order.randomness import SampleDraws
from data_pipeline.order.state import Cursor, Drawn, Place
from data_pipeline.packing.document_builder import DocumentBuilder, Outline
from data_pipeline.sample import Sample
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.storage.storage import Storage
from data_pipeline.text.tokenizer import Tokenizer

Skips = Mapping[tuple[str, int, int], str]
"""(data set, epoch, sample) of samples that a run left out, and why."""

_FAILED_READS = 3


def dataset_seed(seed: int, name: str) -> int:
    """64 bits of a run's seed and a data set's name, so that data sets are shuffled independently."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


class LaneSource(Ordered, Protocol):
    """Order and samples of one lane of a data set."""

    @property
    def random_access(self) -> bool:
        """Whether samples can be read in any order. A pipe gives each sample once."""

    @property
    def faults(self) -> KnownFaults:
        """What the process knows of bad samples."""

    def prepare(self, cursor: Cursor, waiting: Sequence[Drawn]) -> None:
        """Prepare to read from a position: ``waiting`` are read again, then the samples from ``cursor`` on."""

    def read(self, sample: int, epoch: int = 0) -> Sample:
        """The sample with its members in reading order."""

    def read_outline(self, sample: int, epoch: int = 0) -> Sample:
        """The sample, its images perhaps without their bytes."""


class Source(Protocol):
    """What the lanes of a process share of a data set."""

    @property
    def num_samples(self) -> int:
        """Samples of an epoch; 0 if nobody counted them."""

    def lane(self, lane: int, num_lanes: int) -> LaneSource:
        """The samples of one lane."""


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
        self._lost: dict[int, SampleError] = {}
        self._lost_samples = 0
        self._failed_reads: dict[int, int] = {}
        excluded = run.exclusions.get(reader.dataset)
        if excluded is not None and len(excluded.indices) >= reader.manifest.num_samples:
            raise DataConfigError(f"data set {reader.dataset}: data.faults.exclude names every sample of it")

    def recall(self, sample: int) -> Fault | None:
        """The fault of a sample that need not be tried."""
        fault = self._run.excluded(self._reader.dataset, sample, self, "another manifest")
        if fault is not None:
            return fault
        if self._lost:
            error = self._lost.get(self._reader.manifest.locate(sample)[0])
            if error is not None:
                return Fault(error, counts=False, again=True)
        return self._run.recall(self._reader.dataset, sample)

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


@dataclass(frozen=True)
class OpenDataset:
    """One data set of the mixture, open in this process; lanes share it.

    Attributes:
        config: Its configuration.
        seed: Its seed, ``dataset_seed``.
        source: Its samples.
        builder: Makes documents of them.
    """

    config: DatasetConfig
    seed: int
    source: Source
    builder: DocumentBuilder

    @classmethod
    def open(
        cls,
        config: DataConfig,
        dataset: DatasetConfig,
        seed: int,
        tokenizer: Tokenizer,
        spec: MediaSpec,
        faults: RunFaults,
        storage: Storage,
    ) -> OpenDataset:
        """Opens source and builder.

        Args:
            config: The data block; its order holds for every data set.
            dataset: The data set.
            seed: Seed of the run.
            tokenizer: Encodes texts.
            spec: What the model takes.
            faults: What this process knows of bad samples.
            storage: Reads remote shards.

        Raises:
            ManifestError: the manifest is missing or damaged.
            DataConfigError: it is empty or wholly excluded, or the transforms do not fit the model.
        """
        builder, order = DocumentBuilder(dataset, tokenizer, spec), config.order
        own_seed = dataset_seed(seed, dataset.name)
        if dataset.manifest is not None:
            manifest = Manifest.open(dataset.manifest, storage)
            if manifest.num_samples == 0:
                raise DataConfigError(f"data set {dataset.name}: {dataset.manifest} holds no samples")
            reader = SampleReader(manifest, dataset.name, max_text_bytes=dataset.max_text_bytes)
            indexed = IndexedSet(reader, own_seed, order, IndexedFaults(faults, reader))
            return cls(dataset, own_seed, indexed, builder)
        streamed = None
        if dataset.shards:
            size = order.block_size * order.window_blocks
            sources = expand_shards(dataset.shards)
            streamed = StreamedSet(dataset.name, sources, own_seed, size, storage, faults, dataset.max_text_bytes)
            if not dataset.stages:
                return cls(dataset, own_seed, streamed, builder)
        return cls(dataset, own_seed, PipelineSet.open(dataset, own_seed, faults, streamed), builder)

    def outline(self, lane: LaneSource, drawn: Drawn) -> Outline:
        """Reads a sample and plans its document; its images are decoded later.

        Raises:
            SampleError, ShardError, ManifestError: it cannot be read, or makes no document.
        """
        sample = lane.read(drawn.sample, drawn.epoch)
        return self.builder.outline(sample, SampleDraws(self.seed, drawn.sample, drawn.epoch))


@dataclass(frozen=True)
class MeasuredDataset(OpenDataset):
    """The same without pixels: text and sizes only. It finds bad the samples that a run left out.

    Attributes:
        skipped: These samples.
    """

    skipped: Skips

    @classmethod
    def of(cls, opened: OpenDataset, skipped: Skips) -> MeasuredDataset:
        """An open data set, measured from now on."""
        return cls(opened.config, opened.seed, opened.source, opened.builder, skipped)

    def outline(self, lane: LaneSource, drawn: Drawn) -> Outline:
        reason = self.skipped.get((self.config.name, drawn.epoch, drawn.sample))
        if reason is not None:
            raise SampleError(reason)
        sample = lane.read_outline(drawn.sample, drawn.epoch)
        return self.builder.outline(sample, SampleDraws(self.seed, drawn.sample, drawn.epoch), pixels=False)
