"""The files that get the metrics of each step: ``metrics.jsonl`` and TensorBoard's event files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.io.atomic import append_whole
from data_pipeline.io.retry import explain_io, retry_io
from mmscale.errors import MMScaleError
from mmscale.metrics.metrics_file import cut_back, last_record
from mmscale.metrics.sample_images import CaptionedImage, with_caption


class JsonlSink:
    """Writes ``metrics.jsonl``: one line for each step, at once.

    The constructor removes the lines after ``start_step`` and damaged lines.

    Args:
        path: The file; its folder must exist.
        start_step: Finished steps; 0 for a new run.

    Raises:
        MMScaleError: the file cannot be read or written. So do the methods.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self._path = path
        self._held: dict[str, Any] | None = None
        cut_back(path, start_step)
        self._append(b"")

    def write(self, record: dict[str, Any], *, hold: bool = False) -> None:
        """Append one line. NaN and infinity become null.

        Args:
            record: The line.
            hold: Append it only with the next call, so that ``amend`` can still add values.
        """
        self._release()
        if hold:
            self._held = record
            return
        try:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        except ValueError:  # JSON has no NaN or infinity.
            line = json.dumps(_without_nan(record), ensure_ascii=False, allow_nan=False)
        self._append(f"{line}\n".encode())

    def _append(self, line: bytes) -> None:
        try:
            append_whole(self._path, line)
        except OSError as error:
            raise MMScaleError(f"{self._path}: cannot be written: {explain_io(error)}") from error

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Add values to the line of ``step``, which is held, or is the last line of the file.

        Only a line of the file is replaced, of the step from which a run resumes; all others are only appended.
        """
        record, self._held = self._held, None
        last = last_record(self._path) if record is None else None
        if last is not None and last[1]["step"] == step:
            start, record = last
            retry_io(lambda: os.truncate(self._path, start))
        if record is not None:
            self.write({**record, **values})

    def _release(self) -> None:
        """Append the held line."""
        record, self._held = self._held, None
        if record is not None:
            self.write(record)

    def close(self) -> None:
        """Append a held line. A second call does nothing."""
        self._release()


def _without_nan(value: Any) -> Any:
    """Return the value with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return value


class TensorBoardSink:
    """Writes scalars, captioned images and tables as TensorBoard event files, each event at once.

    torch's ``SummaryWriter`` is not used: it writes in a thread, which prints a traceback if the disk is full.

    Args:
        folder: ``RUN/tensorboard``; created if absent.
        start_step: Finished steps. TensorBoard then hides earlier events of later steps.

    Raises:
        MMScaleError: the file cannot be written. So do the methods.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # Slow to import.

        self._event: Any = Event
        self._name = folder / f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._path = self._name
        try:
            retry_io(self._open)
        except OSError as error:
            raise self._error(error) from error
        if start_step:
            self._write(step=start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def _open(self) -> None:
        """Begin a new file, after the start or after a file was lost. TensorBoard reads all files of the folder."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = self._name.parent
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.iterdir()))  # A second log within a second, after a roll back.
        self._path = self._name.with_name(f"{self._name.name}.{number}")
        self._records = RecordWriter(self._path.open("xb"))
        self._put(file_version="brain.Event:2")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each named curve."""
        from torch.utils.tensorboard.summary import scalar

        self._add(step, [scalar(name, value) for name, value in values.items()])

    def images(self, step: int, images: Sequence[CaptionedImage], name: str = "samples") -> None:
        """Add the images with their captions drawn below, and a table with the full captions, as ``name/...``."""
        from torch.utils.tensorboard.summary import image

        pictures = [with_caption(one) for one in images]
        self._add(step, [image(f"{name}/{number}", each, dataformats="HWC") for number, each in enumerate(pictures)])
        self.table(step, f"{name}/captions", ["image", "caption"], [[n, one.caption] for n, one in enumerate(images)])

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a table as Markdown text."""
        from torch.utils.tensorboard.summary import text

        lines = [[_cell(str(value)) for value in line] for line in (columns, *rows)]
        lines.insert(1, ["---"] * len(columns))
        self._add(step, [text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines))])

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        with contextlib.suppress(OSError):  # Every event was flushed, or its error was raised.
            self._records.close()

    def _add(self, step: int, summaries: Sequence[Any]) -> None:
        """Write the values of several summaries as one event."""
        if not summaries:
            return
        whole, *others = summaries
        for summary in others:
            whole.MergeFrom(summary)
        self._write(step=step, summary=whole)

    def _write(self, **content: Any) -> None:
        try:
            retry_io(lambda: self._put(**content), self._open)
        except OSError as error:
            raise self._error(error) from error

    def _put(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()

    def _error(self, error: OSError) -> MMScaleError:
        return MMScaleError(
            f"{self._path}: cannot be written: {explain_io(error)}; metrics.tensorboard=false leaves it out"
        )


def _cell(text: str) -> str:
    """Return text escaped for a cell of a Markdown table."""
    escaped = "".join(f"\\{mark}" if mark in "\\`*_{}[]()#+-.!|<>~" else mark for mark in text)
    return " ".join(escaped.split())
