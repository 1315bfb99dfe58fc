"""The endless documents of one lane: mixture, order, reading and building behind one position."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from data_pipeline.config import DataConfig, DatasetConfig, OrderConfig
from data_pipeline.document import Document
from data_pipeline.documents import DocumentBuilder
from data_pipeline.draws import Draws, SampleDraws
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.faults import Fault, FaultPolicy, Known, Skipped
from data_pipeline.indexed import IndexedLane, IndexedSet
from data_pipeline.known_faults import RunFaults, SetFaults
from data_pipeline.lanes import Cursor, Place
from data_pipeline.media_spec import MediaSpec
from data_pipeline.mixture import Mixture, Schedule
from data_pipeline.packing import Budget, Made
from data_pipeline.reader import SampleReader
from data_pipeline.sample import Sample
from data_pipeline.shards.manifest import Manifest
from data_pipeline.state import Drawn, LaneState, StreamPosition
from data_pipeline.storage.storage import Storage
from data_pipeline.streamed import StreamedSet, expand_shards
from data_pipeline.tokenizer import Tokenizer


def dataset_seed(seed: int, name: str) -> int:
    """64 bits of a run's seed and a data set's name, so that data sets are shuffled independently."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


Build = Callable[[Sample, Draws | None], Document]
"""Makes a sample's document; answers and augmentation are drawn."""


class LaneSource(Protocol):
    """Order and samples of one lane of a data set."""

    def resolve(self, cursor: Cursor) -> tuple[Place, Cursor]:
        """The sample at ``cursor`` and the cursor after it."""

    def read(self, sample: int, epoch: int = 0) -> Sample:
        """The sample with its members in reading order."""

    def read_outline(self, sample: int, epoch: int = 0) -> Sample:
        """The sample, its images perhaps without their bytes."""

    def known(self, sample: int) -> Known:
        """What is known of the sample's faults."""


class Source(Protocol):
    """What the lanes of a process share of a data set."""

    @property
    def num_samples(self) -> int:
        """Samples of an epoch; 0 if nobody counted them."""

    def lane(self, lane: int, num_lanes: int) -> LaneSource:
        """The samples of one lane."""


@dataclass(frozen=True)
class OpenDataset:
    """One data set of the mixture, open in this process; lanes share it."""

    config: DatasetConfig
    seed: int
    source: Source
    build: Build
    measure: Build

    @classmethod
    def open(
        cls,
        config: DatasetConfig,
        order: OrderConfig,
        seed: int,
        tokenizer: Tokenizer,
        spec: MediaSpec,
        faults: RunFaults,
        storage: Storage,
    ) -> OpenDataset:
        """Opens source and builder; ``faults`` is what this process knows of bad samples.

        Raises:
            ManifestError: the manifest is missing or damaged.
            DataConfigError: it is empty or wholly excluded, or the transforms do not fit the model.
        """
        build = DocumentBuilder(config, tokenizer, spec)
        seed = dataset_seed(seed, config.name)
        return cls(config, seed, _open_source(config, order, seed, faults, storage), build, build.measure)


def _open_source(
    config: DatasetConfig, order: OrderConfig, seed: int, faults: RunFaults, storage: Storage
) -> IndexedSet | StreamedSet:
    if config.manifest is None:
        size = order.block_size * order.window_blocks
        return StreamedSet(config.name, expand_shards(config.shards), seed, size, storage, faults)
    manifest = Manifest.open(config.manifest, storage)
    if manifest.num_samples == 0:
        raise DataConfigError(f"data set {config.name}: {config.manifest} holds no samples")
    reader = SampleReader(manifest, config.name)
    return IndexedSet(reader, seed, order, SetFaults(faults, reader))


