"""Save checkpoints while training continues.

    step N     save:  every rank copies its share into its writer's memory    training waits only here
    N+1, ...   poll:  are all writers done?                                   one all-reduce of one number
    N+m        poll:  yes: rank 0's writer writes the manifest and renames the folder
    later      poll:  rank 0's writer is done: the checkpoint is complete

Later changes of the weights do not affect the copy. If a write fails, the next ``poll`` raises on all ranks. A crash at
any moment leaves either ``step-N.partial`` or a complete checkpoint.
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
from mmscale.checkpoint.save import (
    SaveTarget,
    abort_on_any_rank,
    begin,
    gather_files,
    run_or_abort,
    save,
    stale_checkpoints,
)
from mmscale.checkpoint.share import RankShare, flat_bytes, share_of
from mmscale.dist import World, all_reduce_max
from mmscale.engine.engine import Engine
from mmscale.errors import CheckpointError
from mmscale.io.files import WrittenFile
from mmscale.io.writer_process import WriteError, Writer

_DONE, _BUSY, _FAILED = 0.0, 1.0, 2.0
"""State of a rank's writer. ``poll`` acts on the maximum over all ranks."""
_POLL_SECONDS = 0.02
_SPARE = 1.02
"""Factor between the writer's memory and the share that it was made for: a later header may be slightly longer."""


@dataclass
class InFlight:
    """A save that ``save`` has started and no ``poll`` has completed. All ranks agree on all fields but ``result``."""

    target: SaveTarget
    publishing: bool = False
    """Whether all ranks' files are written and rank 0's writer publishes the checkpoint."""
    result: Any = None
    """Result of this rank's writer for its current command; None while the writer is busy."""


class Saver:
    """Writes the checkpoints of a run. All ranks must make one and call ``save``, ``poll`` and ``wait`` together.

    Args:
        world: This rank.
        directory: ``checkpoints`` folder of the run, shared by all ranks.
        config: Its retention settings, ``background`` and ``when_busy`` apply.
        note: Called with one line for each skipped save.

    Attributes:
        in_flight: The save that is not complete yet; None if there is none. It is set on all ranks or on none. While it
            is set, all ranks must call ``poll`` once per step.
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

    def save(self, engine: Engine, state: TrainState, *, last: bool = False, required: bool = False) -> None:
        """Start to write ``step-N``. All ranks must call.

        If the previous save is still being written, this one waits for it or is skipped (``when_busy``). With
        ``background=false`` this method writes the whole checkpoint before it returns.

        Args:
            engine: Source of the weights, the optimizer state and the step counts.
            state: Progress of the run, with the loader state of this rank's lanes.
            last: Never skip this save, and return only when the checkpoint is complete.
            required: Never skip this save.

        Raises:
            CheckpointError: this save could not start, or the previous one failed. With ``last`` or
                ``background=false`` also: this save could not be written. All ranks raise.
        """
        may_skip = self._config.when_busy == "skip" and not last and not required
        if self.in_flight is not None and may_skip:
            self._note(f"step {state.step} is not saved: {self.in_flight.target.final.name} is still being written")
            return
        self.wait()
        if not self._config.background:
            save(engine, state, self._directory, self._config)
            return
        target = begin(engine, state, self._directory)
        if target is None:
            return
        run_or_abort(self._world, target, lambda: self._start_write(target, share_of(engine, state)))
        self.in_flight = InFlight(target)
        if last:
            self.wait()

    def _start_write(self, target: SaveTarget, share: RankShare) -> None:
        """Copy the share into the writer's memory and start to write it."""
        size = len(share.header) + sum(share.lengths)
        memory = self._memory(size)
        memory[: len(share.header)] = torch.frombuffer(bytearray(share.header), dtype=torch.uint8)
        start = len(share.header)
        for values in share.values:
            if values.nbytes:
                memory[start : start + values.nbytes].copy_(flat_bytes(values), non_blocking=True)
                start += values.nbytes
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        self._send(
            "share",
            folder=str(target.partial),
            names=share.names,
            header_bytes=len(share.header),
            lengths=share.lengths,
            metadata=share.metadata,
        )

    def _memory(self, size: int) -> Tensor:
        """Return the writer's memory: at least ``size`` bytes, uint8. Starts a new writer if the old one has less."""
        if self._writer is None or len(self._writer.memory) < size:
            self._close_writer()
            self._writer = Writer(int(size * _SPARE) + 1)
            memory = torch.frombuffer(self._writer.memory, dtype=torch.uint8)
            if self._world.device.type == "cuda":  # A device copies into pinned pages several times as fast.
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
                self._pinned = memory
            return memory
        return torch.frombuffer(self._writer.memory, dtype=torch.uint8)

    def _send(self, command: str, **arguments: object) -> None:
        assert self._writer is not None
        try:
            self._writer.send(command, **arguments)
        except WriteError as error:
            raise OSError(str(error)) from error

    def poll(self, wait_seconds: float = 0.0) -> None:
        """Check the save in flight. All ranks must call.

        When the writers of all ranks are done with their shares, this method starts to publish the checkpoint. When
        rank 0's writer has published it, ``in_flight`` becomes None. Otherwise nothing changes.

        Args:
            wait_seconds: Longest time to wait for this rank's writer.

        Raises:
            CheckpointError: a rank could not write. All ranks raise.
        """
        flight = self.in_flight
        if flight is None:
            return
        complaint = self._read_result(flight, wait_seconds)
        vote = _FAILED if complaint is not None else _BUSY if flight.result is None else _DONE
        vote = all_reduce_max(self._world, vote)
        if vote == _FAILED:
            self.in_flight = None
            self._close_writer()
            abort_on_any_rank(self._world, flight.target, complaint)
        elif vote == _DONE and not flight.publishing:
            self._publish(flight)
        elif vote == _DONE:
            self.in_flight = None

    def wait(self) -> None:
        """Block until no save is in flight. All ranks must call.

        Raises:
            CheckpointError: a rank could not write. All ranks raise.
        """
        while self.in_flight is not None:
            self.poll(_POLL_SECONDS)

    def _read_result(self, flight: InFlight, wait_seconds: float) -> str | None:
        """Store the writer's result in ``flight`` if there is one. Return its error message, or None."""
        if flight.result is None:
            assert self._writer is not None
            try:
                flight.result = self._writer.result(wait_seconds)
            except WriteError as error:
                return str(error)
        return None

    def _publish(self, flight: InFlight) -> None:
        """Start to publish the checkpoint: rank 0's writer writes the manifest and renames the folder.

        All ranks must call, after the files of all ranks are written and synced.
        """
        files = gather_files(self._world, [WrittenFile(*numbers) for numbers in flight.result])
        flight.publishing = True
        flight.result = None if self._world.is_main else True
        target = flight.target

        def send() -> None:
            stale = [str(path) for path in stale_checkpoints(target.final, self._config, target.best)]
            names = {"partial": str(target.partial), "final": str(target.final), "name": MANIFEST}
            best = None if target.best_folder is None else str(target.best_folder)
            self._send("publish", **names, text=target.manifest_text(files), stale=stale, best=best)

        try:
            run_or_abort(self._world, target, send, only_main=True)
        except CheckpointError:
            self.in_flight = None
            raise

    def close(self) -> None:
        """End this rank's writer. An unfinished checkpoint remains as ``step-N.partial``; the next save removes it."""
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
