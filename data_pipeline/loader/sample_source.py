"""Where the samples of a lane come from: indexed shards, plain tars or a pipeline of the user, behind one interface.

    DatasetConfig --OpenDataset.open--> Source --lane--> LaneSource: resolve, read, faults

Not for: which data set is next (``order/mixture``), reading ahead (``decode_ahead``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.loader.front_to_back import StreamedSet, expand_shards
from data_pipeline.loader.indexed import IndexedFaults, IndexedSet
from data_pipeline.loader.user_pipeline import PipelineSet
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_lists import RunFaults
from data_pipeline.order.fault_policy import KnownFaults
from data_pipeline.order.lanes import Cursor
from data_pipeline.order.mixture import Ordered
from data_pipeline.order.randomness import SampleDraws
from data_pipeline.order.state import Drawn
from data_pipeline.packing.document_builder import DocumentBuilder, Outline
from data_pipeline.sample import Sample
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.storage.storage import Storage
from data_pipeline.text.tokenizer import Tokenizer

Skips = Mapping[tuple[str, int, int], str]
"""(data set, epoch, sample) of samples that a run left out, and why."""


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
        builder, order, own_seed = (
            DocumentBuilder(dataset, tokenizer, spec),
            config.order,
            dataset_seed(seed, dataset.name),
        )
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
