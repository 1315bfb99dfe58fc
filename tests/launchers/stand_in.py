"""Replaces the command line in launcher tests. Its arguments set its behaviour; it does not import torch."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def main(arguments: list[str]) -> int:
    folder, rank = Path(arguments[0]), os.environ["RANK"]
    what = dict(word.split("=", 1) for word in arguments[1:])
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _frame: received.append(number))
    print(f"out of rank {rank}")
    print(f"err of rank {rank}", file=sys.stderr)
    (folder / f"world-{rank}").write_text(" ".join(os.environ[name] for name in ("WORLD_SIZE", "OMP_NUM_THREADS")))
    (folder / f"alive-{rank}").write_text(str(os.getpid()))
    if "stay" in what:
        deadline = time.monotonic() + float(what["stay"])
        while not received and time.monotonic() < deadline:
            time.sleep(0.05)
        (folder / f"signals-{rank}").write_text(" ".join(str(int(number)) for number in received))
        return 75 if received else 0
    if what.get("kill") == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    if "stubborn" in what:
        while not received:
            time.sleep(0.05)
        (folder / f"signals-{rank}").write_text("received")
        time.sleep(60)
    while "kill" in what and not received:
        time.sleep(0.05)
    if what.get("late") == rank:
        while not received:  # Until the launcher signals that another rank failed.
            time.sleep(0.05)
    if "complain" in what:
        complain(f"mmscale: {what['complain']}\n")
    return int(what.get(f"code{rank}", "0"))


def complain(text: str) -> None:
    """Print an error like ``mmscale.cli.console``."""
    sys.stderr.write(text)
    if "MMSCALE_COMPLAINT" in os.environ:
        os.write(int(os.environ["MMSCALE_COMPLAINT"]), text.encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
