"""The message for a missing file."""

from __future__ import annotations

import difflib
import os
from contextlib import suppress
from itertools import islice
from pathlib import Path

_MOST_NAMES = 1000
"""Largest number of names of a folder that are compared with the missing one."""


def no_such_file(path: Path) -> str:
    """Return "no such file" for a message, with the absolute path that was tried and the nearest name in its folder."""
    near: list[str] = []
    with suppress(OSError), os.scandir(path.parent) as entries:
        names = [entry.name for entry in islice(entries, _MOST_NAMES)]
        near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
    tried = "" if path.is_absolute() else f" (looked for {path.absolute()})"
    return f"no such file{tried}" + (f"; did you mean '{path.parent / near[0]}'?" if near else "")
