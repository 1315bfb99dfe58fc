"""The process that sends a run to one tracker: ``python -m mmscale.metrics.trackers.follow RUN KIND``.

    RUN/metrics.jsonl             the scalars of each step          --+
    RUN/trackers/KIND/outbox/     images, tables, further scalars   --+--> tracker
    RUN/trackers/KIND/start.json  configuration, commit, tags       --+
    RUN/trackers/KIND/state.json  the tracker's run id, the last step sent

The training process starts it, writes files and never waits for it. A tracker that is down, hangs or rejects the key
therefore delays no step, and no step is lost: they wait in ``metrics.jsonl`` until the tracker answers. Standard input
tells it that the training process has ended. It then sends the rest, for at most ``LAST_SECONDS``, and exits.

A step is sent when the next one is in the file, since its images and tables are written between the two. A step that
was sent is never sent again: not after a resume from an earlier checkpoint, and not after a roll back.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Protocol

from data_pipeline.io.atomic import as_utf8, write_whole
from data_pipeline.io.untrusted import UntrustedError, open_regular, parse_json, read_json
from mmscale.metrics.trackers.messages import Record, read_messages

POLL_SECONDS = 0.5
RETRY_SECONDS = 30.0
LAST_SECONDS = 60.0
FOLDER = "trackers"
START_FILE, STATE_FILE, OUTBOX = "start.json", "state.json", "outbox"
FINISHED, STOPPED = b"finished", b"stopped."
"""The training process writes one of the two to standard input when it ends. If it is killed, standard input ends."""
_MOST_RECORDS = 100
"""Steps in one call of a tracker."""
_MOST_LINE_BYTES = 1 << 20


class Tracker(Protocol):
    """One run in a tracker."""

    run_id: str
    """Id that continues this run in a later process."""
    last_step: int | None
    """The last step that the tracker has; None if it cannot tell."""
    place: str
    """Address or folder where the user finds the run."""

    def send(self, records: list[Record]) -> None:
        """Send records with ascending steps, all later than those that the tracker has."""

    def close(self, finished: bool) -> None:
        """Send what is buffered and end this process's part of the run."""


@dataclass
class State:
    """Values that a tracker has received, kept in ``state.json``.

    Attributes:
        run_id: The tracker's run; empty before there is one.
        step: The last step that was sent.
        messages: The step of the last message of each name that was sent.
    """

    run_id: str = ""
    step: int = 0
    messages: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> State:
        """Return the state in a file; a new one if the file is absent or damaged."""
        try:
            content = read_json(path)
            messages = {str(name): int(step) for name, step in content["messages"].items()}
            return cls(str(content["run_id"])[:128], int(content["step"]), messages)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()

    def write(self, path: Path) -> None:
        """Write the state atomically."""
        write_whole(path, as_utf8(json.dumps(vars(self))))


