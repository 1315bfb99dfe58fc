"""Single samples in the loader's order, for programs that decode, batch or pack themselves.

    lanes of this rank --divided among--> read-ahead threads --one sample of each lane in turn--> iterator

Threads, not processes: reading, checksums and image decoders release Python's lock, and no data are copied between
processes. The order depends on neither ranks nor threads: the n-th sample of a lane is a pure function of (manifest,
name, seed, lanes, order). Not for: mixtures, templates and packs (``iterable.open_loader``).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast, overload

from torch.utils.data import IterableDataset, get_worker_info

from data_pipeline.errors import DataConfigError
from data_pipeline.loader.sample_source import IndexedFaults, IndexedLane, IndexedSet, dataset_seed
from data_pipeline.order.fault_lists import RunFaults, exclusions_digest
from data_pipeline.order.fault_policy import Fault, FaultConfig, FaultPolicy, Skipped
from data_pipeline.order.lanes import OrderConfig
from data_pipeline.order.state import Cursor, LaneState, LoaderState, StreamPosition, fingerprint_of
from data_pipeline.sample import Sample
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.storage.storage import Storage

T = TypeVar("T")

_CHUNK = 32
"""Number of samples that a thread puts into its queue at once."""
_MAX_CHUNKS = 2
"""Capacity of the queue, in chunks."""
_PUT_TIMEOUT_SECONDS = 0.2


@dataclass(frozen=True)
class _Settings:
    """The arguments of ``open_samples`` that all lanes need."""

    manifest: str | Path
    name: str
    seed: int
    order: OrderConfig
    lanes: int
    max_epochs: int | None
    faults: FaultConfig
    apply: Callable[[Sample], Any] | None


class _Step(NamedTuple):
    """One result of a lane, and the lane's state after it. If ``done``, the lane has ended and ``result`` is None."""

    result: Any
    cursor: Cursor
    faults: tuple[int, ...]
    skipped: tuple[Skipped, ...] = ()
    done: bool = False


class _Lane:
    """The samples of one lane."""

    def __init__(self, settings: _Settings, lane: int, source: IndexedLane, state: LaneState) -> None:
        self._settings, self._lane, self._source = settings, lane, source
        self._cursor = state.position.cursors[0]
        self._policy = FaultPolicy(settings.faults, state.faults)

    def step(self) -> _Step:
        """Read samples up to the next good one, and return it with the skipped ones.

        Raises:
            As ``FaultPolicy.attempt``.
        """
        settings, skipped = self._settings, list[Skipped]()
        while True:
            at, after = self._source.resolve(self._cursor)
            if settings.max_epochs is not None and at.epoch >= settings.max_epochs:
                return _Step(None, self._cursor, self._policy.state(), tuple(skipped), done=True)
            self._cursor = after
            known = self._source.faults
            result = self._policy.attempt(lambda: self._make(*at), known, at.sample)  # noqa: B023 - called at once.
            if not isinstance(result, Fault):
                return _Step(result, after, self._policy.state(), tuple(skipped))
            origin = (settings.name, at.epoch, at.sample, self._lane)
            skipped.append(self._policy.skipped(result, *origin, known.offset(at.sample)))

    def _make(self, index: int, epoch: int) -> Any:
        sample = self._source.read(index, epoch)
        return sample if self._settings.apply is None else self._settings.apply(sample)


class _Reader:
    """Reads the samples of some lanes on demand, in the caller's thread."""

    def __init__(self, settings: _Settings, states: Mapping[int, LaneState]) -> None:
        self._storage = Storage()
        self._reader = SampleReader(Manifest.open(settings.manifest, self._storage), settings.name)
        known = IndexedFaults(RunFaults.load(settings.faults), self._reader)
        opened = IndexedSet(self._reader, dataset_seed(settings.seed, settings.name), settings.order, known)
        self._lanes = {
            lane: _Lane(settings, lane, opened.lane(lane, settings.lanes), state) for lane, state in states.items()
        }

    def steps(self, turns: Iterator[int]) -> Iterator[_Step]:
        """Yield a step of each lane in ``turns``, in that order. Call it once."""
        return (self._lanes[lane].step() for lane in turns)

    def close(self) -> None:
        """Close the shards and the storage."""
        self._reader.close()
        self._storage.close()


