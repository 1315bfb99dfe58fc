"""Stop a run between two steps, on a signal or before the deadline of a SLURM job.

The signal handler only sets a flag. ``StopRequest.should_stop`` combines the flags of all ranks at a step boundary, so
that all ranks save the same step. If the signal arrived because another rank died, that collective fails: it raises
EngineError within ``engine.timeout_seconds``.
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
    """The stop request of this process, if any.

    Args:
        margin_seconds: The run stops by itself this long before SLURM ends the job (``SLURM_JOB_END_TIME``). It must
            suffice to finish a step and save.

    Attributes:
        reason: Why to stop; None without a request.
    """

    def __init__(self, margin_seconds: float = 120.0) -> None:
        self.reason: str | None = None
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self._deadline = float(end) - margin_seconds if end.isdigit() else None

    def handle_signal(self, number: int, frame: FrameType | None = None) -> None:
        """Record the request. A Ctrl-C after an earlier request raises KeyboardInterrupt at once."""
        del frame
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = self.reason or f"signal {signal.Signals(number).name}"

    def should_stop(self, world: World) -> bool:
        """Return whether any rank has a stop request. All ranks must call, at the same step.

        Raises:
            EngineError: another rank is lost or did not answer in time.
        """
        if self.reason is None and self._deadline is not None and time.time() >= self._deadline:
            self.reason = "the end of the SLURM job is near"
        stop = any_rank(world, self.reason is not None)
        if stop and self.reason is None:
            self.reason = "another rank has a stop request"
        return stop


@contextmanager
def listen_for_stop(margin_seconds: float = 120.0) -> Iterator[StopRequest]:
    """Handle SIGTERM, SIGUSR1 and SIGINT, and restore the previous handlers at the end. Main thread only."""
    request = StopRequest(margin_seconds)
    before = {number: signal.signal(number, request.handle_signal) for number in _GRACEFUL}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
