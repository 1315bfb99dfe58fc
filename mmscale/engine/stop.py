"""Stopping between two steps: signals and the deadline of a SLURM job.

A handler only sets a flag; ``StopRequest.should_stop`` asks all ranks at a step boundary, so that they save together. A
signal can also mean that a peer has died: then the vote does not come back and raises EngineError in bounded time.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mmscale.dist import World, any_rank

_GRACEFUL = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop.

    Args:
        margin_seconds: How long before SLURM's end of the job (``SLURM_JOB_END_TIME``) to stop by ourselves; enough to
            finish a step and save.
    """

    def __init__(self, margin_seconds: float = 120.0) -> None:
        self.reason: str | None = None
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self._deadline = float(end) - margin_seconds if end.isdigit() else None

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler: remembers the request. A second Ctrl-C raises KeyboardInterrupt at once."""
        del frame
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = self.reason or f"signal {signal.Signals(number).name}"

    def should_stop(self, world: World) -> bool:
        """Whether any rank was asked to stop. All ranks must call, at the same step.

        Raises:
            EngineError: a peer did not answer in time.
        """
        if self.reason is None and self._deadline is not None and time.time() >= self._deadline:
            self.reason = "the end of the SLURM job is near"
        stop = any_rank(world, self.reason is not None)
        if stop and self.reason is None:
            self.reason = "another rank was asked to stop"
        return stop


@contextmanager
def listen_for_stop(margin_seconds: float = 120.0) -> Iterator[StopRequest]:
    """Handles SIGTERM, SIGUSR1 and SIGINT (main thread only), and puts the old handlers back at the end."""
    request = StopRequest(margin_seconds)
    before = {number: signal.signal(number, request.note) for number in _GRACEFUL}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
