"""The packs of some lanes, step by step, for the loader and for replays without pixels.

    LaneSequence --draw--> DecodeAhead --read, plan, decode--> PendingDocument
                 --FaultPolicy, Budget--> LaneStream --Packer--> Pack                       for each lane

The state of a lane is its position in the order, the documents that wait to be packed, and its fault counters. Not for:
batches and processes (``loader``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.config import DataConfig
from data_pipeline.document import Document
from data_pipeline.errors import DataPipelineError, TooManyFaultsError
from data_pipeline.loader.fingerprint import schedule_of
from data_pipeline.loader.sample_source import DryRunDataset, LaneSource, OpenDataset, SkipReasons
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_lists import RunFaults
from data_pipeline.order.fault_policy import Fault, FaultPolicy, Skipped
from data_pipeline.order.lanes import LaneSequence, Schedule
from data_pipeline.order.state import Drawn, LaneState, StreamPosition
from data_pipeline.packing.document_builder import DocumentPlan
from data_pipeline.packing.packer import Budget, DrawnDocument, Pack, Packer
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.storage.storage import Storage
from data_pipeline.text.tokenizer import load_tokenizer

_MOST_AHEAD = 4
"""Most samples that a lane reads before it decodes them; the bytes of more would not stay in the processor's cache."""


@dataclass(frozen=True)
class PendingDocument:
    """A drawn sample and its document, which may still be decoding.

    Attributes:
        drawn: The sample.
        after: The position of the lane after this sample.
        document: ``result()`` waits for the document and raises the error of reading, planning or decoding.
    """

    drawn: Drawn
    after: StreamPosition
    document: Future[Document]


class DecodeAhead:
    """The queue of samples of one lane that are read and decoded before they are needed.

    Its length never changes the result. Samples leave it in the order in which they were drawn, each with its document
    or its error. Samples that were drawn under other mixture weights are dropped and drawn again.

    Args:
        sequence: The order of the lane's samples.
        datasets: The open data sets of the mixture.
        sources: The lane's samples in each data set.
        threads: Thread pool that decodes images; None decodes in the caller's thread.

    Attributes:
        depth: Number of samples that are drawn, read and decoded ahead.
    """

    def __init__(
        self,
        sequence: LaneSequence,
        datasets: Sequence[OpenDataset],
        sources: Sequence[LaneSource],
        threads: Executor | None,
    ) -> None:
        self.depth = 1
        self._sequence, self._datasets, self._sources, self._threads = sequence, datasets, sources, threads
        self._queue: deque[PendingDocument] = deque()
        self._may_draw = True  # False after a failed read or a read without random access, until the queue is empty.

    def next(self, position: StreamPosition, step: int) -> tuple[StreamPosition, PendingDocument | None]:
        """Return the position after the next sample, and the sample.

        The sample is None if every data set with a weight above 0 at ``step`` is exhausted. Pass the position that the
        previous call returned: samples that are in the queue follow that position.

        Raises:
            DataPipelineError: the next sample cannot be determined, for example because a pipeline failed.
        """
        if self._queue and not self._sequence.is_current(self._queue[0].after, step):
            self._queue.clear()  # The mixture weights changed.
        self._may_draw = self._may_draw or not self._queue
        if not self._queue or self._threads is not None:  # Threads decode while the caller reads the next samples.
            end = self._fill_queue(position, step)
            if not self._queue:
                return end, None
        turn = self._queue.popleft()
        return turn.after, turn

    def _fill_queue(self, position: StreamPosition, step: int) -> StreamPosition:
        """Draw and read samples until the queue has ``depth`` of them, then decode the new ones.

        Two loops, because the code of each then stays in the CPU's cache.
        """
        position = self._queue[-1].after if self._queue else position
        begun = list[tuple[Drawn, StreamPosition, DocumentPlan | Exception]]()
        while self._may_draw and len(self._queue) + len(begun) < self.depth:
            try:
                drawn, position = self._sequence.draw(position, step)
            except DataPipelineError:
                if not begun and not self._queue:
                    raise
                self._may_draw = False  # Draw it again, and raise, when the samples before it were consumed.
                break
            if drawn is None:
                break
            source = self._sources[drawn.dataset]
            fault = source.faults.recall(drawn.sample)
            self._may_draw = source.random_access
            plan: DocumentPlan | Exception
            try:
                plan = self._datasets[drawn.dataset].plan(source, drawn) if fault is None else fault.error
            except Exception as error:  # Queue it: the fault policy counts faults in the order of the samples.
                plan = error
                self._may_draw = False  # The failure may have invalidated the whole shard.
            begun.append((drawn, position, plan))
        for drawn, after, plan in begun:
            self._queue.append(PendingDocument(drawn, after, self._decode(plan)))
        return position

    def _decode(self, plan: DocumentPlan | Exception) -> Future[Document]:
        if self._threads is not None and isinstance(plan, DocumentPlan):
            return self._threads.submit(plan)
        document: Future[Document] = Future()  # Resolved before it is returned.
        try:
            if isinstance(plan, Exception):
                document.set_exception(plan)
            else:
                document.set_result(plan())
        except Exception as error:
            document.set_exception(error)
        return document