class LaneStream:
    """Documents of one lane, one after the other: a ``packing.Source``.

    Args:
        config: The data block.
        datasets: Open data sets, in the order of ``config.datasets``.
        schedule: Weights of the data sets over steps.
        lane: This lane.
        budget: Refuses documents that no pack can hold.
        state: Where to go on.

    Attributes:
        step: The step whose pack is being made, for the schedule; the caller sets it.
    """

    def __init__(
        self,
        config: DataConfig,
        datasets: Sequence[OpenDataset],
        schedule: Schedule,
        lane: int,
        budget: Budget,
        state: LaneState,
    ) -> None:
        self.step = 0
        self._lane = lane
        self._datasets = datasets
        self._schedule = schedule
        self._budget = budget
        self._sources = [dataset.source.lane(lane, config.lanes) for dataset in datasets]
        self._position = state.position
        self._mixtures: dict[tuple[int, int], Mixture | None] = {}
        self._policy = FaultPolicy(config.faults, state.faults)
        self._skipped: list[Skipped] = []
        self._remade: tuple[Drawn, list[Document]] | None = None

    def position(self) -> StreamPosition:
        """Where the next document is drawn from."""
        return self._position

    def faults(self) -> tuple[int, ...]:
        """Counters of the fault policy."""
        return self._policy.state()

    def make(self) -> list[Made] | None:
        """Draws the next sample: its documents, none if it was skipped; None when every data set is used up.

        Raises:
            TooManyFaultsError: too many bad samples.
            DataPipelineError: a shard is missing, stale or damaged; or a bad sample under ``fail``.
        """
        drawn = self._draw()
        if drawn is None:
            return None
        documents = self._attempt(drawn)
        return [Made(drawn._replace(part=part), document) for part, document in enumerate(documents)]

    def remake(self, drawn: Drawn) -> Document | None:
        """A document that was drawn before, again; None if its sample went bad meanwhile.

        Raises:
            As ``make``.
        """
        sample = drawn._replace(part=0)
        if self._remade is None or self._remade[0] != sample:  # Parts of one sample wait one behind the other.
            try:  # What went well before says nothing new about how many of the last samples were bad.
                documents = self._documents(sample)
            except Exception:  # The policy decides.
                documents = self._attempt(sample)
            self._remade = (sample, documents)
        documents = self._remade[1]
        return documents[drawn.part] if drawn.part < len(documents) else None

    def prepare(self) -> None:
        """Starts to fetch what the first reads need, so that lanes do not wait one after the other."""
        for source, cursor in zip(self._sources, self._position.cursors, strict=True):
            if isinstance(source, IndexedLane):
                source.prepare(cursor)

    def take_skipped(self) -> tuple[Skipped, ...]:
        """Samples skipped since the last call."""
        skipped, self._skipped = tuple(self._skipped), []
        return skipped

    def _draw(self) -> Drawn | None:
        position = self._enter_phase(self._schedule.phase(self.step), self._position.exhausted)
        while (mixture := self._mixture(position.phase, position.exhausted)) is not None:
            chosen = mixture.choose(position.draws)
            place, after = self._sources[chosen].resolve(position.cursors[chosen])
            most = self._datasets[chosen].config.max_epochs
            if most is not None and place.epoch >= most:
                position = self._enter_phase(position.phase, position.exhausted | 1 << chosen)
                continue
            draws, cursors = list(position.draws), list(position.cursors)
            draws[chosen] += 1
            cursors[chosen] = after
            self._position = StreamPosition(tuple(draws), tuple(cursors), position.phase, position.exhausted)
            return Drawn(chosen, place.epoch, place.sample)
        return None

    def _enter_phase(self, phase: int, exhausted: int) -> StreamPosition:
        """The position, its draws counted anew if the mixture is another one now."""
        position = self._position
        if (phase, exhausted) != (position.phase, position.exhausted):
            fresh = (0,) * len(position.draws)
            position = self._position = StreamPosition(fresh, position.cursors, phase, exhausted)
        return position

    def _mixture(self, phase: int, exhausted: int) -> Mixture | None:
        """The mixture of what is left in a phase; None if nothing is."""
        key = (phase, exhausted)
        if key not in self._mixtures:
            weights = [0.0 if exhausted >> i & 1 else w for i, w in enumerate(self._schedule.weights[phase])]
            self._mixtures[key] = Mixture(weights, self._lane) if any(weights) else None
        return self._mixtures[key]

    def _attempt(self, drawn: Drawn) -> list[Document]:
        """The documents of a sample; none if it is skipped, which is noted."""
        dataset = self._datasets[drawn.dataset]
        known = self._sources[drawn.dataset].known(drawn.sample)
        result = self._policy.attempt(lambda: self._documents(drawn), known)
        if isinstance(result, Fault):
            origin = (dataset.config.name, drawn.epoch, drawn.sample, self._lane)
            self._skipped.append(self._policy.skipped(result, *origin, known.offset()))
            return []
        return result

    def _documents(self, drawn: Drawn) -> list[Document]:
        dataset = self._datasets[drawn.dataset]
        sample = self._sources[drawn.dataset].read(drawn.sample, drawn.epoch)
        document = dataset.build(sample, SampleDraws(dataset.seed, Place(drawn.sample, drawn.epoch)))
        try:
            return self._budget.admit(document)
        except SampleError as error:
            raise error.located(sample.provenance.shard, sample.provenance.key) from error
