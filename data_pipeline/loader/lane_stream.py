"""The endless documents of one lane: mixture, order, reading and building behind one position."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.document import Document, Empty, plain_empty
from data_pipeline.errors import DataConfigError, DataPipelineError
from data_pipeline.loader.front_to_back import StreamedSet, expand_shards
from data_pipeline.loader.indexed import IndexedLane, IndexedSet
from data_pipeline.loader.known_faults import RunFaults, SetFaults
from data_pipeline.loader.user_pipeline import PipelineSet
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.config import OrderConfig
from data_pipeline.order.fault_policy import Fault, FaultPolicy, Known, Skipped
from data_pipeline.order.lane_sequence import LaneSequence, Ordered
from data_pipeline.order.lanes import Cursor, Place
from data_pipeline.order.mixture import Schedule
from data_pipeline.order.sample_rng import Draws, SampleDraws
from data_pipeline.order.state import Drawn, LaneState, StreamPosition
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Budget, Made
from data_pipeline.sample import Sample
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.storage.storage import Storage
from data_pipeline.text.tokenizer import Tokenizer


def dataset_seed(seed: int, name: str) -> int:
    """64 bits of a run's seed and a data set's name, so that data sets are shuffled independently."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


Outline = Callable[[], Document]
"""A document whose images are decoded when it is called."""

Outlining = Callable[[Sample, Draws | None, Empty], Outline]
"""Plans a sample's document: answers and augmentation are drawn, its patches will go into memory that is asked for."""


class LaneSource(Ordered, Protocol):
    """Order and samples of one lane of a data set."""

    def prepare(self, cursor: Cursor, waiting: Sequence[Drawn]) -> None:
        """Prepare to read from a position: ``waiting`` are read again, then the samples from ``cursor`` on."""

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
    outline: Outlining
    measure: Callable[[Sample, Draws | None], Document]

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
        builder = DocumentBuilder(config, tokenizer, spec)
        seed = dataset_seed(seed, config.name)
        return cls(config, seed, _open_source(config, order, seed, faults, storage), builder.outline, builder.measure)


def _open_source(
    config: DatasetConfig, order: OrderConfig, seed: int, faults: RunFaults, storage: Storage
) -> IndexedSet | StreamedSet | PipelineSet:
    if config.manifest is None:
        streamed = None
        if config.shards:
            size = order.block_size * order.window_blocks
            sources = expand_shards(config.shards)
            streamed = StreamedSet(config.name, sources, seed, size, storage, faults, config.max_text_bytes)
        if streamed is None or config.stages:
            return PipelineSet.open(config, seed, faults, streamed)
        return streamed
    manifest = Manifest.open(config.manifest, storage)
    if manifest.num_samples == 0:
        raise DataConfigError(f"data set {config.name}: {config.manifest} holds no samples")
    reader = SampleReader(manifest, config.name, max_text_bytes=config.max_text_bytes)
    return IndexedSet(reader, seed, order, SetFaults(faults, reader))


class _Coming(NamedTuple):
    """A sample that was drawn ahead.

    Attributes:
        drawn: The sample.
        known: What is known of its faults.
        after: The position behind it.
        document: It, or what went wrong with it; a promise where threads decode; None if it was known for bad.
    """

    drawn: Drawn
    known: Known
    after: StreamPosition
    document: Document | Exception | Future[Document] | None

    def get(self) -> Document | None:
        """The document; raises what went wrong."""
        if isinstance(self.document, Exception):
            raise self.document
        return self.document.result() if isinstance(self.document, Future) else self.document


