"""The sources of a lane's samples: one interface, and its implementation for indexed shards.

    DatasetConfig --OpenDataset.open--> SampleSource --lane--> LaneSource: resolve, read, faults
        indexed shards (``IndexedSet``) | plain tars (``front_to_back``) | a user's pipeline (``user_pipeline``)

Not for: the choice of the next data set (``order/lanes``), reading ahead (``lane_packs``).
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
from data_pipeline.images.drawn_images import other_tokenizer
from data_pipeline.loader.front_to_back import StreamedSet, expand_shards
from data_pipeline.loader.user_pipeline import PipelineSet
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_lists import RunFaults
from data_pipeline.order.fault_policy import Fault, KnownFaults
from data_pipeline.order.lanes import LaneOrder, OrderConfig, SampleOrder
from data_pipeline.order.randomness import SampleRng
from data_pipeline.order.state import Cursor, Drawn, SamplePosition
from data_pipeline.packing.document_builder import DocumentBuilder, DocumentPlan
from data_pipeline.sample import Sample
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.storage.storage import Storage
from data_pipeline.text.tokenizer import Tokenizer

SkipReasons = Mapping[tuple[str, int, int], str]
"""(data set, epoch, sample) of samples that a run skipped, and the reason."""

_MAX_FAILED_READS = 3
"""A shard counts as lost after this many failed reads without a success between them."""


def dataset_seed(seed: int, name: str) -> int:
    """Hash a run's seed and a data set's name to 64 bits, so that data sets are shuffled independently."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


class LaneSource(SampleOrder, Protocol):
    """Order and samples of one lane of a data set."""

    @property
    def random_access(self) -> bool:
        """Whether samples can be read in any order. If not, read them in the order of the cursors."""

    @property
    def faults(self) -> KnownFaults:
        """The bad samples that the process knows."""

    def prepare(self, cursor: Cursor, waiting: Sequence[Drawn]) -> None:
        """Prepare to read the samples ``waiting`` again, then those from ``cursor`` on.

        Call it once, before the first read. It may be omitted: it only saves waiting time and memory.
        """

    def read(self, sample: int, epoch: int = 0) -> Sample:
        """Return a sample with its members in reading order."""

    def read_without_images(self, sample: int, epoch: int = 0) -> Sample:
        """Return a sample for a dry run; the bytes of its images may be missing."""


class SampleSource(Protocol):
    """The samples of a data set; the lanes of a process share it."""

    @property
    def num_samples(self) -> int:
        """Number of samples of an epoch; 0 if unknown."""

    def lane(self, lane: int, num_lanes: int) -> LaneSource:
        """Return the samples of one lane."""


@dataclass(frozen=True)
class IndexedSet:
    """A data set with a manifest: a ``SampleSource``.

    Attributes:
        reader: Reads the samples.
        seed: Seed of the order.
        order: How the samples are shuffled.
        faults: The bad samples that this process knows.
    """

    reader: SampleReader
    seed: int
    order: OrderConfig
    faults: IndexedFaults

    @property
    def num_samples(self) -> int:
        return self.reader.manifest.num_samples

    def lane(self, lane: int, num_lanes: int) -> IndexedLane:
        """Return the samples of one lane."""
        return IndexedLane(self, lane, num_lanes)


