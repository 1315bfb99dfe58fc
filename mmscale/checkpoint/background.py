"""Saving while training goes on.

    step N     save:  every rank copies its share into the writer's memory     the only wait
    N+1, ...   poll:  are all writers done?                                    a vote of one number a step
    N+m        poll:  yes: rank 0's writer closes the manifest and renames
    N+m+1      poll:  the checkpoint is there

What training does to the weights after ``save`` does not reach the copy. A write that fails is heard by all ranks at
the next step and ends the run there. A crash at any moment leaves a half-written folder, which never looks whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmscale.checkpoint.config import CheckpointConfig
from mmscale.checkpoint.manifest import MANIFEST, TrainState
from mmscale.checkpoint.save import Place, begin, gather_files, give_up_if, save, to_remove, together
from mmscale.checkpoint.share import RankShare, flat_bytes, share_of
from mmscale.dist import World, all_reduce_max
from mmscale.engine.engine import Engine
from mmscale.errors import CheckpointError
from mmscale.io.files import Written
from mmscale.io.writer_process import WriteError, Writer

_DONE, _BUSY, _FAILED = 0.0, 1.0, 2.0
"""Votes; the largest decides."""
_POLL_SECONDS = 0.02
_SPARE = 1.02
"""The memory is larger than the first share by this: the notes of later ones may be a little longer."""


@dataclass
class InFlight:
    """A save between ``save`` and the ``poll`` that ends it; the same on all ranks but for ``answer``."""

    place: Place
    closing: bool = False
    """Whether all ranks' files are written and rank 0 closes the checkpoint."""
    answer: Any = None
    """What this rank's writer said of its order; None while it is at work."""


class Saver:
    """Writes the checkpoints of a run. All ranks must make one and call its methods alike.

    Args:
        world: This rank.
        directory: ``checkpoints`` folder of the run, seen by all ranks.
        config: When to wait, what to keep.
        note: Told of every save that was left out.

    Attributes:
        in_flight: The save that is not on the disk yet; None if there is none. The same on all ranks: they must call
            ``poll`` at each step while there is one.
    """

    def __init__(
        self, world: World, directory: Path, config: CheckpointConfig, note: Callable[[str], None] = lambda text: None
    ) -> None:
        self._world = world
        self._directory = directory
        self._config = config
        self._note = note
        self._writer: Writer | None = None
        self._pinned: Tensor | None = None
        self.in_flight: InFlight | None = None

    def save(self, engine: Engine, state: TrainState, *, last: bool = False) -> None:
        """Begins to write ``step-N``. All ranks must call.

        Args:
            engine: Weights, moments and schedule position.
            state: Counters, and this rank's lanes of the loader.
            last: Wait until it is on the disk; never left out.

        Raises:
            CheckpointError: this save could not begin, or the one before could not be written.
        """
        if self.in_flight is not None and self._config.when_busy == "skip" and not last:
            self._note(f"step {state.step} is not saved: {self.in_flight.place.final.name} is still being written")
            return
        self.wait()
        if not self._config.background:
            save(engine, state, self._directory, self._config)
            return
        place = begin(engine, state, self._directory)
        if place is None:
            return
        together(self._world, place, lambda: self._hand_over(place, share_of(engine, state)))
        self.in_flight = InFlight(place)
        if last:
            self.wait()

    def _hand_over(self, place: Place, share: RankShare) -> None:
        """Copies the share and tells the writer to write it."""
        size = len(share.header) + sum(share.lengths)
        target = self._memory(size)
        target[: len(share.header)] = torch.frombuffer(bytearray(share.header), dtype=torch.uint8)
        start = len(share.header)
        for values in share.values:
            if values.nbytes:
                target[start : start + values.nbytes].copy_(flat_bytes(values), non_blocking=True)
                start += values.nbytes
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        self._order(
            "share",
            folder=str(place.partial),
            names=share.names,
            header_bytes=len(share.header),
            lengths=share.lengths,
            notes=share.notes,
        )

    def _memory(self, size: int) -> Tensor:
        """The writer's memory, ``(at least size,)`` bytes; a new writer where the old one's does not suffice."""
        if self._writer is None or len(self._writer.memory) < size:
            self._close_writer()
            self._writer = Writer(int(size * _SPARE) + 1)
            target = torch.frombuffer(self._writer.memory, dtype=torch.uint8)
            if self._world.device.type == "cuda":  # A device copies into pinned pages several times as fast.
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(target.data_ptr(), target.nbytes, 0))
                self._pinned = target
            return target
        return torch.frombuffer(self._writer.memory, dtype=torch.uint8)

    def _order(self, what: str, **arguments: object) -> None:
        assert self._writer is not None
        try:
            self._writer.order(what, **arguments)
        except WriteError as error:
            raise OSError(str(error)) from error

    def poll(self, patience_seconds: float = 0.0) -> None:
        """Looks how far the save is, and takes the next step of it if all ranks can. All ranks must call.

        Args:
            patience_seconds: How long to wait for this rank's writer.

        Raises:
            CheckpointError: a rank could not write.
        """
        flight = self.in_flight
        if flight is None:
            return
        complaint = self._look(flight, patience_seconds)
        vote = _FAILED if complaint is not None else _BUSY if flight.answer is None else _DONE
        vote = all_reduce_max(self._world, vote)
        if vote == _FAILED:
            self.in_flight = None
            self._close_writer()
            give_up_if(self._world, flight.place, complaint)
        elif vote == _DONE and not flight.closing:
            self._close(flight)
        elif vote == _DONE:
            self.in_flight = None

    def wait(self) -> None:
        """Waits until nothing is left to write. All ranks must call.

        Raises:
            CheckpointError: a rank could not write.
        """
        while self.in_flight is not None:
            self.poll(_POLL_SECONDS)

    def _look(self, flight: InFlight, patience_seconds: float) -> str | None:
        """Takes the writer's answer if it has one; what it complains of."""
        if flight.answer is None:
            assert self._writer is not None
            try:
                flight.answer = self._writer.answer(patience_seconds)
            except WriteError as error:
                return str(error)
        return None

    def _close(self, flight: InFlight) -> None:
        """All ranks' files are on the disk: rank 0's writer adds the manifest and gives the folder its name."""
        files = gather_files(self._world, [Written(*numbers) for numbers in flight.answer])
        flight.closing = True
        flight.answer = None if self._world.is_main else True
        place = flight.place

        def order() -> None:
            doomed = [str(path) for path in to_remove(place.final, self._config)]
            names = {"partial": str(place.partial), "final": str(place.final), "name": MANIFEST}
            self._order("publish", **names, text=place.close(files), doomed=doomed)

        try:
            together(self._world, place, order, only_main=True)
        except CheckpointError:
            self.in_flight = None
            raise

    def close(self) -> None:
        """Ends the writer. What it has not finished is left half-written, for the next save to sweep away."""
        self.in_flight = None
        self._close_writer()

    def _close_writer(self) -> None:
        if self._writer is None:
            return
        if self._pinned is not None:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.data_ptr())
            self._pinned = None
        self._writer.close()
        self._writer = None
