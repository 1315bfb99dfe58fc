"""Make a process kill itself at its n-th file operation below a folder. Python imports this module at startup."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def die_at_event(number: int, folder: str) -> None:
    """Kill this process at its ``number``-th sync, or audited file operation below ``folder``."""
    left = number

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        touches = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "sync")
        if touches and (event == "sync" or str(arguments[0]).startswith(folder)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    sync = os.fsync

    def counted_sync(handle: int) -> None:
        count("sync", ())
        sync(handle)
        count("sync", ())

    os.fsync = counted_sync


if "DIE_AT_EVENT" in os.environ:
    die_at_event(int(os.environ["DIE_AT_EVENT"]), os.environ["DIE_BELOW"])
