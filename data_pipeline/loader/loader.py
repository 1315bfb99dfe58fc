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
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataConfigError, DataPipelineError
from data_pipeline.loader.fingerprint import fingerprint, schedule_of
from data_pipeline.loader.front_to_back import any_remote, expand_shards
from data_pipeline.loader.lane_packs import LanePacks
from data_pipeline.loader.shared_buffers import Inbox, Outbox, Parcel
from data_pipeline.loader.user_code import load as load_code
from data_pipeline.loader.workers import Workers
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_policy import Skipped
from data_pipeline.order.state import Drawn, LaneState, LoaderState, StreamPosition
from data_pipeline.packing.collate import Join, collate, concatenate, join_copies
from data_pipeline.packing.document_builder import DocumentBuilder, null_document
from data_pipeline.packing.packer import Budget, Pack
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.storage.storage import Storage
from data_pipeline.text.tokenizer import load_tokenizer

__all__ = ["DocumentBuilder", "Loader", "LoaderState", "StepBatch", "null_document", "read_samples"]

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
class _Notes:
    """What is known of one step of the lanes of one worker, beside their batches."""

    lanes: tuple[int, ...]
    states: tuple[LaneState, ...]
    skipped: tuple[Skipped, ...]
    num_cut: int
    drawn: tuple[tuple[Drawn, ...], ...]
    exhausted: bool


_Batches = tuple[MultimodalBatch, ...]


@dataclass(frozen=True)
class _Plan:
    """What any process needs to make batches."""

    config: DataConfig
    spec: MediaSpec
    seed: int
    first_step: int
    lanes: dict[int, LaneState]
    quarantine: tuple[Path, ...]

    def steps(
        self, lanes: Sequence[int], join: Join, decode_threads: int
    ) -> Generator[tuple[_Batches, _Notes], None, None]:
        """Endless steps of some lanes: of each a batch of one pack.

        Raises:
            DataPipelineError: as ``Loader``.
        """
        states = {lane: self.lanes[lane] for lane in lanes}
        place = (self.config, self.spec, self.seed, self.first_step, states)
        made = LanePacks(*place, quarantine=self.quarantine, decode_threads=decode_threads)
        with contextlib.closing(made):
            while True:
                yield self._step(made, tuple(lanes), join)

    def _step(self, made: LanePacks, lanes: tuple[int, ...], join: Join) -> tuple[_Batches, _Notes]:
        """One step. Its documents are gone when it returns, so that they do not wait beside their batch."""
        packs = list(made.next_packs().values())
        batches = tuple(collate([pack], self.spec, join) for pack in packs)
        return batches, _Notes(
            lanes=lanes,
            states=tuple(made.states().values()),
            skipped=made.take_skipped(),
            num_cut=sum(document.is_cut for pack in packs for document in pack.documents),
            drawn=tuple(pack.drawn for pack in packs),
            exhausted=made.exhausted,
        )

    def parcels(
        self, num_workers: int, worker: int
    ) -> Generator[tuple[Parcel, _Notes] | DataPipelineError, None, None]:
        """The steps of a worker's share of the lanes, in memory that processes share; an error is the last item."""
        outbox = Outbox()
        try:
            for batches, notes in self.steps(list(self.lanes)[worker::num_workers], outbox.join, decode_threads=0):
                yield outbox.wrap(batches), notes
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
        self._steps = plan.steps(self.lanes, join_copies, _DECODE_THREADS)
        # Remote access has threads, which a fork would lose. Decoding imports torchvision, which takes a second.
        self._start = functools.partial(
            Workers,
            functools.partial(plan.parcels, self._num_workers),
            self._num_workers,
            config.prefetch,
            clean=is_remote,
            preload=(__name__, "torchvision.io"),
        )
        self._inboxes = [Inbox() for _ in range(self._num_workers)]
        self._workers: Workers[tuple[Parcel, _Notes] | DataPipelineError] | None = None
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
        try:
            taken = self._take() if self._num_workers else [next(self._steps)]
        except DataPipelineError:
            self.close()
            raise
        notes = [each for _, each in taken]
        batches = {lane: batch for made, own in taken for lane, batch in zip(own.lanes, made, strict=True)}
        states = {lane: state for own in notes for lane, state in zip(own.lanes, own.states, strict=True)}
        drawn = {lane: places for own in notes for lane, places in zip(own.lanes, own.drawn, strict=True)}
        size, rows = self._micro_lanes, [batches[lane] for lane in self.lanes]
        microbatches = [concatenate(rows[i : i + size], self._spec) for i in range(0, len(rows), size)]
        while len(microbatches) < self._num_microbatches:
            microbatches.append(collate([self._null_pack], self._spec))
        self._step += 1
        if self._step - 1 in self._schedule.starts:  # A phase has begun: from now on it is a part of the past.
            self.fingerprint = self._fingerprint(self._step)
        return StepBatch(
            step=self._step - 1,
            microbatches=tuple(microbatches),
            skipped=tuple(sorted((skip for own in notes for skip in own.skipped), key=lambda skip: skip.lane)),
            state=LoaderState(self.fingerprint, self._step, states, self._names),
            num_samples=sum(map(len, drawn.values())),
            num_tokens=sum(batch.num_tokens for batch in microbatches),
            num_cut=sum(own.num_cut for own in notes),
            drawn={lane: drawn[lane] for lane in self.lanes},
            exhausted=all(own.exhausted for own in notes),
        )

    def _take(self) -> list[tuple[_Batches, _Notes]]:
        """The next step of each worker."""
        if self._workers is None:
            self._workers = self._start()
        taken = []
        for worker, inbox in enumerate(self._inboxes):
            item = self._workers.take(worker)
            if isinstance(item, DataPipelineError):
                raise item
            parcel, notes = item
            taken.append((inbox.open(parcel), notes))
        return taken

    def close(self) -> None:
        """Stops the workers; the loader yields nothing more."""
        self._closed = True
        if self._workers is not None:
            self._workers.close()
        self._steps.close()

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
