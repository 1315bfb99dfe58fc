"""Simulate a power cut: only synced data is sure to survive.

content of a file     survives if the file was synced
names in a folder     survive if the folder was synced; names in the watched folder itself may survive without a sync
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Disk:
    """Tracks the durable state of a folder, and reproduces the states that a power cut could leave.

    Args:
        folder: Existing folder. All its content counts as durable at first.
        scratch: Empty folder for the copies.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._folder = folder
        self._scratch = scratch
        self._copies = 0
        self._files: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        for path in (folder, *folder.rglob("*")):
            self._sync(path)

    def _sync(self, path: Path) -> None:
        inode = path.stat().st_ino
        if path.is_dir():
            self._names[inode] = _names_in(path)
        else:
            self._files[inode] = path.read_bytes()

    def watch(self, patch: pytest.MonkeyPatch, check: Callable[[Path], None]) -> None:
        """Call ``check`` with each possible state after a power cut, at each later sync and rename."""
        fsync, rename, replace = os.fsync, Path.rename, os.replace

        def synced(handle: int) -> None:
            path = Path(f"/proc/self/fd/{handle}").resolve()
            fsync(handle)
            mode = os.fstat(handle).st_mode
            assert stat.S_ISDIR(mode) or stat.S_ISREG(mode)
            self._sync(path)
            self.check_all(check)

        def renamed(path: Path, target: Any) -> Path:
            answer = rename(path, target)
            self.check_all(check)
            return answer

        def replaced(path: Any, target: Any) -> None:
            replace(path, target)
            self.check_all(check)

        patch.setattr(os, "fsync", synced)
        patch.setattr(Path, "rename", renamed)
        patch.setattr(os, "replace", replaced)

    def check_all(self, check: Callable[[Path], None]) -> None:
        """Call ``check`` with each possible state after a power cut at this moment."""
        for names in (self._names[self._folder.stat().st_ino], _names_in(self._folder)):
            self._copies += 1
            copy = self._scratch / str(self._copies)
            copy.mkdir()
            self._write(copy, names)
            check(copy)

    def _write(self, folder: Path, names: dict[str, int]) -> None:
        for name, inode in names.items():
            if inode in self._names:
                (folder / name).mkdir()
                self._write(folder / name, self._names[inode])
            else:
                (folder / name).write_bytes(self._files.get(inode, b""))


def _names_in(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir()}
