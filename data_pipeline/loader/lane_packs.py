"""Packs of some lanes, step after step: what every rank trains on, and what a replay measures.

    OpenDataset --DecodeAhead--> Turn --FaultPolicy, Budget--> LaneStream --Packer--> Pack     one such row a lane

A lane's state is where it draws next, what waits to be packed, and its fault counters. Not for: batches and processes
(``loader``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

from data_pipeline.config import DataConfig
from data_pipeline.document import Document
from data_pipeline.errors import TooManyFaultsError
from data_pipeline.loader.decode_ahead import DecodeAhead
from data_pipeline.loader.fingerprint import schedule_of
from data_pipeline.loader.sample_source import MeasuredDataset, OpenDataset, Skips
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_lists import RunFaults
from data_pipeline.order.fault_policy import Fault, FaultPolicy, Skipped
from data_pipeline.order.lanes import LaneSequence, Schedule
from data_pipeline.order.state import Drawn, LaneState, StreamPosition
from data_pipeline.packing.document_builder import null_document
from data_pipeline.packing.packer import Budget, Made, Pack, Packer
from data_pipeline.storage.storage import Storage
from data_pipeline.text.tokenizer import load_tokenizer

_MOST_AHEAD = 4
"""Samples that are decoded at once: of more of them the bytes would not stay in the processor's cache meanwhile."""


