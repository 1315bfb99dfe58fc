"""Reads and decodes the samples of one lane ahead of use.

    LaneSequence --draw--> read, plan --decode, in this thread or in a pool--> queue --next, in order--> PendingDocument

The length of the queue never changes the result. Samples leave the queue in the order in which they were drawn, each
with its document or its error. Samples that were drawn under other mixture weights are dropped and drawn again. Not
for: the treatment of errors (``fault_policy``).
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
from data_pipeline.packing.document_builder import DocumentPlan


@dataclass(frozen=True)
class PendingDocument:
    """A drawn sample and its document, which may still be decoding.

    Attributes:
        drawn: The sample.
        after: The position of the lane after this sample.
        document: ``result()`` waits for the document and raises the error of reading, planning or decoding.
    """

    drawn: Drawn
    after: StreamPosition
    document: Future[Document]


class DecodeAhead:
    """The queue of read-ahead samples of one lane.

    Args:
        sequence: The order of the lane's samples.
        datasets: The open data sets of the mixture.
        sources: The lane's samples in each data set.
        threads: Thread pool that decodes images; None decodes in the caller's thread.

    Attributes:
        depth: Number of samples that are drawn, read and decoded ahead.
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
        self._queue: deque[PendingDocument] = deque()
        self._may_draw = True  # False after a failed read or a read without random access, until the queue is empty.

    def next(self, position: StreamPosition, step: int) -> tuple[StreamPosition, PendingDocument | None]:
        """Return the position after the next sample, and the sample.

        The sample is None if every data set with a weight above 0 at ``step`` is exhausted. Pass the position that the
        previous call returned: samples that are in the queue follow that position.

        Raises:
            DataPipelineError: the next sample cannot be determined, for example because a pipeline failed.
        """
        if self._queue and not self._sequence.is_current(self._queue[0].after, step):
            self._queue.clear()  # The mixture weights changed.
        self._may_draw = self._may_draw or not self._queue
        if not self._queue or self._threads is not None:  # Threads decode while the caller reads the next samples.
            end = self._fill_queue(position, step)
            if not self._queue:
                return end, None
        turn = self._queue.popleft()
        return turn.after, turn

    def _fill_queue(self, position: StreamPosition, step: int) -> StreamPosition:
        """Draw and read samples until the queue has ``depth`` of them, then decode the new ones.

        Two loops, because the code of each then stays in the CPU's cache.
        """
        position = self._queue[-1].after if self._queue else position
        begun = list[tuple[Drawn, StreamPosition, DocumentPlan | Exception]]()
        while self._may_draw and len(self._queue) + len(begun) < self.depth:
            try:
                drawn, position = self._sequence.draw(position, step)
            except DataPipelineError:
                if not begun and not self._queue:
                    raise
                self._may_draw = False  # Draw it again, and raise, when the samples before it were consumed.
                break
            if drawn is None:
                break
            source = self._sources[drawn.dataset]
            fault = source.faults.recall(drawn.sample)
            self._may_draw = source.random_access
            plan: DocumentPlan | Exception
            try:
                plan = self._datasets[drawn.dataset].plan(source, drawn) if fault is None else fault.error
            except Exception as error:  # Queue it: the fault policy counts faults in the order of the samples.
                plan = error
                self._may_draw = False  # The failure may have invalidated the whole shard.
            begun.append((drawn, position, plan))
        for drawn, after, plan in begun:
            self._queue.append(PendingDocument(drawn, after, self._decode(plan)))
        return position

    def _decode(self, plan: DocumentPlan | Exception) -> Future[Document]:
        if self._threads is not None and isinstance(plan, DocumentPlan):
            return self._threads.submit(plan)
        document: Future[Document] = Future()  # Resolved before it is returned.
        try:
            if isinstance(plan, Exception):
                document.set_exception(plan)
            else:
                document.set_result(plan())
        except Exception as error:
            document.set_exception(error)
        return document