class LaneStream:
    """Documents of one lane, one after the other: a ``packing.Source``.

    Args:
        config: The data block.
        datasets: Open data sets, in the order of ``config.datasets``.
        schedule: Weights of the data sets over steps.
        lane: This lane.
        budget: Refuses documents that no pack can hold.
        state: Where to go on.
        empty: Where patches go.
        threads: Decode images; None decodes in the caller's thread.

    Attributes:
        step: The step whose pack is being made, for the schedule; the caller sets it.
        ahead: Samples that are drawn, read and decoded at once, before their turn comes. It changes no document, no
            position and no count of faults.
    """

    def __init__(
        self,
        config: DataConfig,
        datasets: Sequence[OpenDataset],
        schedule: Schedule,
        lane: int,
        budget: Budget,
        state: LaneState,
        empty: Empty = plain_empty,
        threads: Executor | None = None,
    ) -> None:
        self.step = 0
        self.ahead = 1
        self._lane = lane
        self._datasets = datasets
        self._budget = budget
        self._empty = empty
        self._threads = threads
        self._sources = [dataset.source.lane(lane, config.lanes) for dataset in datasets]
        max_epochs = [dataset.config.max_epochs for dataset in datasets]
        self._sequence = LaneSequence(self._sources, max_epochs, schedule, lane)
        self._position, self._waiting = state.position, state.waiting
        self._coming: deque[_Coming] = deque()
        self._is_clear = True  # Whether more may be drawn before what is coming was tried.
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
        if self._coming and not self._sequence.is_current(self._coming[0].after, self.step):
            self._coming.clear()  # Other weights hold now.
        self._is_clear = self._is_clear or not self._coming
        if not self._coming or self._threads is not None:  # Threads decode while the caller reads on.
            self._look_ahead()
        if not self._coming:
            return None
        coming = self._coming.popleft()
        self._position = coming.after
        documents = self._attempt(coming.drawn, coming.known, coming.get)
        drawn = coming.drawn
        return [Made(drawn._replace(part=part) if part else drawn, each) for part, each in enumerate(documents)]

    def remake(self, drawn: Drawn) -> Document | None:
        """A document that was drawn before, again; None if its sample went bad meanwhile.

        Raises:
            As ``make``.
        """
        sample = drawn._replace(part=0)
        if self._remade is None or self._remade[0] != sample:  # Parts of one sample wait one behind the other.
            try:  # What went well before says nothing new about how many of the last samples were bad.
                documents = self._budget.admit(self._outline(sample)())
            except Exception:  # The policy decides.
                documents = self._attempt(sample, self._sources[sample.dataset].known(sample.sample))
            self._remade = (sample, documents)
        documents = self._remade[1]
        return documents[drawn.part] if drawn.part < len(documents) else None

    def prepare(self) -> None:
        """Starts to fetch what the first reads need, so that lanes do not wait one after the other."""
        for number, (source, cursor) in enumerate(zip(self._sources, self._position.cursors, strict=True)):
            source.prepare(cursor, [drawn for drawn in self._waiting if drawn.dataset == number])

    def move(self, empty: Empty) -> None:
        """Copies the patches that were decoded ahead into memory that ``empty`` gives."""
        self._coming = deque(
            coming._replace(document=coming.document.moved(empty)) if isinstance(coming.document, Document) else coming
            for coming in self._coming
        )

    def take_skipped(self) -> tuple[Skipped, ...]:
        """Samples skipped since the last call."""
        skipped, self._skipped = tuple(self._skipped), []
        return skipped

    def _look_ahead(self) -> None:
        """Draws and reads some samples, then decodes them: either goes faster when the processor has it at hand."""
        position = self._coming[-1].after if self._coming else self._position
        begun = list[tuple[Drawn, Known, StreamPosition, Outline | Exception | None]]()
        while self._is_clear and len(self._coming) + len(begun) < self.ahead:
            try:
                drawn, position = self._sequence.draw(position, self.step)
            except DataPipelineError:
                if not begun and not self._coming:
                    raise
                self._is_clear = False  # It is met again when its turn comes.
                break
            if drawn is None:
                break
            source = self._sources[drawn.dataset]
            known = source.known(drawn.sample)
            outline = self._begin(drawn, known)
            begun.append((drawn, known, position, outline))
            # What failed may have cost its whole shard; and a pipe cannot go back to say more about a sample.
            self._is_clear = not isinstance(outline, Exception) and isinstance(source, IndexedLane)
        if not begun and not self._coming:
            self._position = position
        for drawn, known, after, outline in begun:
            made = self._decode(outline) if callable(outline) else outline
            self._coming.append(_Coming(drawn, known, after, made))

    def _begin(self, drawn: Drawn, known: Known) -> Outline | Exception | None:
        """The sample without its pixels, or why not; None if it need not be tried."""
        if known.recall() is not None:
            return None
        try:
            return self._outline(drawn)
        except Exception as error:  # Its turn comes when the samples before it were counted.
            return error

    def _decode(self, outline: Outline) -> Document | Exception | Future[Document]:
        if self._threads is not None:
            return self._threads.submit(outline)
        try:
            return outline()
        except Exception as error:
            return error

    def _attempt(self, drawn: Drawn, known: Known, get: Callable[[], Document | None] = lambda: None) -> list[Document]:
        """The documents of a sample; none if it is skipped, which is noted.

        Args:
            drawn: The sample.
            known: What is known of its faults.
            get: The document if it was decoded ahead.
        """
        result = self._policy.attempt(lambda: self._budget.admit(get() or self._outline(drawn)()), known)
        if isinstance(result, Fault):
            origin = (self._datasets[drawn.dataset].config.name, drawn.epoch, drawn.sample, self._lane)
            self._skipped.append(self._policy.skipped(result, *origin, known.offset()))
            return []
        return result

    def _outline(self, drawn: Drawn) -> Outline:
        dataset = self._datasets[drawn.dataset]
        sample = self._sources[drawn.dataset].read(drawn.sample, drawn.epoch)
        draws = SampleDraws(dataset.seed, Place(drawn.sample, drawn.epoch))
        return dataset.outline(sample, draws, self._empty)
