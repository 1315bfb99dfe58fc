"""The samples of one lane from plain tars: shards without an index, each read from front to back.

    epoch    shard 2, shard 0, shard 1, ...           a Feistel permutation of the shards
    lane l   positions l, l + L, l + 2L, ... of the endless sequence of shards
    window   consecutive samples of a shard, which are permuted among themselves

The order is a pure function of the list of shards and the seed, as with an index (``lanes``). The number of samples in
a shard is unknown until the shard was read. A cursor is (turn, window, offset), where turn counts the shards of the
lane. The number of a sample is the number of its shard times 2^32, plus its row in the shard. A resumed run reads the
current shard again, up to the current window.
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
from data_pipeline.io.retry import retry_io
from data_pipeline.order.fault_lists import RunFaults
from data_pipeline.order.fault_policy import Fault
from data_pipeline.order.randomness import Permutation
from data_pipeline.order.state import Cursor, Drawn, SamplePosition
from data_pipeline.sample import Provenance, Sample
from data_pipeline.shards.sample_reader import MAX_TEXT_BYTES, assemble
from data_pipeline.shards.tar_stream import PIPE, Members, samples_of
from data_pipeline.storage.location import Url, parse_location
from data_pipeline.storage.storage import Storage

_ROW_BITS = 32

Entry = tuple[str, Members | SampleError | ShardError]
"""Key of a sample, and its members or why they could not be read."""


def commands(patterns: Sequence[str]) -> list[str]:
    """Return the shell commands among the sources of ``data.datasets.*.shards``, braces expanded."""
    sources = (source for pattern in patterns for source in braceexpand(pattern))
    return [source.removeprefix(PIPE) for source in sources if source.startswith(PIPE)]


def expand_shards(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the sources of ``data.datasets.*.shards``, braces expanded: ``part-{000..099}.tar`` gives 100 sources.

    Raises:
        DataConfigError: a URL is malformed, a file is missing, or a source is named twice.
    """
    sources = tuple(source for pattern in patterns for source in braceexpand(pattern))
    for source in sources:
        if not source.startswith(PIPE):
            location = parse_location(source)
            if isinstance(location, Path) and not retry_io(location.exists):
                raise DataConfigError(f"shards: {source}: no such file")
    twice = [source for source, count in Counter(sources).items() if count > 1]
    if twice:
        raise DataConfigError(f"shards: {min(twice)} is named twice")
    return sources


def source_of(sources: Sequence[str], sample: int) -> tuple[str, str]:
    """Return the source of a sample and its row in the source, for example ``#17``; the inverse of ``sample_number``.

    Raises:
        DataConfigError: there are fewer sources than the number of the sample requires.
    """
    shard, row = sample >> _ROW_BITS, sample & ((1 << _ROW_BITS) - 1)
    if shard >= len(sources):
        raise DataConfigError(f"shards: no shard number {shard}: the configuration names {len(sources)} shards")
    return sources[shard], f"#{row}"


def sample_number(source: int, row: int) -> int:
    """Return the number of the sample in a row of the source with this number."""
    return source << _ROW_BITS | row


def any_remote(sources: Sequence[str]) -> bool:
    """Return whether any source is a URL."""
    return any(not source.startswith(PIPE) and isinstance(parse_location(source), Url) for source in sources)