class LaneStream:
    """The documents of one lane in order: a ``packer.DocumentSource``.

    Args:
        config: The data block.
        datasets: Open data sets, in the order of ``config.datasets``.
        schedule: Weights of the data sets over steps.
        lane: Number of this lane.
        budget: Cuts or rejects documents that no pack can hold.
        state: The state to continue from.
        threads: Thread pool that decodes images; None decodes in the caller's thread.

    Attributes:
        step: The step whose pack is being made; the caller must set it before each pack, because the mixture weights
            depend on it.
        position: Position of the next sample.
        ahead: The samples that were read ahead.
        policy: Counts bad samples.
        skipped: Bad samples that were skipped; the caller reads and clears the list.
    """

    def __init__(
        self,
        config: DataConfig,
        datasets: Sequence[OpenDataset],
        schedule: Schedule,
        lane: int,
        budget: Budget,
        state: LaneState,
        threads: Executor | None = None,
    ) -> None:
        self.step = 0
        self._lane, self._datasets, self._budget = lane, datasets, budget
        self._sources = [dataset.source.lane(lane, config.lanes) for dataset in datasets]
        sequence = LaneSequence(self._sources, [each.config.max_epochs for each in datasets], schedule, lane)
        self.ahead = DecodeAhead(sequence, datasets, self._sources, threads)
        self.position, self._waiting = state.position, state.waiting
        self.policy = FaultPolicy(config.faults, state.faults)
        self.skipped: list[Skipped] = []
        self._remade: tuple[Drawn, list[Document]] | None = None

    def make(self) -> list[DrawnDocument] | None:
        """Draw the next sample and return its documents: an empty list if it was skipped.

        Returns None if every data set with a weight above 0 at ``step`` is exhausted.

        Raises:
            TooManyFaultsError: too many samples are bad.
            DataPipelineError: a shard is missing, stale or damaged; or a sample is bad and the policy is ``fail``.
        """
        self.position, turn = self.ahead.next(self.position, self.step)
        if turn is None:
            return None
        documents = self._attempt(turn.drawn, turn.document.result)
        return [DrawnDocument(turn.drawn._replace(part=part), each) for part, each in enumerate(documents)]

    def remake(self, drawn: Drawn) -> Document | None:
        """Return a document that was drawn before; None if its sample has become bad.

        Raises:
            As ``make``.
        """
        sample = drawn._replace(part=0)
        if self._remade is None or self._remade[0] != sample:  # The waiting parts of one sample are consecutive.
            try:  # Without the policy: a sample that was counted as good when it was drawn must not count twice.
                documents = self._budget.admit(self._read(sample))
            except Exception:  # A second attempt, under the policy.
                documents = self._attempt(sample, lambda: self._read(sample))
            self._remade = (sample, documents)
        documents = self._remade[1]
        return documents[drawn.part] if drawn.part < len(documents) else None

    def prepare(self) -> None:
        """Start to prefetch the data of the first reads, so that all lanes fetch in parallel."""
        for number, (source, cursor) in enumerate(zip(self._sources, self.position.cursors, strict=True)):
            source.prepare(cursor, [drawn for drawn in self._waiting if drawn.dataset == number])

    def _read(self, drawn: Drawn) -> Document:
        return self._datasets[drawn.dataset].plan(self._sources[drawn.dataset], drawn)()

    def _attempt(self, drawn: Drawn, make: Callable[[], Document]) -> list[Document]:
        """Return the documents of a sample; if it is bad, add it to ``skipped`` and return none."""
        known = self._sources[drawn.dataset].faults
        result = self.policy.attempt(lambda: self._budget.admit(make()), known, drawn.sample)
        if isinstance(result, Fault):
            origin = (self._datasets[drawn.dataset].config.name, drawn.epoch, drawn.sample, self._lane)
            self.skipped.append(self.policy.skipped(result, *origin, known.offset(drawn.sample)))
            return []
        return result