class _ThreadedReader:
    """A ``_Reader`` in a thread of its own, which reads some chunks ahead."""

    def __init__(self, settings: _Settings, states: Mapping[int, LaneState]) -> None:
        self._settings, self._states = settings, states
        self._chunks: queue.Queue[list[_Step] | BaseException] = queue.Queue(_MAX_CHUNKS)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def steps(self, turns: Iterator[int]) -> Iterator[_Step]:
        """Yield a step of each lane in ``turns``, in that order. Call it once.

        The iterator raises the errors of the thread.
        """
        self._thread = threading.Thread(target=self._run, args=(turns,), name="samples", daemon=True)
        self._thread.start()
        return self._received()

    def _received(self) -> Iterator[_Step]:
        while True:
            chunk = self._chunks.get()
            if isinstance(chunk, BaseException):
                raise chunk
            yield from chunk

    def _run(self, turns: Iterator[int]) -> None:
        try:
            reader = _Reader(self._settings, self._states)
            try:
                steps = reader.steps(turns)
                self._put(list(islice(steps, 1)))  # The first sample need not wait for a whole chunk.
                while not self._stop.is_set():
                    self._put(list(islice(steps, _CHUNK)))
            finally:
                reader.close()
        except BaseException as error:  # ``_received`` raises it in the consumer's thread.
            self._put(error)

    def _put(self, chunk: list[_Step] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._chunks.put(chunk, timeout=_PUT_TIMEOUT_SECONDS)
            except queue.Full:
                continue
            return

    def close(self) -> None:
        """Stop the thread and drop the samples that it has read ahead."""
        self._stop.set()
        while not self._chunks.empty():  # Unblock the thread at once.
            self._chunks.get_nowait()
        if self._thread is not None:
            self._thread.join()


class OrderedSamples(IterableDataset[T]):
    """The samples of one rank. Create it with ``open_samples``.

    A new iteration continues after the last sample that was yielded.
    """

    def __init__(self, settings: _Settings, manifest: Manifest, rank: int, world_size: int, workers: int) -> None:
        self._settings, self._workers = settings, workers
        parts: dict[str, object] = {
            "seed": settings.seed,
            "lanes": settings.lanes,
            "order": settings.order.model_dump(mode="json"),
            "max_epochs": settings.max_epochs,
            f"{settings.name}.manifest": manifest.fingerprint,
        }
        if settings.faults.exclude:
            parts["faults.exclude"] = exclusions_digest(settings.faults)
        self.fingerprint = fingerprint_of(parts)
        self._lanes = tuple(range(rank, settings.lanes, world_size))
        self._states = self._start()
        self._num_yielded = 0
        self._skipped: list[Skipped] = []

    def _start(self) -> dict[int, LaneState]:
        return dict.fromkeys(self._lanes, LaneState(StreamPosition.start(1)))

    def __iter__(self) -> Iterator[T]:
        """Yield the samples after the last one that was yielded.

        Raises:
            DataConfigError: called in a worker process of a ``DataLoader``.
            DataPipelineError: data cannot be read, or the fault policy stops the iteration.
        """
        if get_worker_info() is not None:
            raise DataConfigError(
                "these samples are read by threads: set workers, and num_workers=0 of the DataLoader around them"
            )
        count = max(1, min(self._workers, len(self._lanes)))
        kind = _ThreadedReader if self._workers else _Reader
        shares = [self._lanes[first::count] for first in range(count)]
        readers = [kind(self._settings, {lane: self._states[lane] for lane in share}) for share in shares]
        late = self._late_lanes()
        try:
            sources: dict[int, Iterator[_Step]] = {}
            for share, reader in zip(shares, readers, strict=True):
                turns = chain([lane for lane in late if lane in share], cycle(share))
                sources |= dict.fromkeys(share, reader.steps(turns))
            yield from self._merge(chain(late, cycle(self._lanes)), sources)
        finally:
            for reader in readers:
                reader.close()

    def _late_lanes(self) -> list[int]:
        """Return the lanes that gave one sample less than the others, if the state was saved between two rounds."""
        turns = {lane: state.position.draws[0] for lane, state in self._states.items()}
        return [lane for lane in self._lanes if turns[lane] < max(turns.values())]

    def _merge(self, turns: Iterator[int], sources: Mapping[int, Iterator[_Step]]) -> Iterator[T]:
        """Yield the results of the lanes in the order of ``turns``, and update the lanes' states."""
        done = set[int]()
        for lane in turns:
            step = next(sources[lane])
            self._skipped.extend(step.skipped)
            drawn = self._states[lane].position.draws[0] + (not step.done)
            self._states[lane] = LaneState(StreamPosition((drawn,), (step.cursor,)), (), step.faults)
            if not step.done:
                self._num_yielded += 1
                yield cast(T, step.result)
                continue
            done.add(lane)
            if len(done) == len(self._lanes):
                return

    def pop_skipped(self) -> tuple[Skipped, ...]:
        """Return the bad samples that were skipped since the last call, and forget them."""
        skipped, self._skipped = tuple(self._skipped), []
        return skipped

    def state_dict(self) -> dict[str, Any]:
        """Return the position of this rank: plain values, a few integers per lane."""
        return LoaderState(self.fingerprint, self._num_yielded, self._states, (self._settings.name,)).to_dict()

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Let the next iteration continue from a state.

        Args:
            state: The ``state_dict`` of this rank for the same number of ranks; or the list of the ``state_dict`` of
                all ranks after the same number of samples each, which fits any number of ranks.

        Raises:
            StateError: the state belongs to other data or another order, or lacks a lane of this rank.
        """
        parts = [state] if isinstance(state, Mapping) else list(state)
        merged = LoaderState.merge([LoaderState.from_dict(part) for part in parts])
        merged.check(self.fingerprint, self._lanes)
        self._states = merged.lane_states(self._lanes, (self._settings.name,))
        self._num_yielded = merged.step


@overload
def open_samples(
    manifest: str | Path,
    *,
    seed: int,
    rank: int = ...,
    world_size: int = ...,
    workers: int = ...,
    lanes: int = ...,
    order: OrderConfig = ...,
    max_epochs: int | None = ...,
    faults: FaultConfig = ...,
    name: str = ...,
) -> OrderedSamples[Sample]: ...


@overload
def open_samples(
    manifest: str | Path,
    *,
    seed: int,
    apply: Callable[[Sample], T],
    rank: int = ...,
    world_size: int = ...,
    workers: int = ...,
    lanes: int = ...,
    order: OrderConfig = ...,
    max_epochs: int | None = ...,
    faults: FaultConfig = ...,
    name: str = ...,
) -> OrderedSamples[T]: ...


def open_samples(
    manifest: str | Path,
    *,
    seed: int,
    apply: Callable[[Sample], Any] | None = None,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    lanes: int = 64,
    order: OrderConfig | None = None,
    max_epochs: int | None = None,
    faults: FaultConfig | None = None,
    name: str = "samples",
) -> OrderedSamples[Any]:
    """Return the samples of one rank, in an order that does not depend on the number of ranks and workers.

    Args:
        manifest: Path or URL of the data set's manifest. Access to a URL is configured by environment variables.
        seed: Seed of the order.
        apply: Converts each sample, for example to pixels; its result is yielded instead of the sample. With workers it
            runs in their threads. A ``SampleError`` that it raises marks the sample as bad.
        rank: This rank, from 0; it owns the lanes ``rank, rank + world_size, ...``.
        world_size: Number of ranks.
        workers: Number of threads that read ahead, at most one per lane; 0 reads in the thread of the iterator.
        lanes: Number of lanes of the global order, at least ``world_size``. The order depends on it.
        order: How samples are shuffled; None: the defaults.
        max_epochs: Number of epochs after which the iteration ends; None iterates without end.
        faults: How bad samples are treated; None: the defaults.
        name: Name of the data set. The seed of the order depends on it.

    Raises:
        DataConfigError: there are more ranks than lanes, the data set is empty, or a number is out of range.
        ManifestError, StorageError: the manifest is missing, damaged, or cannot be read from its URL.
    """
    if not 0 <= rank < world_size <= lanes or workers < 0 or (max_epochs is not None and max_epochs < 1):
        raise DataConfigError(
            f"rank {rank} of {world_size} ranks, {lanes} lanes, {workers} workers, max_epochs={max_epochs}: expected "
            "rank < ranks <= lanes, and workers from 0, max_epochs from 1"
        )
    opened = Manifest.open(manifest)
    if not opened.num_samples:
        raise DataConfigError(f"{manifest} holds no samples")
    order, faults = order or OrderConfig(), faults or FaultConfig()
    settings = _Settings(Path(manifest), name, seed, order, lanes, max_epochs, faults, apply)
    return OrderedSamples(settings, opened, rank, world_size, workers)