@dataclass(frozen=True)
class StreamedSet:
    """A data set of plain tars; the lanes of a process share it.

    Attributes:
        dataset: Name of the data set.
        sources: Paths, URLs or ``pipe:`` commands, in the order of the configuration.
        seed: Seed of the order.
        window_size: Number of samples of a window; a lane holds one window in memory.
        storage: Reads URLs.
        faults: The bad samples that this process knows.
        max_text_bytes: Largest ``txt`` or ``json`` member; a larger one makes a bad sample.
        lost: Numbers of the shards that could not be read to their end.
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
        """0: unknown without an index."""
        return 0

    def lane(self, lane: int, num_lanes: int) -> StreamedLane:
        """Return the samples of one lane."""
        return StreamedLane(self, lane, num_lanes)


@dataclass
class _Window:
    """Consecutive samples of a shard in stored order; an entry may be the error of reading its sample."""

    shard: int
    number: int
    entries: list[Entry]


class StreamedLane:
    """The samples of one lane: a ``LaneSource``. It holds one window in memory and one shard open.

    Args:
        shared: The data set.
        lane: Number of this lane.
        num_lanes: Number of lanes. Each sample occurs in one lane per epoch.
    """

    random_access = False

    def __init__(self, shared: StreamedSet, lane: int, num_lanes: int) -> None:
        self._set = shared
        self._lane, self._num_lanes = lane, num_lanes
        self.faults = StreamedFaults(self, shared)
        self._window = _Window(-1, -1, [])
        self._open: tuple[int, int, Iterator[Entry]] | None = None

    def resolve(self, cursor: Cursor) -> tuple[SamplePosition, Cursor]:
        """Return the sample at ``cursor`` and the cursor after it. Reads another window if ``cursor`` is outside.

        Raises:
            DataConfigError: no shard holds a sample.
        """
        turn, number, offset = cursor
        # A lane may meet only empty shards for several epochs: with more lanes than shards it does not read all in one.
        empty: set[int] = set()
        while True:
            epoch, shard = self._shard(turn)
            entries = self._load(shard, number)
            if offset < len(entries):
                break
            if len(entries) == self._set.window_size:
                number, offset = number + 1, 0
                continue
            if number == 0 and not entries:
                empty.add(shard)
            if len(empty) == len(self._set.sources):
                raise DataConfigError(f"data set {self._set.dataset}: none of its shards holds a sample")
            turn, number, offset = turn + 1, 0, 0
        order = Permutation(len(entries), self._set.seed, epoch, stream=(shard << _ROW_BITS) + number + 1)
        row = number * self._set.window_size + order[offset]
        return SamplePosition(sample_number(shard, row), epoch), Cursor(turn, number, offset + 1)

    def read(self, sample: int, epoch: int = 0) -> Sample:
        """Return a sample with its members in reading order.

        Raises:
            ShardError, StorageError: the shard is damaged at this sample, or cannot be read.
            SampleError: the JSON or text of the sample is malformed, or the shard no longer contains the sample.
        """
        key, found = self._entry(sample)
        source = self._set.sources[sample >> _ROW_BITS]
        if isinstance(found, SampleError | ShardError):
            raise found
        origin = Provenance(self._set.dataset, source, key, sample, epoch)
        return assemble(found, origin, max_text_bytes=self._set.max_text_bytes)

    def read_without_images(self, sample: int, epoch: int = 0) -> Sample:
        """Return the sample with its images: streaming reads them in any case."""
        return self.read(sample, epoch)

    def prepare(self, cursor: Cursor, waiting: Sequence[Drawn]) -> None:
        """Do nothing: streamed shards are not prefetched."""

    def epoch(self, epoch: int) -> Iterator[tuple[SamplePosition, str, str, Members | SampleError | ShardError]]:
        """Yield position, shard, key and members of each sample of the lane in an epoch.

        Raises:
            DataConfigError: no shard holds a sample.
        """
        first = epoch * len(self._set.sources)
        cursor = Cursor(max(0, -(-(first - self._lane) // self._num_lanes)))
        while self._shard(cursor[0])[0] == epoch:
            position, cursor = self.resolve(cursor)
            if position.epoch != epoch:
                return
            yield (position, self._set.sources[position.sample >> _ROW_BITS], *self._entry(position.sample))

    def where(self, sample: int) -> tuple[str, str]:
        """Return shard and key of a sample; reads the shard up to the sample if its window is not in memory."""
        return self._set.sources[sample >> _ROW_BITS], self._entry(sample)[0]

    def _shard(self, turn: int) -> tuple[int, int]:
        """Return the epoch and the number of the shard that the lane reads at a turn."""
        count = len(self._set.sources)
        epoch, position = divmod(turn * self._num_lanes + self._lane, count)
        return epoch, Permutation(count, self._set.seed, epoch)[position]

    def _entry(self, sample: int) -> Entry:
        shard, row = sample >> _ROW_BITS, sample & ((1 << _ROW_BITS) - 1)
        number, offset = divmod(row, self._set.window_size)
        entries = self._load(shard, number)
        if offset >= len(entries):
            source = self._set.sources[shard]
            return "?", SampleError(f"{source} has no sample {row} any more", kind=FaultKind.SHARD, shard=source)
        return entries[offset]

    def _load(self, shard: int, number: int) -> list[Entry]:
        """Return the entries of a window; fewer than the window size at the end of the shard, none after its end."""
        window = self._window
        if (window.shard, window.number) != (shard, number):
            size = self._set.window_size
            if self._open is None or self._open[0] != shard or self._open[1] > number:
                self.close()
                self._open = (shard, 0, samples_of(self._set.sources[shard], self._set.storage))
            _, next_number, samples = self._open
            for _ in itertools.islice(samples, (number - next_number) * size):
                pass
            entries = list(itertools.islice(samples, size))
            self._open = (shard, number + 1, samples)
            self._window = window = _Window(shard, number, entries)
        return window.entries

    def close(self) -> None:
        """Close the open shard."""
        if self._open is not None:
            samples = self._open[2]
            self._open = None
            samples.close()  # type: ignore[attr-defined] # ``samples_of`` is a generator.


@dataclass(frozen=True)
class StreamedFaults:
    """The known bad samples and lost shards of a streamed data set: a ``KnownFaults``."""

    lane: StreamedLane
    shared: StreamedSet

    def recall(self, sample: int) -> Fault | None:
        """Return the fault of a sample that need not be tried; None if the sample must be tried."""
        run, dataset = self.shared.faults, self.shared.dataset
        return run.excluded(dataset, sample, self, "other shards") or run.recall(dataset, sample)

    def locate(self, sample: int) -> tuple[str, str]:
        """Return shard and key of a sample."""
        return self.lane.where(sample)

    def offset(self, sample: int) -> None:
        """Return None: offsets are not recorded for streamed shards."""

    def record_shard_failure(self, sample: int, error: ShardError | ManifestError) -> Fault:
        """Record the shard as lost from this sample on.

        Raises:
            TooManyFaultsError: more than ``max_share`` of the shards are lost, or all of them.
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
        reason = f"{error}; the samples after it in the shard are lost"
        return Fault(SampleError(reason, kind=FaultKind.SHARD, shard=source, key=key), counts=False)

    def remember(self, sample: int, error: SampleError) -> None:
        """Remember the fault of a quarantined sample."""
        self.shared.faults.remember(self.shared.dataset, sample, error)

    def record_success(self, sample: int) -> None:
        """Do nothing: only lost shards are counted."""
