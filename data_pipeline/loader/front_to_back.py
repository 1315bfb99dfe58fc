"""One lane of a data set of plain tars: shards without an index, each read once from front to back.

    epoch    shard 2, shard 0, shard 1, ...           a Feistel permutation of the shards
    lane l   places l, l + L, l + 2L, ... of the endless sequence of shards
    window   consecutive samples of a shard, which are permuted among themselves

The order is a pure function of the list of shards and the seed, as with an index (``lanes``); only what lies where in a
shard is found out by reading it. A cursor is (turn, window, offset): the lane's turn-th shard. A sample's number is its
shard's times 2^32, plus its row. A resume reads a shard again up to the window it stood in.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from braceexpand import braceexpand

from data_pipeline.errors import (
    DataConfigError,
    FaultKind,
    ManifestError,
    SampleError,
    ShardError,
    TooManyFaultsError,
)
from data_pipeline.order.fault_lists import RunFaults
from data_pipeline.order.fault_policy import Fault
from data_pipeline.order.randomness import Permutation
from data_pipeline.order.state import Cursor, Drawn, Place
from data_pipeline.sample import Provenance, Sample
from data_pipeline.shards.sample_reader import MAX_TEXT_BYTES, assemble
from data_pipeline.shards.tar_stream import PIPE, Members, samples_of
from data_pipeline.storage.location import Url, parse_location
from data_pipeline.storage.storage import Storage

_ROW_BITS = 32

Entry = tuple[str, Members | SampleError | ShardError]
"""Key of a sample, and its members or why they could not be read."""


def commands(patterns: Sequence[str]) -> list[str]:
    """The shell commands among the sources of ``data.datasets.*.shards``, braces expanded."""
    sources = (source for pattern in patterns for source in braceexpand(pattern))
    return [source.removeprefix(PIPE) for source in sources if source.startswith(PIPE)]


def expand_shards(patterns: Sequence[str]) -> tuple[str, ...]:
    """Sources of ``data.datasets.*.shards``, braces expanded: ``part-{000..099}.tar`` stands for a hundred.

    Raises:
        DataConfigError: a URL is malformed, a file is missing, or a source is named twice.
    """
    sources = tuple(source for pattern in patterns for source in braceexpand(pattern))
    for source in sources:
        if not source.startswith(PIPE):
            location = parse_location(source)
            if isinstance(location, Path) and not location.exists():
                raise DataConfigError(f"shards: {source}: no such file")
    twice = [source for source, count in Counter(sources).items() if count > 1]
    if twice:
        raise DataConfigError(f"shards: {min(twice)} is named twice")
    return sources


def source_of(sources: Sequence[str], sample: int) -> tuple[str, str]:
    """Source of a sample, and its place in it as ``#17``.

    Raises:
        DataConfigError: the sources are fewer than they were.
    """
    shard, row = sample >> _ROW_BITS, sample & ((1 << _ROW_BITS) - 1)
    if shard >= len(sources):
        raise DataConfigError(f"shards: there is no shard number {shard}; the configuration names {len(sources)}")
    return sources[shard], f"#{row}"


def sample_number(source: int, row: int) -> int:
    """The sample that lies in a place of a source: the inverse of ``source_of``."""
    return source << _ROW_BITS | row


def any_remote(sources: Sequence[str]) -> bool:
    """Whether a source is on a server."""
    return any(not source.startswith(PIPE) and isinstance(parse_location(source), Url) for source in sources)


@dataclass(frozen=True)
class StreamedSet:
    """What the lanes of a process share of a data set of plain tars.

    Attributes:
        dataset: Its name.
        sources: Paths, URLs or ``pipe:`` commands, in the order of the configuration.
        seed: Of the order.
        window_size: Samples that are held and mixed.
        storage: Reads URLs.
        faults: What the process knows of bad samples.
        max_text_bytes: A larger ``txt`` or ``json`` member is a bad sample.
        lost: Shards that could not be read to their end.
    """

    dataset: str
    sources: tuple[str, ...]
    seed: int
    window_size: int
    storage: Storage
    faults: RunFaults
    max_text_bytes: int = MAX_TEXT_BYTES
    lost: set[int] = field(default_factory=set)

    @property
    def num_samples(self) -> int:
        """Nobody counted them."""
        return 0

    def lane(self, lane: int, num_lanes: int) -> StreamedLane:
        """The samples of one lane."""
        return StreamedLane(self, lane, num_lanes)


@dataclass
class _Window:
    """Samples of a shard in stored order; one that could not be read is its error."""

    shard: int
    number: int
    entries: list[Entry]


class StreamedLane:
    """Places and samples of one lane. Holds one window and one open shard.

    Args:
        shared: The data set.
        lane: This lane.
        num_lanes: All lanes; over them each sample occurs once an epoch.
    """

    random_access = False

    def __init__(self, shared: StreamedSet, lane: int, num_lanes: int) -> None:
        self._set = shared
        self._lane, self._num_lanes = lane, num_lanes
        self.faults = StreamedFaults(self, shared)
        self._window = _Window(-1, -1, [])
        self._open: tuple[int, int, Iterator[Entry]] | None = None

    def resolve(self, cursor: Cursor) -> tuple[Place, Cursor]:
        """The sample at ``cursor`` and the cursor after it; reads on where the window at hand does not reach.

        Raises:
            DataConfigError: no shard holds a sample.
        """
        turn, number, offset = cursor
        empty = 0
        while True:
            epoch, shard = self._shard(turn)
            entries = self._load(shard, number)
            if offset < len(entries):
                break
            if len(entries) == self._set.window_size:
                number, offset = number + 1, 0
                continue
            empty = empty + 1 if number == 0 and not entries else 0
            if empty >= 2 * len(self._set.sources):  # The end of one epoch and the start of the next may be empty.
                raise DataConfigError(f"data set {self._set.dataset}: none of its shards holds a sample")
            turn, number, offset = turn + 1, 0, 0
        order = Permutation(len(entries), self._set.seed, epoch, stream=(shard << _ROW_BITS) + number + 1)
        row = number * self._set.window_size + order[offset]
        return Place(sample_number(shard, row), epoch), Cursor(turn, number, offset + 1)

    def read(self, sample: int, epoch: int = 0) -> Sample:
        """The sample with its members in reading order.

        Raises:
            ShardError, StorageError: the shard is damaged there, or cannot be read.
            SampleError: its JSON or text is malformed.
        """
        key, found = self._entry(sample)
        source = self._set.sources[sample >> _ROW_BITS]
        if isinstance(found, SampleError | ShardError):
            raise found
        origin = Provenance(self._set.dataset, source, key, sample, epoch)
        return assemble(found, origin, max_text_bytes=self._set.max_text_bytes)

    def read_outline(self, sample: int, epoch: int = 0) -> Sample:
        """The same: what is streamed is there anyway."""
        return self.read(sample, epoch)

    def prepare(self, cursor: Cursor, waiting: Sequence[Drawn]) -> None:
        """Nothing is fetched before it is read."""

    def epoch(self, epoch: int) -> Iterator[tuple[Place, str, str, Members | SampleError | ShardError]]:
        """Yield place, shard, key and members of each sample of an epoch.

        Raises:
            DataConfigError: no shard holds a sample.
        """
        first = epoch * len(self._set.sources)
        cursor = Cursor(max(0, -(-(first - self._lane) // self._num_lanes)))
        while self._shard(cursor[0])[0] == epoch:
            place, cursor = self.resolve(cursor)
            if place.epoch != epoch:
                return
            yield (place, self._set.sources[place.sample >> _ROW_BITS], *self._entry(place.sample))

    def where(self, sample: int) -> tuple[str, str]:
        """Shard and key of a sample."""
        return self._set.sources[sample >> _ROW_BITS], self._entry(sample)[0]

    def _shard(self, turn: int) -> tuple[int, int]:
        """Epoch and shard of the lane's turn."""
        count = len(self._set.sources)
        epoch, at = divmod(turn * self._num_lanes + self._lane, count)
        return epoch, Permutation(count, self._set.seed, epoch)[at]

    def _entry(self, sample: int) -> Entry:
        shard, row = sample >> _ROW_BITS, sample & ((1 << _ROW_BITS) - 1)
        number, at = divmod(row, self._set.window_size)
        entries = self._load(shard, number)
        if at >= len(entries):
            source = self._set.sources[shard]
            return "?", SampleError(f"{source} has no sample {row} any more", kind=FaultKind.SHARD, shard=source)
        return entries[at]

    def _load(self, shard: int, number: int) -> list[Entry]:
        """The entries of a window; fewer than its size at the shard's end, none behind it."""
        window = self._window
        if (window.shard, window.number) != (shard, number):
            size = self._set.window_size
            if self._open is None or self._open[0] != shard or self._open[1] > number:
                self.close()
                self._open = (shard, 0, samples_of(self._set.sources[shard], self._set.storage))
            _, at, samples = self._open
            for _ in itertools.islice(samples, (number - at) * size):
                pass
            entries = list(itertools.islice(samples, size))
            self._open = (shard, number + 1, samples)
            self._window = window = _Window(shard, number, entries)
        return window.entries

    def close(self) -> None:
        """Closes the shard at hand."""
        if self._open is not None:
            samples = self._open[2]
            self._open = None
            samples.close()  # type: ignore[attr-defined] # A generator.


