"""The samples of one lane, read and decoded before their turn.

    LaneSequence --draw--> read, plan --decode, here or in threads--> queue --next, in order--> Turn

Nobody sees how far ahead the queue is. Samples leave it in the order in which they were drawn, each with its document
or its error, and what was drawn for another mixture is drawn again. Only this module knows whether threads decode. Not
for: what an error does (``fault_policy``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

from data_pipeline.document import Document
from data_pipeline.errors import DataPipelineError
from data_pipeline.loader.sample_source import LaneSource, OpenDataset
from data_pipeline.order.lanes import LaneSequence
from data_pipeline.order.state import Drawn, StreamPosition
from data_pipeline.packing.document_builder import Outline


@dataclass(frozen=True)
class Turn:
    """A sample whose turn it is.

    Attributes:
        drawn: The sample.
        after: The position after it.
        document: Its document. ``result()`` waits for it and raises the error of reading, planning or decoding.
    """

    drawn: Drawn
    after: StreamPosition
    document: Future[Document]


class DecodeAhead:
    """Turns of one lane.

    Args:
        sequence: Draws samples.
        datasets: Open data sets.
        sources: The lane in each of them.
        threads: Decode images; None decodes in the caller's thread.

    Attributes:
        depth: Samples that are drawn, read and decoded before the first of them is taken.
    """

    def __init__(
        self,
        sequence: LaneSequence,
        datasets: Sequence[OpenDataset],
        sources: Sequence[LaneSource],
        threads: Executor | None,
    ) -> None:
        self.depth = 1
        self._sequence, self._datasets, self._sources, self._threads = sequence, datasets, sources, threads
        self._queue: deque[Turn] = deque()
        self._may_draw = True  # Until what is in the queue was tried.

    def next(self, position: StreamPosition, step: int) -> tuple[StreamPosition, Turn | None]:
        """The next sample from ``position`` on, with the position behind it; None when every data set is used up.

        Raises:
            DataPipelineError: the order itself cannot be read on.
        """
        if self._queue and not self._sequence.is_current(self._queue[0].after, step):
            self._queue.clear()  # Other weights hold now.
        self._may_draw = self._may_draw or not self._queue
        if not self._queue or self._threads is not None:  # Threads decode while the caller reads on.
            end = self._draw_on(position, step)
            if not self._queue:
                return end, None
        turn = self._queue.popleft()
        return turn.after, turn

    def _draw_on(self, position: StreamPosition, step: int) -> StreamPosition:
        """Draws and reads until ``depth`` samples are there, then decodes these: each loop stays in the CPU's cache."""
        position = self._queue[-1].after if self._queue else position
        begun = list[tuple[Drawn, StreamPosition, Outline | Exception]]()
        while self._may_draw and len(self._queue) + len(begun) < self.depth:
            try:
                drawn, position = self._sequence.draw(position, step)
            except DataPipelineError:
                if not begun and not self._queue:
                    raise
                self._may_draw = False  # It is met again when its turn comes.
                break
            if drawn is None:
                break
            source = self._sources[drawn.dataset]
            fault = source.faults.recall(drawn.sample)
            self._may_draw = source.random_access
            outline: Outline | Exception
            try:
                outline = self._datasets[drawn.dataset].outline(source, drawn) if fault is None else fault.error
            except Exception as error:  # Its turn comes when the samples before it were counted.
                outline = error
                self._may_draw = False  # It may have cost its whole shard.
            begun.append((drawn, position, outline))
        for drawn, after, outline in begun:
            self._queue.append(Turn(drawn, after, self._decoded(outline)))
        return position

    def _decoded(self, outline: Outline | Exception) -> Future[Document]:
        if self._threads is not None and isinstance(outline, Outline):
            return self._threads.submit(outline)
        document: Future[Document] = Future()
        try:
            if isinstance(outline, Exception):
                document.set_exception(outline)
            else:
                document.set_result(outline())
        except Exception as error:
            document.set_exception(error)
        return document
