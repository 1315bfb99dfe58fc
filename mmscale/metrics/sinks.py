"""Where step figures go: ``metrics.jsonl``, TensorBoard, and the progress line.

For: writing. Not for: measuring (``meters``) or deciding what is written (``run_log``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.shards.files import write_whole

if TYPE_CHECKING:
    from mmscale.metrics.sample_images import CaptionedImage

Scalar = float | int | str | bool | None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a ``metrics.jsonl``; a torn last line (the writer was killed) is left out.

    Returns:
        One mapping a step, in file order; empty if there is no such file.
    """
    lines = []
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        record = _parse(line)
        if record is not None:
            lines.append(record)
    return lines


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:  # A page that never reached the disk reads as zeros after a power cut.
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def cut_back(path: Path, last_step: int) -> int:
    """Rewrites a ``metrics.jsonl`` to the steps up to ``last_step``, byte for byte.

    The new file is written beside the old one and then takes its name, so a kill at any time leaves one of the two.

    Returns:
        Lines kept.
    """
    if not path.is_file():
        return 0
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        record = _parse(line)
        if record is not None and record["step"] <= last_step:
            kept.append(line)
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
    """

    def __init__(self, path: Path, start_step: int) -> None:
        cut_back(path, start_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line."""
        self._file.write(json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n")
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
