"""Steps of a loader again, without pixels: which documents each pack holds, from a state on.

    state --the loader's own stream and packer, documents measured instead of decoded--> packs' places, step by step

Text is read from the shards, since only the tokenizer knows how long it is; sizes of images come from the index. What
only decoding finds out, a damaged image, must be told (``skipped``): the ledger lists it. For: steps that no ledger
holds yet, and tests of the ledger. Not for: steps that it holds (``sample_log`` reads them).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from data_pipeline.config import DataConfig
from data_pipeline.document import Document
from data_pipeline.errors import SampleError
from data_pipeline.io.strict import LARGEST_INT
from data_pipeline.loader.fingerprint import schedule_of
from data_pipeline.loader.known_faults import RunFaults
from data_pipeline.loader.lane_stream import LaneSource, LaneStream, OpenDataset, Outlining, Source
from data_pipeline.loader.loader import Loader
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_policy import Action, FaultConfig, Known, Skipped
from data_pipeline.order.lanes import Cursor, Place
from data_pipeline.order.state import Drawn, LaneState, LoaderState, StreamPosition
from data_pipeline.packing.document_builder import null_document
from data_pipeline.packing.packer import Budget, Pack, Packer
from data_pipeline.sample import Sample
from data_pipeline.storage.storage import Storage
from data_pipeline.text.tokenizer import load_tokenizer

Skips = Mapping[tuple[str, int, int], str]
"""(data set, epoch, sample) of samples that a run left out, and why."""


@dataclass(frozen=True)
class _Outlines:
    """A source that reads text and sizes only, and finds bad what a run found bad."""

    source: Source
    dataset: str
    skipped: Skips

    @property
    def num_samples(self) -> int:
        return self.source.num_samples

    def lane(self, lane: int, num_lanes: int) -> _OutlineLane:
        return _OutlineLane(self.source.lane(lane, num_lanes), self)


@dataclass(frozen=True)
class _OutlineLane:
    """One lane of it."""

    lane: LaneSource
    shared: _Outlines

    def resolve(self, cursor: Cursor) -> tuple[Place, Cursor]:
        return self.lane.resolve(cursor)

    def prepare(self, cursor: Cursor, waiting: Sequence[Drawn]) -> None:
        """Fetch nothing ahead: the bytes of images are not needed."""

    def read(self, sample: int, epoch: int = 0) -> Sample:
        reason = self.shared.skipped.get((self.shared.dataset, epoch, sample))
        if reason is not None:
            raise SampleError(reason)
        return self.lane.read_outline(sample, epoch)

    def read_outline(self, sample: int, epoch: int = 0) -> Sample:
        return self.read(sample, epoch)

    def known(self, sample: int) -> Known:
        return self.lane.known(sample)


class Replay:
    """The packs of some lanes, step after step.

    Args:
        config: The data block.
        spec: What the model takes.
        seed: Seed of the run.
        state: Where to begin; None at the first step.
        lanes: Lanes to play; None for all. Lanes do not depend on one another.
        skipped: What the run left out of these steps.
        give_up: Give up on bad samples where the run would, as far as they show without decoding. For replays from the
            first step: what a run met before ``state`` is not known here.

    Attributes:
        step: Steps done, as ``LoaderState.step`` counts them.

    Raises:
        StateError: ``state`` belongs to other data or another order.
        DataPipelineError: as ``Loader``.
    """

    def __init__(
        self,
        config: DataConfig,
        spec: MediaSpec,
        seed: int,
        state: LoaderState | None = None,
        lanes: Collection[int] | None = None,
        skipped: Skips | None = None,
        give_up: bool = False,
    ) -> None:
        Loader(config.model_copy(update={"workers": 0}), spec, seed=seed, state=state).close()  # Its checks.
        self.step = 0 if state is None else state.step
        faults = config.faults
        if not give_up:
            # How often a run gives up depends on what it met before; here every fault is left out, wherever it comes.
            faults = FaultConfig(on_error=Action.SKIP, max_consecutive=LARGEST_INT, max_share=1, exclude=faults.exclude)
            config = config.model_copy(update={"faults": faults})
        tokenizer = load_tokenizer(config.tokenizer)
        self._budget = Budget(config.packing, spec, null_document(spec, tokenizer.pad_id))
        known = RunFaults.load(faults)
        storage = Storage(config.storage, config.cache)
        self._datasets: list[OpenDataset] = []
        for dataset in config.datasets:
            opened = OpenDataset.open(dataset, config.order, seed, tokenizer, spec, known, storage)
            outlines = _Outlines(opened.source, dataset.name, skipped or {})
            self._datasets.append(replace(opened, source=outlines, outline=_measuring(opened)))
        sizes = {dataset.config.name: dataset.source.num_samples for dataset in self._datasets}
        self._config, self._schedule = config, schedule_of(config, sizes)
        names = [dataset.name for dataset in config.datasets]
        self._streams: dict[int, LaneStream] = {}
        self._packers: dict[int, Packer] = {}
        played = sorted(range(config.lanes) if lanes is None else lanes)
        fresh = LaneState(StreamPosition.start(len(names)))
        states = dict.fromkeys(played, fresh) if state is None else state.lane_states(played, names)
        for lane in played:
            self._streams[lane] = self._stream(lane, states[lane])
            self._packers[lane] = Packer(self._streams[lane], self._budget, lane, states[lane].waiting)

    def _stream(self, lane: int, state: LaneState) -> LaneStream:
        unfaulted = state._replace(faults=())
        return LaneStream(self._config, self._datasets, self._schedule, lane, self._budget, unfaulted)

    def __iter__(self) -> Iterator[dict[int, tuple[Drawn, ...]]]:
        """For each step, of each lane the places of its documents; endless.

        Raises:
            ShardError, ManifestError: a shard is missing or damaged, so nobody can say how long its documents are.
        """
        while True:
            yield self.next_step()

    def next_step(self) -> dict[int, tuple[Drawn, ...]]:
        """Of each lane the places of the documents of the next step.

        Raises:
            As iterating.
        """
        return {lane: pack.drawn for lane, pack in self.next_packs().items()}

    def next_packs(self) -> dict[int, Pack]:
        """Of each lane the pack of the next step, without pixels.

        Raises:
            As iterating; with ``give_up`` also TooManyFaultsError.
        """
        for stream in self._streams.values():
            stream.step = self.step
        self.step += 1
        return {lane: packer.next_pack() for lane, packer in self._packers.items()}

    def take_skipped(self) -> tuple[Skipped, ...]:
        """Samples that were left out since the last call, as far as that shows without decoding."""
        return tuple(skip for stream in self._streams.values() for skip in stream.take_skipped())

    @property
    def exhausted(self) -> bool:
        """Whether no lane has anything left."""
        return all(packer.exhausted for packer in self._packers.values())

    def document(self, drawn: Drawn) -> Document:
        """A document as it was packed, without pixels.

        Raises:
            SampleError: its sample does not give it.
            ShardError, ManifestError, StorageError: its shard is missing, stale or damaged.
        """
        stream = self._stream(0, LaneState(StreamPosition.start(len(self._datasets))))
        document = stream.remake(drawn)
        if document is None:
            reasons = [skip.reason for skip in stream.take_skipped()]
            raise SampleError(reasons[0] if reasons else f"it has no part {drawn.part} any more")
        return document


def _measuring(opened: OpenDataset) -> Outlining:
    """Documents without pixels."""
    return lambda sample, draws, _: functools.partial(opened.measure, sample, draws)
