"""Let writes of a run fail: of a process that imports this module with ``FAULTY_WRITES`` set, and of its children.

``environment`` also copies this file as ``sitecustomize.py``, which every new interpreter imports.

``FAULTY_WRITES`` is a JSON object: ``run`` is the run folder, ``log`` a file that gets a line for each fault, and
``rules`` a list of ``[PART, ERRNO, FIRST, PERIOD]``. A rule applies to paths of the run folder that contain PART. Each
process counts its writes for itself, from the first step that ``metrics.jsonl`` has. From write number FIRST on, two of
PERIOD successive writes fail, or all of them with PERIOD 0.

A write is an open of a file for writing, ``fsync``, or a change of a folder.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def install(run: str, log: str, rules: list[tuple[str, int, int, int]]) -> None:
    """Let writes of this process fail."""
    counts: Counter[int] = Counter()
    metrics = os.path.join(run, "metrics.jsonl")
    busy = False

    def maybe_fail(path: str) -> None:
        nonlocal busy
        if busy or not path.startswith(run) or not os.path.exists(metrics) or not os.path.getsize(metrics):
            return
        for number, (part, code, first, period) in enumerate(rules):
            if part not in path:
                continue
            counts[number] += 1
            if counts[number] >= first and (not period or (counts[number] - first) % period < 2):
                busy = True
                with open(log, "a") as file:
                    file.write(f"{number} {os.path.relpath(path, run)}\n")
                busy = False
                raise OSError(code, os.strerror(code), path)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & _WRITES):
            target = args[1] if event == "os.rename" else args[0]
            if isinstance(target, str | os.PathLike):
                maybe_fail(os.fspath(target))

    def fsync(handle: int, real: Callable[[int], None] = os.fsync) -> None:
        maybe_fail(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    sys.addaudithook(hook)
    os.fsync = fsync


def environment(folder: Path, run: Path, log: Path, *rules: tuple[str, int, int, int]) -> dict[str, str]:
    """Return the variables of a process whose writes fail, as do those of its children. ``folder`` must not exist."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_bytes(Path(__file__).read_bytes())
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    values = {"run": str(run), "log": str(log), "rules": rules}
    return {"PYTHONPATH": os.pathsep.join(paths), "FAULTY_WRITES": json.dumps(values)}


def run_command(words: list[str]) -> None:
    """Run ``mmscale WORDS`` in a process of a fork server."""
    from tests.engine.fork_server import run_command

    run_command(words)


if "FAULTY_WRITES" in os.environ:
    install(**json.loads(os.environ["FAULTY_WRITES"]))
