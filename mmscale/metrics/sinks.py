"""Where step figures go: ``metrics.jsonl``, TensorBoard, and the progress line.

For: writing. Not for: measuring (``progress``) or deciding what is written (``run_log``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.io.atomic import write_whole
from data_pipeline.io.untrusted import UntrustedError, append_regular, parse_json, read_lines
from mmscale.errors import MMScaleError

if TYPE_CHECKING:
    from mmscale.metrics.sample_images import CaptionedImage

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


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines and what they hold; lines that are torn or damaged are left out."""
    if not path.is_file():
        return
    try:
        for line in read_lines(path, most_bytes=_MOST_LINE_BYTES):
            record = _parse(line)
            if record is not None:
                yield line, record
    except UntrustedError as error:
        raise MMScaleError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise MMScaleError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = parse_json(line)
    except UntrustedError:  # A page that never reached the disk reads as zeros after a power cut.
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] < 2**53:
        return None
    timed = ("time", "seconds", "data_wait_seconds")  # A line with a time has all three.
    held = [record.get(key) for key in timed if key in record or "time" in record]
    return record if all(isinstance(value, int | float) and 0 <= value < 2**53 for value in held) else None


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


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null, and the line stays readable by every parser."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


class JsonlSink:
    """One line a step, flushed at once. On construction the file is cut back to ``start_step``.

    Args:
        path: The file; its folder must exist.
        start_step: Steps that are done and stay; 0 for a new run.

    Raises:
        MMScaleError: the file cannot be read or written.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        cut_back(path, start_step)
        try:
            self._file = append_regular(path)
        except OSError as error:
            raise MMScaleError(f"{path}: cannot be written: {error.strerror}") from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line."""
        line = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False)
        self._file.write(f"{line}\n".encode())
        self._file.flush()

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._file.close()


class TensorBoardSink:
    """Scalars and captioned images as TensorBoard event files.

    Args:
        folder: ``RUN/tensorboard``.
        start_step: Events of later steps, left by a killed process, are hidden by TensorBoard from now on.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # Slow to import: only when asked for.

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point to each named curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, images: Sequence[CaptionedImage]) -> None:
        """Adds the images, each with its caption drawn under it, and a table of the captions in full."""
        from mmscale.metrics.sample_images import with_caption

        for number, image in enumerate(images):
            self._writer.add_image(f"samples/{number}", with_caption(image), step, dataformats="HWC")
        rows = [f"| {number} | {_cell(image.caption)} |" for number, image in enumerate(images)]
        self._writer.add_text("samples/captions", "\n".join(["| image | caption |", "|---|---|", *rows]), step)

    def close(self) -> None:
        """Writes what is queued and closes the file."""
        self._writer.close()


def _cell(text: str) -> str:
    """Text as the content of a Markdown table cell."""
    escaped = "".join(f"\\{mark}" if mark in "\\`*_{}[]()#+-.!|<>~" else mark for mark in text)
    return " ".join(escaped.split())
