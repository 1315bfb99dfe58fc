"""Holds the lock of a folder in a process of its own until it is signalled: ``python -m tests.run.holder FOLDER``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from mmscale.io.lock import FolderLock

folder = Path(sys.argv[1])
signal.signal(signal.SIGUSR1, lambda _number, _frame: (folder / "signalled").touch())
lock = FolderLock(folder)
assert lock.attempt() is None
print("held", flush=True)
while True:
    signal.pause()
