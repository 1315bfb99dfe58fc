"""Samples one by one, in the loader's order: for people who pack, batch or decode themselves.

    lanes of this rank --dealt to--> threads that read ahead --one sample of each lane in turn--> whoever iterates

Threads, not processes: reading, checksums and image decoders let go of Python's lock, and nothing has to be copied from
one process to another. Neither ranks nor threads change the order: the n-th sample of a lane is a pure function of
(manifest, seed, lanes, order). Not for: mixtures, templates and packs (``iterable.open_loader``).
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
from data_pipeline.order.config import OrderConfig
from data_pipeline.order.fault_lists import RunFaults, exclusions_digest
from data_pipeline.order.fault_policy import Fault, FaultConfig, FaultPolicy, Skipped
from data_pipeline.order.state import Cursor, LaneState, LoaderState, StreamPosition, fingerprint_of
from data_pipeline.sample import Sample
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.storage.storage import Storage

T = TypeVar("T")

_CHUNK = 32
"""Samples that a thread hands over at once; it is two such stretches ahead."""
_AHEAD = 2
_PATIENCE_SECONDS = 0.2


@dataclass(frozen=True)
class _Plan:
    """What decides which sample comes when, and what becomes of it."""

    manifest: str | Path
    name: str
    seed: int
    order: OrderConfig
    lanes: int
    max_epochs: int | None
    faults: FaultConfig
    apply: Callable[[Sample], Any] | None


class _Step(NamedTuple):
    """One turn of a lane: what it gave, and where it stands behind that. ``done`` if it has nothing more."""

    result: Any
    cursor: Cursor
    faults: tuple[int, ...]
    skipped: tuple[Skipped, ...] = ()
    done: bool = False


class _Lane:
    """One lane of one reader."""

    def __init__(self, plan: _Plan, lane: int, source: IndexedLane, state: LaneState) -> None:
        self._plan, self._lane, self._source = plan, lane, source
        self._cursor = state.position.cursors[0]
        self._policy = FaultPolicy(plan.faults, state.faults)

    def step(self) -> _Step:
        """The next good sample.

        Raises:
            As ``FaultPolicy.attempt``.
        """
        plan, skipped = self._plan, list[Skipped]()
        while True:
            place, after = self._source.resolve(self._cursor)
            if plan.max_epochs is not None and place.epoch >= plan.max_epochs:
                return _Step(None, self._cursor, self._policy.state(), tuple(skipped), done=True)
            self._cursor = after
            known = self._source.faults
            result = self._policy.attempt(lambda: self._make(*place), known, place.sample)  # noqa: B023 - called at once.
            if not isinstance(result, Fault):
                return _Step(result, after, self._policy.state(), tuple(skipped))
            origin = (plan.name, place.epoch, place.sample, self._lane)
            skipped.append(self._policy.skipped(result, *origin, known.offset(place.sample)))

    def _make(self, index: int, epoch: int) -> Any:
        sample = self._source.read(index, epoch)
        return sample if self._plan.apply is None else self._plan.apply(sample)


class _Reading:
    """Steps of some lanes, each when it is asked for."""

    def __init__(self, plan: _Plan, states: Mapping[int, LaneState]) -> None:
        self._storage = Storage()
        self._reader = SampleReader(Manifest.open(plan.manifest, self._storage), plan.name)
        known = IndexedFaults(RunFaults.load(plan.faults), self._reader)
        opened = IndexedSet(self._reader, dataset_seed(plan.seed, plan.name), plan.order, known)
        self._lanes = {lane: _Lane(plan, lane, opened.lane(lane, plan.lanes), state) for lane, state in states.items()}

    def steps(self, turns: Iterator[int]) -> Iterator[_Step]:
        """A step of each lane that ``turns`` names."""
        return (self._lanes[lane].step() for lane in turns)

    def close(self) -> None:
        """Closes the shards and ends what is under way."""
        self._reader.close()
        self._storage.close()


class _ReadingAhead:
    """The same in a thread of its own, some chunks ahead."""

    def __init__(self, plan: _Plan, states: Mapping[int, LaneState]) -> None:
        self._plan, self._states = plan, states
        self._chunks: queue.Queue[list[_Step] | BaseException] = queue.Queue(_AHEAD)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def steps(self, turns: Iterator[int]) -> Iterator[_Step]:
        """A step of each lane that ``turns`` names."""
        self._thread = threading.Thread(target=self._run, args=(turns,), name="samples", daemon=True)
        self._thread.start()
        return self._taken()

    def _taken(self) -> Iterator[_Step]:
        while True:
            chunk = self._chunks.get()
            if isinstance(chunk, BaseException):
                raise chunk
            yield from chunk

    def _run(self, turns: Iterator[int]) -> None:
        try:
            reading = _Reading(self._plan, self._states)
            try:
                steps = reading.steps(turns)
                self._put(list(islice(steps, 1)))  # The first sample need not wait for others.
                while not self._stop.is_set():
                    self._put(list(islice(steps, _CHUNK)))
            finally:
                reading.close()
        except BaseException as error:  # Whoever iterates gets it.
            self._put(error)

    def _put(self, chunk: list[_Step] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._chunks.put(chunk, timeout=_PATIENCE_SECONDS)
            except queue.Full:
                continue
            return

    def close(self) -> None:
        """Ends the thread; what it has read ahead is dropped."""
        self._stop.set()
        while not self._chunks.empty():  # Room, so that the thread notices at once.
            self._chunks.get_nowait()
        if self._thread is not None:
            self._thread.join()


class OrderedSamples(IterableDataset[T]):
    """Samples of one rank; iterating goes on behind the last one that was taken. Made by ``open_samples``."""

    def __init__(self, plan: _Plan, manifest: Manifest, rank: int, world_size: int, workers: int) -> None:
        self._plan, self._workers = plan, workers
        parts: dict[str, object] = {
            "seed": plan.seed,
            "lanes": plan.lanes,
            "order": plan.order.model_dump(mode="json"),
            "max_epochs": plan.max_epochs,
            f"{plan.name}.manifest": manifest.fingerprint,
        }
        if plan.faults.exclude:
            parts["faults.exclude"] = exclusions_digest(plan.faults)
        self.fingerprint = fingerprint_of(parts)
        self._lanes = tuple(range(rank, plan.lanes, world_size))
        self._states = self._start()
        self._taken = 0
        self._skipped: list[Skipped] = []

    def _start(self) -> dict[int, LaneState]:
        return dict.fromkeys(self._lanes, LaneState(StreamPosition.start(1)))

    def __iter__(self) -> Iterator[T]:
        """The samples behind the last one taken.

        Raises:
            DataConfigError: called in a worker process of a ``DataLoader``.
            DataPipelineError: what the fault policy does not forgive.
        """
        if get_worker_info() is not None:
            raise DataConfigError("samples are read by threads: set workers, and num_workers=0 of a DataLoader around")
        count = max(1, min(self._workers, len(self._lanes)))
        kind = _ReadingAhead if self._workers else _Reading
        shares = [self._lanes[first::count] for first in range(count)]
        readings = [kind(self._plan, {lane: self._states[lane] for lane in share}) for share in shares]
        late = self._late()
        try:
            sources: dict[int, Iterator[_Step]] = {}
            for share, reading in zip(shares, readings, strict=True):
                turns = chain([lane for lane in late if lane in share], cycle(share))
                sources |= dict.fromkeys(share, reading.steps(turns))
            yield from self._follow(chain(late, cycle(self._lanes)), sources)
        finally:
            for reading in readings:
                reading.close()

    def _late(self) -> list[int]:
        """Lanes that are a turn behind: a state may lie in the middle of a row."""
        turns = {lane: state.position.draws[0] for lane, state in self._states.items()}
        return [lane for lane in self._lanes if turns[lane] < max(turns.values())]

    def _follow(self, turns: Iterator[int], sources: Mapping[int, Iterator[_Step]]) -> Iterator[T]:
        """Takes a step of each lane in turn and notes where the lanes stand."""
        done = set[int]()
        for lane in turns:
            step = next(sources[lane])
            self._skipped.extend(step.skipped)
            drawn = self._states[lane].position.draws[0] + (not step.done)
            self._states[lane] = LaneState(StreamPosition((drawn,), (step.cursor,)), (), step.faults)
            if not step.done:
                self._taken += 1
                yield cast(T, step.result)
                continue
            done.add(lane)
            if len(done) == len(self._lanes):
                return

    def take_skipped(self) -> tuple[Skipped, ...]:
        """Bad samples that were left out since the last call."""
        skipped, self._skipped = tuple(self._skipped), []
        return skipped

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands: plain values, some integers a lane."""
        return LoaderState(self.fingerprint, self._taken, self._states, (self._plan.name,)).to_dict()

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Goes on from a state at the next iteration.

        Args:
            state: What ``state_dict`` gave on this rank; or the list of what it gave on all ranks after equally many
                samples, which suits any number of ranks.

        Raises:
            StateError: the state belongs to other data or another order, or lacks a lane of this rank.
        """
        parts = [state] if isinstance(state, Mapping) else list(state)
        merged = LoaderState.merge([LoaderState.from_dict(part) for part in parts])
        merged.check(self.fingerprint, self._lanes)
        self._states = merged.lane_states(self._lanes, (self._plan.name,))
        self._taken = merged.step


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
    """The samples of one rank in an order that ranks and workers do not change.

    Args:
        manifest: The data set: a path, or a URL that is read as the environment says.
        seed: Seed of the order.
        apply: Makes something else of each sample, for instance pixels; it runs in the threads, and a ``SampleError``
            that it raises makes the sample a bad one.
        rank: This rank; it owns the lanes ``rank, rank + world_size, ...``.
        world_size: All ranks.
        workers: Threads that read ahead; 0 reads when asked.
        lanes: Rows of the global order, at least as many as ranks; a part of the order.
        order: Shuffling.
        max_epochs: Epochs after which the iteration ends; None goes on for ever.
        faults: What happens to bad samples.
        name: Name of the data set, a part of its seed.

    Raises:
        DataConfigError: more ranks than lanes, no samples, or a number that cannot be.
        ManifestError: the manifest is missing or damaged.
    """
    if not 0 <= rank < world_size <= lanes or workers < 0 or (max_epochs is not None and max_epochs < 1):
        raise DataConfigError(
            f"rank {rank} of {world_size} ranks, {lanes} lanes, {workers} workers, max_epochs={max_epochs}: expected "
            "rank < ranks <= lanes, and workers from 0, max_epochs from 1"
        )
    opened = Manifest.open(manifest)
    if not opened.num_samples:
        raise DataConfigError(f"{manifest} holds no samples")
    plan = _Plan(Path(manifest), name, seed, order or OrderConfig(), lanes, max_epochs, faults or FaultConfig(), apply)
    return OrderedSamples(plan, opened, rank, world_size, workers)
