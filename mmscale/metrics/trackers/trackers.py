"""The trackers of a run, on the side of the training process: start their processes, write messages, print notes.

``follow`` describes the other side, and why a tracker cannot delay a step.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from data_pipeline.io.atomic import as_utf8, write_whole
from mmscale.io.software import ROOT
from mmscale.metrics.sample_images import CaptionedImage, encode_png, with_caption
from mmscale.metrics.trackers.config import TrackerConfig
from mmscale.metrics.trackers.follow import FINISHED, FOLDER, OUTBOX, START_FILE, STATE_FILE, STOPPED, State
from mmscale.metrics.trackers.messages import Image, Record, Table, write_message

FINISHED_SECONDS = 30.0
"""Longest wait for a tracker at the end of a finished run."""
STOPPED_SECONDS = 10.0
"""Longest wait for a tracker at the end of a start that did not finish the run."""
_POLL_SECONDS, _QUIET_SECONDS = 0.05, 3.0
FOLLOW = "mmscale.metrics.trackers.follow"


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run that a tracker shows.

    Attributes:
        name: Name of the run folder.
        config: Values of the configuration by dotted key, without secrets.
        commit: Git commit of the code; None if unknown.
        facts: Further values by name, such as the path of the report.
    """

    name: str
    config: Mapping[str, Any]
    commit: str | None
    facts: Mapping[str, Any]


class Trackers:
    """The trackers of a run. Rank 0 has those of the configuration; every other rank has none.

    As a context manager it ends their processes; a run that did not call ``close(finished=True)`` may resume.

    Args:
        run_dir: The run folder.
        trackers: ``metrics.trackers``.
        log_every: ``metrics.log_every``.
    """

    def __init__(self, run_dir: Path, trackers: Sequence[TrackerConfig], log_every: int) -> None:
        self._run_dir, self._log_every = run_dir, log_every
        self._links = [_Link(run_dir, tracker) for tracker in trackers]
        self._print: Callable[[str], object] = lambda line: None

    def __bool__(self) -> bool:
        return bool(self._links)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(finished=False)

    def start(self, facts: RunFacts, print_line: Callable[[str], object]) -> None:
        """Start the processes, or, at a later call, only print their notes with ``print_line`` from now on.

        A process that cannot be started is a note, not an error.
        """
        self._print = print_line
        for link in self._links:
            link.start(facts, self._log_every)
        self.print_notes()

    def print_notes(self) -> None:
        """Print the lines that the processes have written since the last call. Returns at once."""
        for link in self._links:
            for line in link.pop_notes():
                self._print(f"{link.kind}: {line}")

    def scalars(self, step: int, what: str, values: Mapping[str, float]) -> None:
        """Send values of a step that are not in its line of ``metrics.jsonl``. ``what`` names the kind of values."""
        self._write(what, Record(step, scalars=dict(values)))

    def images(self, step: int, images: Sequence[CaptionedImage], name: str = "samples") -> None:
        """Send images with their captions as ``name/0`` and so on."""
        named = {
            f"{name}/{number}": Image(encode_png(with_caption(image)), image.caption)
            for number, image in enumerate(images)
        }
        self._write(name, Record(step, images=named))

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table."""
        self._write(name, Record(step, tables={name: Table(columns, rows)}))

    def close(self, *, finished: bool) -> None:
        """Let the processes send the rest, for a limited time, and end them. A second call does nothing."""
        seconds = FINISHED_SECONDS if finished else STOPPED_SECONDS
        deadline, quiet = time.monotonic() + seconds, time.monotonic() + min(_QUIET_SECONDS, seconds)
        for link in self._links:
            link.end(finished)
        if waiting := [link.kind for link in self._links if not link.has_ended(quiet)]:
            self._print(f"waiting for {' and '.join(waiting)}, at most {seconds:.0f} seconds")
        for link in self._links:
            link.wait(deadline)
        self.print_notes()
        self._links = []

    def _write(self, what: str, record: Record) -> None:
        for link in self._links:
            link.write(what, record)


class _Link:
    """One tracker and its process."""

    def __init__(self, run_dir: Path, tracker: TrackerConfig) -> None:
        self.kind = tracker.kind
        self._run_dir, self._tracker = run_dir, tracker
        self._folder = run_dir / FOLDER / tracker.kind
        self._log = run_dir / "logs" / f"tracker-{self.kind}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._notes: list[str] = []
        self._partial = b""
        self._num_dropped = 0

    def start(self, facts: RunFacts, log_every: int) -> None:
        """Start the process, unless it is started."""
        if self._process is not None:
            return
        content = {
            "id": uuid.uuid4().hex[:12],
            "tracker": self._tracker.model_dump(mode="json"),
            "log_every": log_every,
            "name": self._tracker.name or facts.name,
            "config": dict(facts.config),
            "commit": facts.commit,
            "facts": dict(facts.facts),
        }
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            write_whole(self._folder / START_FILE, as_utf8(json.dumps(content, ensure_ascii=False)), parents=True)
            self._log.parent.mkdir(exist_ok=True)
            with self._log.open("ab") as errors:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", FOLLOW, str(self._run_dir), self.kind],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                    start_new_session=True,  # Ctrl-C in the terminal must not reach it.
                )
        except OSError as error:
            self._notes.append(f"not started: {error.filename or self._folder}: {error.strerror}")
            return
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def write(self, what: str, record: Record) -> None:
        """Write a message. Count it as dropped if it cannot be written, or if too many wait already."""
        try:
            is_written = write_message(self._folder / OUTBOX, what, record)
        except OSError:
            is_written = False
        if not is_written:
            self._num_dropped += 1
            if self._num_dropped == 1:
                self._notes.append(f"the {what} of step {record.step} were dropped: the tracker does not take them")

    def pop_notes(self) -> list[str]:
        """Return the new lines of the process, and forget them."""
        if self._process is not None and self._process.stdout is not None:
            with contextlib.suppress(BlockingIOError):
                while chunk := os.read(self._process.stdout.fileno(), 1 << 16):
                    self._partial += chunk
        *lines, self._partial = self._partial.split(b"\n")
        notes, self._notes = [*self._notes, *(line.decode(errors="replace") for line in lines)], []
        return notes

    def end(self, finished: bool) -> None:
        """Tell the process that no more will follow."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # It may have died.
                # Do not rely on the end of the pipe: a process that was forked in between may hold it open.
                self._process.stdin.write(FINISHED if finished else STOPPED)
                self._process.stdin.close()

    def has_ended(self, deadline: float) -> bool:
        """Wait until the process has ended, at most until ``deadline``. Return whether it has."""
        while self._process is not None and self._process.poll() is None:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def wait(self, deadline: float) -> None:
        """Wait until the process has sent the rest, at most until ``deadline``, then kill it.

        Note what was not sent.
        """
        process = self._process
        if process is None:
            return
        self.has_ended(deadline)
        if process.returncode != 0:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            sent = State.read(self._folder / STATE_FILE).step
            self._notes.append(
                f"not everything was sent; the tracker has the steps up to {sent}. The reasons are in {self._log}. "
                f"To send the rest: python -m {FOLLOW} {shlex.quote(str(self._run_dir))} {self.kind} < /dev/null"
            )
        if self._num_dropped > 1:
            self._notes.append(f"{self._num_dropped} messages with images or tables were dropped")