@dataclass(frozen=True)
class StreamedFaults:
    """Bad samples and lost shards of a streamed data set: a ``KnownFaults``."""

    lane: StreamedLane
    shared: StreamedSet

    def recall(self, sample: int) -> Fault | None:
        """The fault of a sample that need not be tried."""
        run, dataset = self.shared.faults, self.shared.dataset
        return run.excluded(dataset, sample, self, "other shards") or run.recall(dataset, sample)

    def locate(self, sample: int) -> tuple[str, str]:
        """Shard and key."""
        return self.lane.where(sample)

    def offset(self, sample: int) -> None:
        """Nobody knows: a pipe has no places."""

    def shard_failed(self, sample: int, error: ShardError | ManifestError) -> Fault:
        """The rest of the shard is lost.

        Raises:
            TooManyFaultsError: more than ``max_share`` of the shards are.
        """
        source, key = self.lane.where(sample)
        shared, shard = self.shared, sample >> _ROW_BITS
        shared.lost.add(shard)
        config, count = shared.faults.config, len(shared.sources)
        if len(shared.lost) > config.max_share * count or len(shared.lost) == count:
            raise TooManyFaultsError(
                f"{len(shared.lost)} of the {count} shards of data set {shared.dataset} could not be read to their "
                f"end (data.faults.max_share={config.max_share:g}); the last: {error}"
            )
        reason = f"{error}; what follows in the shard is lost"
        return Fault(SampleError(reason, kind=FaultKind.SHARD, shard=source, key=key), counts=False)

    def keep(self, sample: int, error: SampleError) -> None:
        """Holds a quarantined sample."""
        self.shared.faults.hold(self.shared.dataset, sample, error)

    def succeeded(self, sample: int) -> None:
        """Nothing is counted."""
