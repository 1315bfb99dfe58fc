"""One lane of a data set with a manifest: places from ``lanes``, samples from ``sample_reader``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.loader.known_faults import KnownSample, SetFaults
from data_pipeline.order.config import OrderConfig
from data_pipeline.order.lanes import Cursor, LaneOrder, Place
from data_pipeline.order.state import Drawn
from data_pipeline.sample import Sample
from data_pipeline.shards.sample_reader import SampleReader


@dataclass(frozen=True)
class IndexedSet:
    """What the lanes of a process share of an indexed data set.

    Attributes:
        reader: Reads its samples.
        seed: Of the order.
        order: How it is shuffled.
        faults: What the process knows of its bad samples.
    """

    reader: SampleReader
    seed: int
    order: OrderConfig
    faults: SetFaults

    @property
    def num_samples(self) -> int:
        return self.reader.manifest.num_samples

    def lane(self, lane: int, num_lanes: int) -> IndexedLane:
        """The samples of one lane."""
        return IndexedLane(self, lane, num_lanes)


class IndexedLane:
    """Places and samples of one lane.

    Args:
        shared: The data set.
        lane: This lane.
        num_lanes: All lanes; over them each sample occurs once an epoch.
    """

    def __init__(self, shared: IndexedSet, lane: int, num_lanes: int) -> None:
        self._set, self._lane = shared, lane
        order = shared.order
        self._order = LaneOrder(shared.num_samples, order.block_size, order.window_blocks, shared.seed, lane, num_lanes)
        self._at: Cursor | None = None
        self._expected: tuple[int, int] | None = None

    def resolve(self, cursor: Cursor) -> tuple[Place, Cursor]:
        """The sample at ``cursor`` and the cursor after it."""
        place, self._at = self._order.resolve(cursor)
        return place, self._at

    def prepare(self, cursor: Cursor, waiting: Sequence[Drawn]) -> None:
        """Starts to fetch what is needed from ``cursor`` on, if the data set is remote."""
        self._expect(self._order.resolve(cursor)[1])

    def read(self, sample: int, epoch: int = 0) -> Sample:
        """As ``SampleReader.read``; says once a window what is needed in this window and the next."""
        if self._at is not None:
            self._expect(self._at)
        return self._set.reader.read(sample, epoch, self._lane)

    def _expect(self, at: Cursor) -> None:
        if self._set.reader.manifest.is_remote and self._expected != at[:2]:
            self._expected = at[:2]
            self._set.reader.expect(self._lane, self._order.blocks(at))

    def read_outline(self, sample: int, epoch: int = 0) -> Sample:
        """As ``SampleReader.read_outline``."""
        return self._set.reader.read_outline(sample, epoch)

    def known(self, sample: int) -> KnownSample:
        """The view that ``FaultPolicy.attempt`` takes."""
        return self._set.faults.of(sample)