class LaneStream:
    """Documents of one lane, one after the other: a ``packer.Source``.

    Args:
        config: The data block.
        datasets: Open data sets, in the order of ``config.datasets``.
        schedule: Weights of the data sets over steps.
        lane: This lane.
        budget: Refuses documents that no pack can hold.
        state: Where to go on.
        threads: Decode images; None decodes in the caller's thread.

    Attributes:
        step: The step whose pack is being made, for the schedule; the caller sets it.
        position: Where the next document is drawn from.
        ahead: Makes documents before their turn.
        policy: Counts bad samples.
        skipped: Bad samples that were left out; the caller takes them away.
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

    def make(self) -> list[Made] | None:
        """Draws the next sample: its documents, none if it was skipped; None when every data set is used up.

        Raises:
            TooManyFaultsError: too many bad samples.
            DataPipelineError: a shard is missing, stale or damaged; or a bad sample under ``fail``.
        """
        self.position, turn = self.ahead.next(self.position, self.step)
        if turn is None:
            return None
        documents = self._attempt(turn.drawn, turn.document.result)
        return [Made(turn.drawn._replace(part=part), each) for part, each in enumerate(documents)]

    def remake(self, drawn: Drawn) -> Document | None:
        """A document that was drawn before, again; None if its sample went bad meanwhile.

        Raises:
            As ``make``.
        """
        sample = drawn._replace(part=0)
        if self._remade is None or self._remade[0] != sample:  # Parts of one sample wait one behind the other.
            try:  # What went well before says nothing new about how many of the last samples were bad.
                documents = self._budget.admit(self._read(sample))
            except Exception:  # The policy decides.
                documents = self._attempt(sample, lambda: self._read(sample))
            self._remade = (sample, documents)
        documents = self._remade[1]
        return documents[drawn.part] if drawn.part < len(documents) else None

    def prepare(self) -> None:
        """Starts to fetch what the first reads need, so that lanes do not wait one after the other."""
        for number, (source, cursor) in enumerate(zip(self._sources, self.position.cursors, strict=True)):
            source.prepare(cursor, [drawn for drawn in self._waiting if drawn.dataset == number])

    def _read(self, drawn: Drawn) -> Document:
        return self._datasets[drawn.dataset].outline(self._sources[drawn.dataset], drawn)()

    def _attempt(self, drawn: Drawn, make: Callable[[], Document]) -> list[Document]:
        """The documents of a sample; none if it is skipped, which is noted."""
        known = self._sources[drawn.dataset].faults
        result = self.policy.attempt(lambda: self._budget.admit(make()), known, drawn.sample)
        if isinstance(result, Fault):
            origin = (self._datasets[drawn.dataset].config.name, drawn.epoch, drawn.sample, self._lane)
            self.skipped.append(self.policy.skipped(result, *origin, known.offset(drawn.sample)))
            return []
        return result


class LanePacks:
    """The packs of some lanes, step after step.

    Args:
        config: The data block.
        spec: What the model takes.
        seed: Seed of the run.
        step: Number of the first step.
        states: The lanes, each with where it goes on.
        quarantine: Lists that this run wrote over these data; no pack depends on them.
        decode_threads: Threads that decode images beside what the caller does; 0 decodes in the caller's thread.
        measured: None decodes images. Else documents have no pixels, and these samples are bad ones.

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
        measured: Skips | None = None,
    ) -> None:
        self.step = step
        self._config, self._least_ahead = config, 2 if decode_threads else 1
        tokenizer = load_tokenizer(config.tokenizer)
        self._budget = Budget(config.packing, spec, null_document(spec, tokenizer.pad_id))
        faults = RunFaults.load(config.faults, quarantine)
        self._storage = Storage(config.storage, config.cache)
        opened = [
            OpenDataset.open(config, dataset, seed, tokenizer, spec, faults, self._storage)
            for dataset in config.datasets
        ]
        self._datasets = opened if measured is None else [MeasuredDataset.of(each, measured) for each in opened]
        self._schedule = schedule_of(config, {each.config.name: each.source.num_samples for each in opened})
        self._threads = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode") if decode_threads else None
        self._streams = {lane: self._stream(lane, state) for lane, state in states.items()}
        if measured is None:
            for stream in self._streams.values():
                stream.prepare()
        self._packers = {
            lane: Packer(stream, self._budget, lane, states[lane].waiting) for lane, stream in self._streams.items()
        }

    def _stream(self, lane: int, state: LaneState) -> LaneStream:
        return LaneStream(self._config, self._datasets, self._schedule, lane, self._budget, state, self._threads)

    def next_packs(self) -> dict[int, Pack]:
        """The pack of each lane for the next step.

        Raises:
            TooManyFaultsError: too many bad samples; it lists those that were skipped on the way.
            DataPipelineError: a shard is missing, stale or damaged; or a bad sample under ``fail``.
        """
        packs: dict[int, Pack] = {}
        try:
            for lane, packer in self._packers.items():
                stream = self._streams[lane]
                stream.step = self.step
                packs[lane] = pack = packer.next_pack()
                # What was decoded ahead waits for the next step: few of a pack, however large they are.
                stream.ahead.depth = max(self._least_ahead, min(_MOST_AHEAD, len(pack.documents) // 8))
        except TooManyFaultsError as error:
            error.skipped = self.take_skipped()
            raise
        self.step += 1
        return packs

    def states(self) -> dict[int, LaneState]:
        """Where each lane stands behind its last pack."""
        return {
            lane: LaneState(*packer.state(), self._streams[lane].policy.state())
            for lane, packer in self._packers.items()
        }

    def take_skipped(self) -> tuple[Skipped, ...]:
        """Samples that were left out since the last call."""
        skipped = tuple(skip for stream in self._streams.values() for skip in stream.skipped)
        for stream in self._streams.values():
            stream.skipped.clear()
        return skipped

    @property
    def exhausted(self) -> bool:
        """Whether no lane has anything left."""
        return all(packer.exhausted for packer in self._packers.values())

    def remake(self, drawn: Drawn) -> tuple[Document | None, tuple[Skipped, ...]]:
        """A document that some lane drew, without effect on the lanes; or what is wrong with its sample.

        Raises:
            ShardError, ManifestError, StorageError: its shard is missing, stale or damaged.
        """
        stream = self._stream(0, LaneState(StreamPosition.start(len(self._datasets))))
        document = stream.remake(drawn)
        return document, tuple(stream.skipped)

    def close(self) -> None:
        """Ends what is under way."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._storage.close()
