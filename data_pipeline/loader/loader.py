"""The loader: the batches of one rank, step by step.

    lanes of this rank --divided among--> workers --one item per step--> microbatches --> StepBatch

Lanes are divided among ranks, and the lanes of a rank among its workers. The content of a lane depends on neither, so
the global batch is the same for any number of ranks and workers. Not for: evaluation, which reads samples in stored
order (``sample_reader.read_samples``).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import weakref
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataConfigError, DataPipelineError
from data_pipeline.loader.fingerprint import fingerprint, schedule_of
from data_pipeline.loader.front_to_back import any_remote, expand_shards
from data_pipeline.loader.lane_packs import LanePacks
from data_pipeline.loader.sample_source import with_image_tokenizer
from data_pipeline.loader.shared_buffers import BatchMessage, BatchReceiver, BatchSender
from data_pipeline.loader.user_code import load as load_code
from data_pipeline.loader.workers import Workers
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_policy import Skipped
from data_pipeline.order.state import Drawn, LaneState, LoaderState, StreamPosition
from data_pipeline.packing.collate import Join, collate, concatenate, join_copies
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Budget, Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.storage.storage import Storage
from data_pipeline.text.tokenizer import load_tokenizer

__all__ = ["DocumentBuilder", "Loader", "LoaderState", "StepBatch", "dummy_document", "read_samples"]

_DECODE_THREADS = 2
"""Decode threads of a loader without workers. While one waits for Python's lock, the other decodes."""


@dataclass(frozen=True, repr=False)
class StepBatch:
    """The batch of one rank in one step.

    Attributes:
        step: Number of the step, from 0.
        microbatches: The microbatches; every rank has the same number of them.
        skipped: Bad samples that were skipped while the step was made, sorted by lane.
        state: State of this rank's lanes after the step; ``state.step`` is ``step + 1``.
        num_samples: Number of this rank's documents, without dummy documents.
        num_tokens: Number of their tokens.
        num_cut: Number of documents that are only a part of their sample (``packing.too_long``).
        drawn: For each lane the samples of its documents, without dummy documents, in the order of the microbatches.
        exhausted: Whether this rank's lanes have no document left: every data set with a weight above 0 has reached its
            ``max_epochs``.
    """

    step: int
    microbatches: tuple[MultimodalBatch, ...]
    skipped: tuple[Skipped, ...]
    state: LoaderState
    num_samples: int
    num_tokens: int
    num_cut: int = 0
    drawn: dict[int, tuple[Drawn, ...]] = field(default_factory=dict)
    exhausted: bool = False

    def __repr__(self) -> str:
        return (
            f"StepBatch(step {self.step}: {len(self.microbatches)} microbatches, {self.num_samples} samples, "
            f"{self.num_tokens:,} tokens, {len(self.skipped)} samples skipped)"
        )


@dataclass(frozen=True)
class _StepInfo:
    """One step of the lanes of one worker, without the batches. Tuples have one item per lane, except ``skipped``."""

    lanes: tuple[int, ...]
    states: tuple[LaneState, ...]
    skipped: tuple[Skipped, ...]
    num_cut: int
    drawn: tuple[tuple[Drawn, ...], ...]
    exhausted: bool


_Batches = tuple[MultimodalBatch, ...]


@dataclass(frozen=True)
class _StepProducer:
    """Makes the steps of some lanes, in this process or in a worker; it can be pickled."""

    config: DataConfig
    spec: MediaSpec
    seed: int
    first_step: int
    lanes: dict[int, LaneState]
    quarantine: tuple[Path, ...]

    def steps(
        self, lanes: Sequence[int], join: Join, decode_threads: int
    ) -> Generator[tuple[_Batches, _StepInfo], None, None]:
        """Yield the steps of some lanes without end: for each lane a batch of one pack.

        Raises:
            DataPipelineError: as ``Loader``.
        """
        states = {lane: self.lanes[lane] for lane in lanes}
        start = (self.config, self.spec, self.seed, self.first_step, states)
        lane_packs = LanePacks(*start, quarantine=self.quarantine, decode_threads=decode_threads)
        with contextlib.closing(lane_packs):
            while True:
                yield self._step(lane_packs, tuple(lanes), join)

    def _step(self, lane_packs: LanePacks, lanes: tuple[int, ...], join: Join) -> tuple[_Batches, _StepInfo]:
        """Make one step. A method of its own, so that the documents are freed before the batches are yielded."""
        packs = list(lane_packs.next_packs().values())
        batches = tuple(collate([pack], self.spec, join) for pack in packs)
        return batches, _StepInfo(
            lanes=lanes,
            states=tuple(lane_packs.states().values()),
            skipped=lane_packs.pop_skipped(),
            num_cut=sum(document.is_cut for pack in packs for document in pack.documents),
            drawn=tuple(pack.drawn for pack in packs),
            exhausted=lane_packs.exhausted,
        )

    def messages(
        self, num_workers: int, worker: int
    ) -> Generator[tuple[BatchMessage, _StepInfo] | DataPipelineError, None, None]:
        """Yield the steps of a worker's lanes, the batches in shared memory. An error is yielded as the last item."""
        sender = BatchSender()
        try:
            for batches, info in self.steps(list(self.lanes)[worker::num_workers], sender.join, decode_threads=0):
                yield sender.encode(batches), info
        except DataPipelineError as error:
            yield error