def scalars_of(line: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of ``metrics.jsonl`` by name, with the rates that TensorBoard gets too."""
    values = {name: float(value) for name, value in line.items() if isinstance(value, int | float) and name != "step"}
    seconds = max(values["seconds"], 1e-9)
    return values | {f"{name}_per_second": values[name] / seconds for name in ("tokens", "samples") if name in values}


class StepLines:
    """Reads the step lines of a growing ``metrics.jsonl``, from the beginning, each once.

    If another file gets the name, because a roll back removed lines, reading starts again at its beginning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def rewind(self) -> None:
        """Let the next call of ``read`` begin with the first line."""
        if self._file is not None:
            self._file.seek(0)

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the complete lines that were added since the last call. Damaged lines are left out."""
        try:
            if self._file is not None and not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path)):
                self._file.close()
                self._file = None
            self._file = self._file or open_regular(self._path)
        except OSError:  # Not there yet.
            return
        while line := self._file.readline(_MOST_LINE_BYTES):
            if not line.endswith(b"\n"):
                self._file.seek(-len(line), os.SEEK_CUR)
                return
            with contextlib.suppress(UntrustedError):
                parsed = parse_json(line)
                if isinstance(parsed, dict) and type(parsed.get("step")) is int and _is_step(parsed):
                    yield parsed


def _is_step(line: dict[str, Any]) -> bool:
    return "loss" in line and isinstance(line.get("seconds"), int | float)


class Follower:
    """Sends the steps and messages of a run to a tracker until the training process ends.

    Args:
        run_dir: The run folder.
        folder: ``RUN/trackers/KIND``.
        log_every: Send the scalars of every this many steps.
        connect: Opens the tracker's run with this id, or a new one if the id is empty. It may raise any exception.
        note: Prints one line for the user.
    """

    def __init__(
        self,
        run_dir: Path,
        folder: Path,
        log_every: int,
        connect: Callable[[str], Tracker],
        note: Callable[[str], object],
    ) -> None:
        self._folder, self._connect, self._note, self._log_every = folder, connect, note, log_every
        self._lines = StepLines(run_dir / "metrics.jsonl")
        self._state = State.read(folder / STATE_FILE)
        self._held: dict[str, Any] | None = None
        """The newest line, which is sent after the next one appears."""
        self._waiting: list[Record] = []
        self._newest = 0
        """Step of the newest line that is not held."""
        self._tracker: Tracker | None = None
        self._complaint = ""
        self._is_named = False

    def run(self, wait_for_end: Callable[[float], bool], is_finished: Callable[[], bool]) -> bool:
        """Send until the training process ends, then the rest. Return whether everything was sent.

        Args:
            wait_for_end: Waits at most this many seconds. Returns whether the training process has ended.
            is_finished: Whether the run is finished. Called after the training process has ended.
        """
        has_ended = False
        while True:
            pause = POLL_SECONDS
            try:
                self._send(last=has_ended)
                if has_ended and self._tracker is not None:
                    self._tracker.close(is_finished())
            except Exception as error:  # Any exception of a tracker's package: training must not notice.
                self._complain(error)
                pause, self._tracker = RETRY_SECONDS, None
            if has_ended:
                return self._tracker is not None
            has_ended = wait_for_end(pause)

    def _send(self, *, last: bool) -> None:
        """Send the steps that are complete. With ``last`` also send the newest step and all messages."""
        tracker = self._tracker or self._open()
        for line in self._lines.read():
            before, self._held = self._held, line
            # A held line with a later step belongs to steps that a roll back has abandoned.
            if before is not None and before["step"] < line["step"]:
                self._queue(before)
            if len(self._waiting) >= _MOST_RECORDS:
                self._flush(tracker, self._newest)
        if last and self._held is not None:
            self._queue(self._held)
            self._held = None
        self._flush(tracker, 2**62 if last else self._newest)

    def _queue(self, line: dict[str, Any]) -> None:
        step = self._newest = line["step"]
        if step > self._state.step and step % self._log_every == 0:
            self._waiting.append(Record(step, scalars_of(line)))

    def _flush(self, tracker: Tracker, last_step: int) -> None:
        """Send the waiting records with the messages of the steps up to ``last_step``, and record that."""
        records = {record.step: replace(record) for record in self._waiting}
        messages = read_messages(self._folder / OUTBOX, last_step)
        for message in messages:
            if self._state.messages.get(message.what, -1) < message.record.step:
                records.setdefault(message.record.step, Record(message.record.step)).add(message.record)
        if not records and not messages:
            return
        if records:
            tracker.send([records[step] for step in sorted(records)])
        self._state.step = max([self._state.step, *(record.step for record in self._waiting)])
        for message in messages:
            sent = self._state.messages.get(message.what, -1)
            self._state.messages[message.what] = max(sent, message.record.step)
        self._waiting, self._complaint = [], ""
        self._state.write(self._folder / STATE_FILE)
        for message in messages:
            message.path.unlink(missing_ok=True)

    def _open(self) -> Tracker:
        tracker = self._connect(self._state.run_id)
        self._state.run_id = tracker.run_id
        if tracker.last_step is not None:
            self._state.step = tracker.last_step
        self._state.write(self._folder / STATE_FILE)
        # Read from the beginning: the tracker may have lost steps that were read before the connection failed.
        self._lines.rewind()
        self._held, self._waiting = None, []
        self._tracker = tracker
        if not self._is_named:
            self._note(f"run {tracker.run_id}, {tracker.place}")
            self._is_named = True
        return tracker

    def _complain(self, error: Exception) -> None:
        """Print an error, unless it is the same as the last one."""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if lines[0] != self._complaint:
            self._complaint = lines[0]
            self._note(f"{lines[0][:300]} (training continues; steps that were not sent wait in the run folder)")
        traceback.print_exc()


def main() -> None:
    """Follow the run of the command line until the training process ends."""
    run_dir, kind = Path(sys.argv[1]), sys.argv[2]
    folder = run_dir / FOLDER / kind
    notes = os.dup(1)
    os.dup2(2, 1)  # Packages print: keep that out of the notes.
    os.set_blocking(notes, False)
    for number in (signal.SIGINT, signal.SIGTERM):  # The training process decides when this one ends.
        signal.signal(number, signal.SIG_IGN)
    ended = threading.Event()
    words: list[bytes] = []
    threading.Thread(target=_watch_parent, args=(ended, words), daemon=True).start()

    def note(line: str) -> None:
        with contextlib.suppress(OSError):
            os.write(notes, f"{line}\n".encode(errors="replace")[:2000])

    with (folder / "lock").open("wb") as lock:
        # The process of an earlier start may still be sending; it ends within LAST_SECONDS.
        fcntl.flock(lock, fcntl.LOCK_EX)
        start = read_json(folder / START_FILE)
        connect = functools.partial(_CONNECT[kind], start, folder.resolve())
        follower = Follower(run_dir, folder, int(start["log_every"]), connect, note)
        is_sent = follower.run(ended.wait, lambda: FINISHED in words)
    sys.stderr.flush()
    os._exit(0 if is_sent else 1)  # Without the packages' handlers at exit, which may wait for a server.


def _watch_parent(ended: threading.Event, words: list[bytes]) -> None:
    """Wait until the training process ends, then at most ``LAST_SECONDS`` more, and kill this process."""
    words.append(sys.stdin.buffer.read(len(FINISHED)))
    ended.set()
    time.sleep(LAST_SECONDS)
    os._exit(1)


def _wandb(start: dict[str, Any], folder: Path, run_id: str) -> Tracker:
    from mmscale.metrics.trackers.wandb_run import WandbRun

    return WandbRun(start, folder, run_id)


def _mlflow(start: dict[str, Any], folder: Path, run_id: str) -> Tracker:
    from mmscale.metrics.trackers.mlflow_run import MlflowRun

    return MlflowRun(start, folder, run_id)


def _trackio(start: dict[str, Any], folder: Path, run_id: str) -> Tracker:
    from mmscale.metrics.trackers.trackio_run import TrackioRun

    return TrackioRun(start, folder, run_id)


_CONNECT: dict[str, Callable[[dict[str, Any], Path, str], Tracker]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}

if __name__ == "__main__":
    main()