class LanePacks:
    """The packs of some lanes, step by step.

    Args:
        config: The data block.
        spec: The model's inputs.
        seed: Seed of the run.
        step: Number of the first step.
        states: The lanes and the state that each continues from.
        quarantine: Quarantine lists that this run wrote about these data; no pack depends on them.
        decode_threads: Number of threads that decode images while the caller works; 0 decodes in the caller's thread.
        dry_run: None decodes images. Otherwise documents are made without pixels (a dry run), and the samples in this
            mapping count as bad.

    Attributes:
        step: Number of the next step.

    Raises:
        DataPipelineError: a data set cannot be opened, or a waiting document cannot be made again.
    """

    def __init__(
        self,
        config: DataConfig,
        spec: MediaSpec,
        seed: int,
        step: int,
        states: Mapping[int, LaneState],
        *,
        quarantine: Sequence[Path] = (),
        decode_threads: int = 0,
        dry_run: SkipReasons | None = None,
    ) -> None:
        self.step = step
        self._config, self._least_ahead = config, 2 if decode_threads else 1
        tokenizer = load_tokenizer(config.tokenizer)
        self._budget = Budget(config.packing, spec, dummy_document(spec, tokenizer.pad_id))
        faults = RunFaults.load(config.faults, quarantine)
        self._storage = Storage(config.storage, config.cache)
        opened = [
            OpenDataset.open(config, dataset, seed, tokenizer, spec, faults, self._storage)
            for dataset in config.datasets
        ]
        self._datasets = opened if dry_run is None else [DryRunDataset.from_open(each, dry_run) for each in opened]
        self._schedule = schedule_of(config, {each.config.name: each.source.num_samples for each in opened})
        self._threads = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode") if decode_threads else None
        self._streams = {lane: self._stream(lane, state) for lane, state in states.items()}
        if dry_run is None:
            for stream in self._streams.values():
                stream.prepare()
        self._packers = {
            lane: Packer(stream, self._budget, lane, states[lane].waiting) for lane, stream in self._streams.items()
        }

    def _stream(self, lane: int, state: LaneState) -> LaneStream:
        return LaneStream(self._config, self._datasets, self._schedule, lane, self._budget, state, self._threads)

    def next_packs(self) -> dict[int, Pack]:
        """Return the pack of each lane for the next step.

        Raises:
            TooManyFaultsError: too many samples are bad; ``error.skipped`` lists those skipped in this step.
            DataPipelineError: a shard is missing, stale or damaged; or a sample is bad and the policy is ``fail``.
        """
        packs: dict[int, Pack] = {}
        try:
            for lane, packer in self._packers.items():
                stream = self._streams[lane]
                stream.step = self.step
                packs[lane] = pack = packer.next_pack()
                # Decoded documents occupy memory until the next step, so decode few of a pack's documents ahead.
                stream.ahead.depth = max(self._least_ahead, min(_MOST_AHEAD, len(pack.documents) // 8))
        except TooManyFaultsError as error:
            error.skipped = self.pop_skipped()
            raise
        self.step += 1
        return packs

    def states(self) -> dict[int, LaneState]:
        """Return the state of each lane after its last pack."""
        return {
            lane: LaneState(*packer.state(), self._streams[lane].policy.state())
            for lane, packer in self._packers.items()
        }

    def pop_skipped(self) -> tuple[Skipped, ...]:
        """Return the samples that were skipped since the last call, and forget them."""
        skipped = tuple(skip for stream in self._streams.values() for skip in stream.skipped)
        for stream in self._streams.values():
            stream.skipped.clear()
        return skipped

    @property
    def exhausted(self) -> bool:
        """Whether no lane has a sample or a waiting document left."""
        return all(packer.exhausted for packer in self._packers.values())

    def remake(self, drawn: Drawn) -> tuple[Document | None, tuple[Skipped, ...]]:
        """Make a document again that any lane drew, without effect on the lanes.

        Returns:
            The document, or None and the fault of its sample.

        Raises:
            ShardError, ManifestError, StorageError: the shard is missing, stale or damaged.
        """
        stream = self._stream(0, LaneState(StreamPosition.start(len(self._datasets))))
        document = stream.remake(drawn)
        return document, tuple(stream.skipped)

    def close(self) -> None:
        """Stop the threads and close the storage."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._storage.close()