class Loader:
    """An iterator over the steps of one rank, without end. Close it, or use it as a context manager.

    Args:
        config: The data block.
        spec: The model's inputs.
        seed: Seed of the run.
        rank: This rank, from 0; it owns the lanes ``rank, rank + world_size, ...``.
        world_size: Number of ranks.
        micro_lanes: Number of lanes of a microbatch.
        state: The state to continue from; it may contain the lanes of other ranks too. None starts at step 0.
        quarantine: Quarantine lists that this run wrote about these data. The loader does not try their samples again;
            no batch depends on the lists (``fault_policy``).

    Raises:
        DataConfigError: more ranks than lanes, or a setting that cannot work.
        ManifestError, StorageError: a manifest is missing, damaged, or cannot be read from its URL.
        StateError: ``state`` belongs to other data, another seed or another order.
    """

    def __init__(
        self,
        config: DataConfig,
        spec: MediaSpec,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_lanes: int = 1,
        state: LoaderState | None = None,
        quarantine: Sequence[Path] = (),
    ) -> None:
        _check_world(config, rank, world_size, micro_lanes)
        self.lanes = rank_lanes(config.lanes, rank, world_size)
        self._spec = spec
        self._micro_lanes = micro_lanes
        self._num_microbatches = num_microbatches(config.lanes, world_size, micro_lanes)
        tokenizer = load_tokenizer(config.tokenizer)
        self._dummy_pack = Pack((dummy_document(spec, tokenizer.pad_id),), lane=-1)
        self._step = state.step if state is not None else 0
        with Storage(config.storage, config.cache) as storage:
            manifests = {d.name: Manifest.open(d.manifest, storage) for d in config.datasets if d.manifest is not None}
        prints = {name: manifest.fingerprint for name, manifest in manifests.items()}
        schedule = schedule_of(config, {name: manifest.num_samples for name, manifest in manifests.items()})
        self._fingerprint = functools.partial(fingerprint, config, spec, seed, prints, tokenizer.fingerprint, schedule)
        self._schedule = schedule
        self._names = tuple(dataset.name for dataset in config.datasets)
        self.fingerprint = self._fingerprint(self._step)
        lane_states = self._lane_states(state)
        # Raise errors of templates, transforms, user code and shard names here, before any worker starts.
        for dataset in config.datasets:
            DocumentBuilder(with_image_tokenizer(dataset, manifests.get(dataset.name)), tokenizer, spec)
            for path in dataset.code:
                load_code(path, dataset.name)
        streamed = [source for dataset in config.datasets for source in expand_shards(dataset.shards)]
        is_remote = any_remote(streamed) or any(manifest.is_remote for manifest in manifests.values())
        Budget(config.packing, spec, self._dummy_pack.documents[0])
        self._num_workers = min(config.workers, len(self.lanes))
        producer = _StepProducer(config, spec, seed, self._step, lane_states, tuple(quarantine))
        self._steps = producer.steps(self.lanes, join_copies, _DECODE_THREADS)
        # Remote storage uses threads, which a fork would lose. Decoding imports torchvision, which takes a second.
        self._start_workers = functools.partial(
            Workers,
            functools.partial(producer.messages, self._num_workers),
            self._num_workers,
            config.prefetch,
            clean=is_remote,
            preload=(__name__, "torchvision.io"),
        )
        self._receivers = [BatchReceiver() for _ in range(self._num_workers)]
        self._workers: Workers[tuple[BatchMessage, _StepInfo] | DataPipelineError] | None = None
        self._closed = False
        _OPEN.add(self)

    def _lane_states(self, state: LoaderState | None) -> dict[int, LaneState]:
        if state is None:
            return {lane: LaneState(StreamPosition.start(len(self._names))) for lane in self.lanes}
        state.check(self.fingerprint, self.lanes)
        return state.lane_states(self.lanes, self._names)

    def __repr__(self) -> str:
        return (
            f"Loader({', '.join(self._names)}: step {self._step}, {len(self.lanes)} lanes in "
            f"{self._num_microbatches} microbatches, {self._num_workers} workers)"
        )

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> StepBatch:
        """Return the next step; waits until every worker has made it.

        Raises:
            DataPipelineError: the loader is closed, a worker died, or the data pipeline raised an error. The loader is
                closed then.
        """
        if self._closed:
            raise DataPipelineError("this loader is closed; make a new one from its last state")
        try:
            received = self._receive_step() if self._num_workers else [next(self._steps)]
        except DataPipelineError:
            self.close()
            raise
        infos = [info for _, info in received]
        batches = {lane: batch for made, info in received for lane, batch in zip(info.lanes, made, strict=True)}
        states = {lane: state for info in infos for lane, state in zip(info.lanes, info.states, strict=True)}
        drawn = {lane: samples for info in infos for lane, samples in zip(info.lanes, info.drawn, strict=True)}
        size, rows = self._micro_lanes, [batches[lane] for lane in self.lanes]
        microbatches = [concatenate(rows[i : i + size], self._spec) for i in range(0, len(rows), size)]
        while len(microbatches) < self._num_microbatches:
            microbatches.append(collate([self._dummy_pack], self._spec))
        self._step += 1
        if self._step - 1 in self._schedule.starts:  # The first step of a phase of the mixture is done.
            self.fingerprint = self._fingerprint(self._step)
        return StepBatch(
            step=self._step - 1,
            microbatches=tuple(microbatches),
            skipped=tuple(sorted((skip for info in infos for skip in info.skipped), key=lambda skip: skip.lane)),
            state=LoaderState(self.fingerprint, self._step, states, self._names),
            num_samples=sum(map(len, drawn.values())),
            num_tokens=sum(batch.num_tokens for batch in microbatches),
            num_cut=sum(info.num_cut for info in infos),
            drawn={lane: drawn[lane] for lane in self.lanes},
            exhausted=all(info.exhausted for info in infos),
        )

    def _receive_step(self) -> list[tuple[_Batches, _StepInfo]]:
        """Return the next step of each worker; starts the workers at the first call."""
        if self._workers is None:
            self._workers = self._start_workers()
        received = []
        for worker, receiver in enumerate(self._receivers):
            item = self._workers.next_item(worker)
            if isinstance(item, DataPipelineError):
                raise item
            message, info = item
            received.append((receiver.decode(message), info))
        return received

    def close(self) -> None:
        """Stop the workers; after that ``next`` raises DataPipelineError. Idempotent."""
        self._closed = True
        if self._workers is not None:
            self._workers.close()
        self._steps.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def rank_lanes(num_lanes: int, rank: int, world_size: int) -> tuple[int, ...]:
    """Return the lanes of ``rank``; lane ``l`` belongs to rank ``l % world_size``."""
    return tuple(range(rank, num_lanes, world_size))


def num_microbatches(num_lanes: int, world_size: int, micro_lanes: int) -> int:
    """Return the microbatches of every rank in each step, which are those of the rank with the most lanes.

    A rank with fewer lanes adds dummy packs.
    """
    most_lanes = -(-num_lanes // world_size)
    return -(-most_lanes // micro_lanes)


_OPEN: weakref.WeakSet[Loader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Close open loaders when the interpreter exits; later their generators could not import modules."""
    for loader in list(_OPEN):
        loader.close()


def _check_world(config: DataConfig, rank: int, world_size: int, micro_lanes: int) -> None:
    if not 0 <= rank < world_size:
        raise DataConfigError(f"rank {rank} of {world_size} ranks: expected 0 <= rank < {world_size}")
    if world_size > config.lanes:
        raise DataConfigError(
            f"{world_size} ranks for data.lanes={config.lanes}: every rank needs a lane; use fewer ranks or more lanes"
        )
    if micro_lanes < 1:
        raise DataConfigError(f"micro_lanes={micro_lanes}: must be at least 1")