class IndexedLane:
    """The samples of one lane of a data set with a manifest: a ``LaneSource``.

    Args:
        shared: The data set.
        lane: Number of this lane.
        num_lanes: Number of lanes. Each sample occurs in one lane per epoch.
    """

    random_access = True

    def __init__(self, shared: IndexedSet, lane: int, num_lanes: int) -> None:
        self._reader, self._lane, self.faults = shared.reader, lane, shared.faults
        order = shared.order
        self._order = LaneOrder(shared.num_samples, order.block_size, order.window_blocks, shared.seed, lane, num_lanes)
        self._cursor: Cursor | None = None
        self._prefetched_window: tuple[int, int] | None = None

    def resolve(self, cursor: Cursor) -> tuple[SamplePosition, Cursor]:
        """Return the sample at ``cursor`` and the cursor after it."""
        position, self._cursor = self._order.resolve(cursor)
        return position, self._cursor

    def prepare(self, cursor: Cursor, waiting: Sequence[Drawn]) -> None:
        """Start to prefetch the window of ``cursor`` and the next one, if the data set is remote."""
        if self._reader.manifest.is_remote:
            self._prefetch(self._order.resolve(cursor)[1])

    def read(self, sample: int, epoch: int = 0) -> Sample:
        """As ``SampleReader.read``; at the first read of a remote window, prefetch this window and the next."""
        if self._cursor is not None and self._reader.manifest.is_remote:
            self._prefetch(self._cursor)
        return self._reader.read(sample, epoch, self._lane)

    def _prefetch(self, cursor: Cursor) -> None:
        window = cursor[:2]
        if self._prefetched_window != window:
            self._prefetched_window = window
            self._reader.prefetch(self._lane, self._order.blocks(cursor))

    def read_without_images(self, sample: int, epoch: int = 0) -> Sample:
        """As ``SampleReader.read_without_images``."""
        return self._reader.read_without_images(sample, epoch)


class IndexedFaults:
    """The bad samples and lost shards of one data set that this process knows: a ``KnownFaults``.

    Args:
        run: The faults of all data sets.
        reader: The reader of this data set.

    Raises:
        DataConfigError: ``data.faults.exclude`` names every sample of the data set.
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
        """Return the fault of a sample that need not be tried; None if the sample must be tried."""
        fault = self._run.excluded(self._reader.dataset, sample, self, "another manifest")
        if fault is not None:
            return fault
        if self._lost:
            error = self._lost.get(self._reader.manifest.locate(sample)[0])
            if error is not None:
                return Fault(error, counts=False, recalled=True)
        return self._run.recall(self._reader.dataset, sample)

    def locate(self, sample: int) -> tuple[str, str]:
        """Return shard and key of a sample; the key is ``?`` if the index of its shard cannot be read."""
        try:
            return self._reader.where(sample)
        except (ShardError, ManifestError):
            return self._shard_name(sample), "?"

    def offset(self, sample: int) -> int | None:
        """Return the byte offset of a sample in its shard; None if the shard is lost or its index cannot be read."""
        if self._lost and self._reader.manifest.locate(sample)[0] in self._lost:
            return None
        try:
            return self._reader.offset(sample)
        except (ShardError, ManifestError):
            return None

    def _shard_name(self, sample: int) -> str:
        manifest = self._reader.manifest
        return str(manifest.shard_location(manifest.locate(sample)[0]))

    def record_shard_failure(self, sample: int, error: ShardError | ManifestError) -> Fault:
        """Record that a sample could not be read. Return the fault of the sample alone, or of its whole shard.

        The shard is lost if its index cannot be opened again, it was replaced, or three reads failed without a success
        between them. All its samples are then skipped, and their faults do not count.

        Raises:
            TooManyFaultsError: lost shards contain more than ``max_share`` of the data set's samples, or all of them.
        """
        number = self._reader.manifest.locate(sample)[0]
        self._reader.forget(number)
        key = "?"
        try:
            key = self._reader.where(sample)[1]
            self._failed_reads[number] = self._failed_reads.get(number, 0) + 1
            lost = isinstance(error, ReplacedError) or self._failed_reads[number] >= _MAX_FAILED_READS
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

    def remember(self, sample: int, error: SampleError) -> None:
        """Remember the fault of a quarantined sample."""
        self._run.remember(self._reader.dataset, sample, error)

    def record_success(self, sample: int) -> None:
        """Reset the count of failed reads of the sample's shard."""
        if self._failed_reads:
            self._failed_reads.pop(self._reader.manifest.locate(sample)[0], None)


