"""The loader: what one rank is fed, step after step, for ever.

    lanes of this rank --dealt to--> workers --one item a step--> microbatches --> StepBatch

Workers own lanes and ranks own lanes; neither changes what a lane holds, so the global batch is the same for every
number of both. Not for: evaluation, which reads in stored order (``sample_reader.read_samples``).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import weakref
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DataConfig
from data_pipeline.document import Empty, plain_empty
from data_pipeline.errors import DataConfigError, DataPipelineError, TooManyFaultsError
from data_pipeline.loader.fingerprint import fingerprint, schedule_of
from data_pipeline.loader.front_to_back import any_remote, expand_shards
from data_pipeline.loader.known_faults import RunFaults
from data_pipeline.loader.lane_stream import LaneStream, OpenDataset
from data_pipeline.loader.shared_buffers import Inbox, Outbox, Parcel
from data_pipeline.loader.user_code import load as load_code
from data_pipeline.loader.workers import Workers
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_policy import Skipped
from data_pipeline.order.state import Drawn, LaneState, LoaderState, StreamPosition
from data_pipeline.packing.collate import collate, concatenate
from data_pipeline.packing.document_builder import DocumentBuilder, null_document
from data_pipeline.packing.packer import Budget, Pack, Packer
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.storage.storage import Storage
from data_pipeline.text.tokenizer import load_tokenizer

__all__ = ["DocumentBuilder", "Loader", "LoaderState", "StepBatch", "null_document", "read_samples"]

_MOST_AHEAD = 4
"""Samples that are decoded at once: of more of them the bytes would not stay in the processor's cache meanwhile."""
_DECODE_THREADS = 2
"""Without workers. While one waits for Python's lock, the other decodes."""


