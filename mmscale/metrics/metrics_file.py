"""Read ``metrics.jsonl``, and remove the lines after a step. ``run_log`` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.io.atomic import write_whole
from data_pipeline.io.untrusted import UntrustedError, parse_json, read_lines
from mmscale.errors import MMScaleError

_MOST_LINE_BYTES = 1 << 20


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the valid lines of a ``metrics.jsonl``. Incomplete and damaged lines are left out.

    Returns:
        One mapping for each step, in file order; empty if the file does not exist. ``step`` is an integer >= 0.
        ``time``, ``seconds`` and ``data_wait_seconds``, if present, are numbers >= 0. Other values are not checked.

    Raises:
        MMScaleError: the file cannot be read, or a line is longer than 1 MiB.
    """
    return [record for _, record in _records(path)]


def _records(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return the valid lines, as bytes and parsed."""
    records: list[tuple[bytes, dict[str, Any]]] = []
    if not path.is_file():
        return records
    try:
        for line in read_lines(path, most_bytes=_MOST_LINE_BYTES):
            try:
                record = parse_json(line) if line.endswith(b"\n") else None
            except UntrustedError:  # After a power cut, a page that was not written reads as zeros.
                continue
            if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] < 2**53:
                continue
            timed = ("time", "seconds", "data_wait_seconds")  # A line with a time must have all three.
            held = [record.get(key) for key in timed if key in record or "time" in record]
            if all(isinstance(value, int | float) and 0 <= value < 2**53 for value in held):
                records.append((line, record))
    except UntrustedError as error:
        raise MMScaleError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise MMScaleError(f"{path}: cannot be read: {error.strerror}") from error
    return records


def last_record(path: Path) -> tuple[int, dict[str, Any]] | None:
    """Return the last line of a file without damaged lines, and its first byte; None if there is no line.

    Raises:
        MMScaleError: as for ``read_metrics``.
    """
    records = _records(path)
    return (sum(len(line) for line, _ in records[:-1]), records[-1][1]) if records else None


def cut_back(path: Path, last_step: int) -> int:
    """Remove the lines after ``last_step`` and damaged lines from a ``metrics.jsonl``, atomically.

    Other lines keep their bytes.

    Returns:
        Number of lines kept.

    Raises:
        MMScaleError: as for ``read_metrics``.
        OSError: the file cannot be written.
    """
    if not path.is_file():
        return 0
    kept = [line for line, record in _records(path) if record["step"] <= last_step]
    write_whole(path, b"".join(kept))
    return len(kept)