@dataclass(frozen=True)
class OpenDataset:
    """An open data set of the mixture; the lanes of a process share it.

    Attributes:
        config: Configuration of the data set.
        seed: Seed of the data set, from ``dataset_seed``.
        source: Its samples.
        builder: Builds documents from samples.
    """

    config: DatasetConfig
    seed: int
    source: SampleSource
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
        """Open a data set.

        Args:
            config: The data block, for the order.
            dataset: The data set.
            seed: Seed of the run.
            tokenizer: Encodes texts.
            spec: The model's inputs.
            faults: The bad samples that this process knows, of all data sets.
            storage: Reads remote shards.

        Raises:
            ManifestError, StorageError: the manifest is missing, damaged, or cannot be read from its URL.
            DataConfigError: the data set is empty or excluded as a whole, or its template, transforms or code do not
                work with this model.
            PipelineError: the user's factory of a pipeline failed.
        """
        order, own_seed = config.order, dataset_seed(seed, dataset.name)
        if dataset.manifest is not None:
            manifest = Manifest.open(dataset.manifest, storage)
            if manifest.num_samples == 0:
                raise DataConfigError(f"data set {dataset.name}: {dataset.manifest} holds no samples")
            builder = DocumentBuilder(with_image_tokenizer(dataset, manifest), tokenizer, spec)
            reader = SampleReader(manifest, dataset.name, max_text_bytes=dataset.max_text_bytes)
            indexed = IndexedSet(reader, own_seed, order, IndexedFaults(faults, reader))
            return cls(dataset, own_seed, indexed, builder)
        builder, streamed = DocumentBuilder(dataset, tokenizer, spec), None
        if dataset.shards:
            size = order.block_size * order.window_blocks
            sources = expand_shards(dataset.shards)
            streamed = StreamedSet(dataset.name, sources, own_seed, size, storage, faults, dataset.max_text_bytes)
            if not dataset.stages:
                return cls(dataset, own_seed, streamed, builder)
        return cls(dataset, own_seed, PipelineSet.open(dataset, own_seed, faults, streamed), builder)

    def plan(self, lane: LaneSource, drawn: Drawn) -> DocumentPlan:
        """Read a sample and plan its document. Calling the plan decodes the images.

        Raises:
            SampleError, ShardError, ManifestError: the sample cannot be read, or gives no valid document.
        """
        sample = lane.read(drawn.sample, drawn.epoch)
        return self.builder.plan(sample, SampleRng(self.seed, drawn.sample, drawn.epoch))


def with_image_tokenizer(dataset: DatasetConfig, manifest: Manifest | None) -> DatasetConfig:
    """Return the data set's configuration with the image tokenizer of its manifest, if it names none itself.

    Raises:
        DataConfigError: the manifest names another image tokenizer than the configuration.
    """
    tokens, found = dataset.image_tokens, None if manifest is None else manifest.image_tokenizer
    if tokens is None or tokens.encoded == "in_step" or found is None or found == tokens.tokenizer:
        return dataset
    if tokens.tokenizer is not None:
        raise DataConfigError(f"data set {dataset.name}: {other_tokenizer(found, tokens.tokenizer)}")
    return dataset.model_copy(update={"image_tokens": tokens.model_copy(update={"tokenizer": found})})


@dataclass(frozen=True)
class DryRunDataset(OpenDataset):
    """A data set whose documents are made without pixels, from text and image sizes.

    Attributes:
        skipped: Samples that count as bad, with the reason. A dry run cannot find damaged pixels itself.
    """

    skipped: SkipReasons

    @classmethod
    def from_open(cls, opened: OpenDataset, skipped: SkipReasons) -> DryRunDataset:
        """Return the dry-run form of an open data set."""
        return cls(opened.config, opened.seed, opened.source, opened.builder, skipped)

    def plan(self, lane: LaneSource, drawn: Drawn) -> DocumentPlan:
        reason = self.skipped.get((self.config.name, drawn.epoch, drawn.sample))
        if reason is not None:
            raise SampleError(reason)
        sample = lane.read_without_images(drawn.sample, drawn.epoch)
        return self.builder.plan(sample, SampleRng(self.seed, drawn.sample, drawn.epoch), pixels=False)
