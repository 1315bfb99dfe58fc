"""Read ``metrics.jsonl``, and cut it back to a step. ``run_log`` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.io.atomic import write_whole
from data_pipeline.io.untrusted import UntrustedError, parse_json, read_lines
from mmscale.errors import MMScaleError

_MOST_LINE_BYTES = 1 << 20


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a ``metrics.jsonl``; a torn last line (the writer was killed) is left out.

    Returns:
        One mapping a step, in file order; empty if there is no such file. ``step``, and ``time``, ``seconds`` and
        ``data_wait_seconds`` where they are there, are numbers; other values are checked by who reads them.

    Raises:
        MMScaleError: the file cannot be read, or a line is far longer than any step's.
    """
    return [record for _, record in _records(path)]


def _records(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines and what they hold; lines that are torn or damaged are left out."""
    records: list[tuple[bytes, dict[str, Any]]] = []
    if not path.is_file():
        return records
    try:
        for line in read_lines(path, most_bytes=_MOST_LINE_BYTES):
            try:
                record = parse_json(line) if line.endswith(b"\n") else None
            except UntrustedError:  # A page that never reached the disk reads as zeros after a power cut.
                continue
            if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] < 2**53:
                continue
            timed = ("time", "seconds", "data_wait_seconds")  # A line with a time has all three.
            held = [record.get(key) for key in timed if key in record or "time" in record]
            if all(isinstance(value, int | float) and 0 <= value < 2**53 for value in held):
                records.append((line, record))
    except UntrustedError as error:
        raise MMScaleError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise MMScaleError(f"{path}: cannot be read: {error.strerror}") from error
    return records


def cut_back(path: Path, last_step: int) -> int:
    """Rewrites a ``metrics.jsonl`` to the steps up to ``last_step``, byte for byte.

    The new file is written beside the old one and then takes its name, so a kill at any time leaves one of the two.

    Returns:
        Lines kept.
    """
    if not path.is_file():
        return 0
    kept = [line for line, record in _records(path) if record["step"] <= last_step]
    write_whole(path, b"".join(kept))
    return len(kept)