@dataclass(frozen=True)
class StepBatch:
    """What one rank trains on in one step.

    Attributes:
        step: Number of the step, from 0.
        microbatches: Equally many on every rank.
        skipped: Bad samples that were met on the way, by lane.
        state: This rank's lanes after the step; ``state.step`` is ``step + 1``.
        num_samples: Documents of this rank, null documents left out.
        num_tokens: Tokens of them.
        num_cut: Documents of them that are only a part of their sample (``packing.too_long``).
        drawn: Of each lane the places of its documents, null documents left out, in the order of the microbatches.
        exhausted: Whether every data set gave all its epochs and this rank's lanes have nothing left after this step.
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


@dataclass(frozen=True)
class _Rows:
    """One step of the lanes of one worker."""

    worker: int
    lanes: tuple[int, ...]
    batches: Parcel
    states: tuple[list[int], ...]
    skipped: tuple[Skipped, ...]
    num_cut: int
    drawn: tuple[tuple[Drawn, ...], ...]
    exhausted: bool


@dataclass(frozen=True)
class _Plan:
    """What any process needs to make rows."""

    config: DataConfig
    spec: MediaSpec
    seed: int
    first_step: int
    lanes: dict[int, LaneState]
    quarantine: tuple[Path, ...]


class _LaneRows:
    """Makes the rows of some lanes, in the process that calls it."""

    def __init__(self, plan: _Plan, share: Sequence[int], worker: int, is_apart: bool) -> None:
        config, spec = plan.config, plan.spec
        tokenizer = load_tokenizer(config.tokenizer)
        self._worker = worker
        self._outbox = Outbox(shared=is_apart)
        # In the caller's process images are decoded beside what it does. Threads write late: into memory nobody moves.
        self._threads = None if is_apart else ThreadPoolExecutor(_DECODE_THREADS, thread_name_prefix="decode")
        self._in_order = is_apart and config.packing.look_ahead == 1
        empty = self._outbox.empty if self._in_order else plain_empty
        self._step = plan.first_step
        self._spec = spec
        budget = Budget(config.packing, spec, null_document(spec, tokenizer.pad_id))
        faults = RunFaults.load(config.faults, plan.quarantine)
        self._storage = Storage(config.storage, config.cache)
        self._datasets = [
            OpenDataset.open(dataset, config.order, plan.seed, tokenizer, spec, faults, self._storage)
            for dataset in config.datasets
        ]
        sizes = {dataset.config.name: dataset.source.num_samples for dataset in self._datasets}
        schedule = schedule_of(config, sizes)
        self._streams: dict[int, LaneStream] = {}
        self._packers: dict[int, Packer] = {}
        for lane in share:
            state = plan.lanes[lane]
            self._streams[lane] = LaneStream(
                config, self._datasets, schedule, lane, budget, state, empty, self._threads
            )
        for stream in self._streams.values():
            stream.prepare()
        for lane, stream in self._streams.items():
            self._packers[lane] = Packer(stream, budget, lane, plan.lanes[lane].waiting)

    def close(self) -> None:
        """Ends what is under way."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._storage.close()

    def step(self) -> _Rows:
        """The rows of the next step."""
        for stream in self._streams.values():
            stream.step = self._step
        self._step += 1
        try:
            packs = [self._next_pack(lane) for lane in self._packers]
        except TooManyFaultsError as error:
            error.skipped = self._take_skipped()
            raise
        batches = tuple(collate([pack], self._spec, self._outbox.join) for pack in packs)
        states = [
            LaneState(*packer.state(), stream.faults()).to_integers()
            for packer, stream in zip(self._packers.values(), self._streams.values(), strict=True)
        ]
        parcel = self._outbox.wrap(batches)
        if self._in_order:
            for lane in self._packers:
                self._move(lane, plain_empty)
        return _Rows(
            worker=self._worker,
            lanes=tuple(self._streams),
            batches=parcel,
            states=tuple(states),
            skipped=self._take_skipped(),
            num_cut=sum(document.is_cut for pack in packs for document in pack.documents),
            drawn=tuple(pack.drawn for pack in packs),
            exhausted=all(packer.exhausted for packer in self._packers.values()),
        )

    def _next_pack(self, lane: int) -> Pack:
        """The pack; if documents are packed as they come, its patches lie behind each other in the parcel at once."""
        if self._in_order:
            self._move(lane, self._outbox.empty)
        pack = self._packers[lane].next_pack()
        # What is left of those that were decoded ahead waits for the next step: few of a pack, however large they are.
        self._streams[lane].ahead = max(1 if self._threads is None else 2, min(_MOST_AHEAD, len(pack.documents) // 8))
        return pack

    def _move(self, lane: int, empty: Empty) -> None:
        """Moves what waits for later steps, in the order in which it was made."""
        self._packers[lane].move(empty)
        self._streams[lane].move(empty)

    def _take_skipped(self) -> tuple[Skipped, ...]:
        return tuple(skip for stream in self._streams.values() for skip in stream.take_skipped())


def _rows_of(plan: _Plan, num_workers: int, worker: int) -> Generator[_Rows | DataPipelineError, None, None]:
    """Endless steps of a worker's share of the lanes; an error is the last item. Without workers there is one share."""
    try:
        share = list(plan.lanes)[worker :: max(1, num_workers)]
        with contextlib.closing(_LaneRows(plan, share, worker, is_apart=num_workers > 0)) as rows:
            while True:
                yield rows.step()
    except DataPipelineError as error:
        yield error


class Loader:
    """Iterates over the steps of one rank. A single pass: a new loader starts again from ``state``.

    Args:
        config: The data block.
        spec: What the model takes.
        seed: Seed of the run.
        rank: This rank; it owns the lanes ``rank, rank + world_size, ...``.
        world_size: All ranks.
        micro_lanes: Lanes of a microbatch.
        state: Go on from here; it may hold the lanes of other ranks too.
        quarantine: Lists that this run wrote over these data: what they name need not be tried. No batch depends on
            them (``fault_policy``).

    Raises:
        DataConfigError: more ranks than lanes, or a setting that cannot work.
        ManifestError: a manifest is missing or damaged.
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
        self.lanes = tuple(range(rank, config.lanes, world_size))
        self._spec = spec
        self._micro_lanes = micro_lanes
        most_lanes = -(-config.lanes // world_size)
        self._num_microbatches = -(-most_lanes // micro_lanes)
        tokenizer = load_tokenizer(config.tokenizer)
        self._null_pack = Pack((null_document(spec, tokenizer.pad_id),), lane=-1)
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
        # Building the rows here too would open every shard twice; a builder alone finds a wrong transform at once.
        for dataset in config.datasets:
            DocumentBuilder(dataset, tokenizer, spec)
            for path in dataset.code:
                load_code(path, dataset.name)
        streamed = [source for dataset in config.datasets for source in expand_shards(dataset.shards)]
        is_remote = any_remote(streamed) or any(manifest.is_remote for manifest in manifests.values())
        Budget(config.packing, spec, self._null_pack.documents[0])
        self._num_workers = min(config.workers, len(self.lanes))
        plan = _Plan(config, spec, seed, self._step, lane_states, tuple(quarantine))
        self._make_rows = functools.partial(_rows_of, plan, self._num_workers)
        # Remote access has threads, which a fork would lose.
        preload = (__name__, "torchvision.io")  # Decoding imports it when it must, which takes a second.
        self._start = functools.partial(
            Workers, self._make_rows, self._num_workers, config.prefetch, clean=is_remote, preload=preload
        )
        self._inboxes = [Inbox() for _ in range(max(1, self._num_workers))]
        self._workers: Workers[_Rows | DataPipelineError] | None = None
        self._rows: Generator[_Rows | DataPipelineError, None, None] | None = None
        self._closed = False
        _OPEN.add(self)

    def _lane_states(self, state: LoaderState | None) -> dict[int, LaneState]:
        if state is None:
            return {lane: LaneState(StreamPosition.start(len(self._names))) for lane in self.lanes}
        state.check(self.fingerprint, self.lanes)
        return state.lane_states(self.lanes, self._names)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> StepBatch:
        """The next step; waits for the workers if they are behind.

        Raises:
            DataPipelineError: what a worker met, or that a worker died.
        """
        if self._closed:
            raise DataPipelineError("this loader is closed; make a new one from its last state")
        rows = [self._take(worker) for worker in range(max(1, self._num_workers))]
        batches = {
            lane: batch
            for row in rows
            for lane, batch in zip(row.lanes, self._inboxes[row.worker].open(row.batches), strict=True)
        }
        states = {lane: state for row in rows for lane, state in zip(row.lanes, row.states, strict=True)}
        drawn = {lane: pack for row in rows for lane, pack in zip(row.lanes, row.drawn, strict=True)}
        microbatches = self._microbatches([batches[lane] for lane in self.lanes])
        self._step += 1
        if self._step - 1 in self._schedule.starts:  # A phase has begun: from now on it is a part of the past.
            self.fingerprint = self._fingerprint(self._step)
        return StepBatch(
            step=self._step - 1,
            microbatches=microbatches,
            skipped=tuple(sorted((skip for row in rows for skip in row.skipped), key=lambda skip: skip.lane)),
            state=LoaderState(self.fingerprint, self._step, states, self._names),
            num_samples=sum(batch.num_samples for batch in microbatches),
            num_tokens=sum(batch.num_tokens for batch in microbatches),
            num_cut=sum(row.num_cut for row in rows),
            drawn={lane: drawn[lane] for lane in self.lanes},
            exhausted=all(row.exhausted for row in rows),
        )

    def _microbatches(self, batches: Sequence[MultimodalBatch]) -> tuple[MultimodalBatch, ...]:
        size = self._micro_lanes
        groups = [batches[i : i + size] for i in range(0, len(batches), size)]
        full = [concatenate(group, self._spec) for group in groups]
        while len(full) < self._num_microbatches:
            full.append(collate([self._null_pack], self._spec))
        return tuple(full)

    def _take(self, worker: int) -> _Rows:
        try:
            rows = self._next_rows(worker)
        except DataPipelineError:
            self.close()
            raise
        if isinstance(rows, DataPipelineError):
            self.close()
            raise rows
        return rows

    def _next_rows(self, worker: int) -> _Rows | DataPipelineError:
        if not self._num_workers:
            self._rows = self._rows or self._make_rows(0)
            return next(self._rows)
        self._workers = self._workers or self._start()
        return self._workers.take(worker)

    def close(self) -> None:
        """Stops the workers; the loader yields nothing more."""
        self._closed = True
        if self._workers is not None:
            self._workers.close()
        if self._rows is not None:
            self._rows.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


_OPEN: weakref.WeakSet[Loader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Closes loaders that are still open when the interpreter ends: later, their generators would find no modules."""
    for loader in list(_OPEN):
        loader.close()


def _check_world(config: DataConfig, rank: int, world_size: int, micro_lanes: int) -> None:
    if not 0 <= rank < world_size:
        raise DataConfigError(f"rank {rank} of {world_size} ranks")
    if world_size > config.lanes:
        raise DataConfigError(
            f"{world_size} ranks for data.lanes={config.lanes}: every rank needs a lane; use fewer ranks or more lanes"
        )
    if micro_lanes < 1:
        raise DataConfigError(f"micro_lanes={micro_lanes}: must be at least 1")
