"""Write and read ``drawings/`` in the run folder: small images of what the model drew at each evaluation.

drawings/drawings.jsonl             one line a step: {"step": 200, "drawings": [{"text": ..., "image": ...}, ...]}
drawings/step-00000200/0000.webp    each image before the line that names it
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from data_pipeline.io.atomic import append_whole, as_utf8, write_whole
from data_pipeline.io.strict import first_fault
from mmscale.errors import MMScaleError
from mmscale.metrics.metrics_file import read_metrics
from mmscale.metrics.sample_images import Pixels
from mmscale.report.captions import data_url

DRAWINGS_FOLDER = "drawings"
DRAWINGS_FILE = f"{DRAWINGS_FOLDER}/drawings.jsonl"
_MOST_SIDE = 256
"""Longest side of an image in the report, pixels; a larger drawing is scaled down."""
_MOST_LETTERS = 1000
"""Letters of a text in its record; the rest of a longer one is left out."""
_MOST_STEPS = 10
"""Steps in a strip of the report. More are thinned evenly; the first and the last stay."""


@dataclass(frozen=True)
class DrawingRecord:
    """One drawing: its text, and the path of a WebP file relative to the run folder."""

    text: str
    image: str


class DrawingsOfStep(TypedDict):
    """The drawings of one step."""

    step: int
    drawings: list[DrawingRecord]


@dataclass(frozen=True)
class DrawingStrip:
    """The drawings of one text, in order of steps; of each the step and the image as a data URL, or empty."""

    text: str
    frames: list[tuple[int, str]]


_LINES = TypeAdapter(list[DrawingsOfStep])


def save_drawings(run_dir: Path, step: int, drawings: Sequence[tuple[str, Pixels]]) -> None:
    """Write the drawings of a step. Call it on rank 0 only.

    Args:
        run_dir: The run folder.
        step: The step.
        drawings: Texts and images in the order of display.

    Raises:
        MMScaleError: a file cannot be written.
    """
    records = []
    try:
        for number, (text, pixels) in enumerate(drawings):
            image = f"{DRAWINGS_FOLDER}/step-{step:08d}/{number:04d}.webp"
            write_whole(run_dir / image, _encode_webp(pixels), parents=True)
            records.append(asdict(DrawingRecord(text[:_MOST_LETTERS], image)))
        line = json.dumps({"step": step, "drawings": records}, ensure_ascii=False) + "\n"
        append_whole(run_dir / DRAWINGS_FILE, as_utf8(line))
    except OSError as error:
        raise MMScaleError(f"{run_dir / DRAWINGS_FOLDER}: {error.strerror}") from error


def read_drawings(run_dir: Path) -> list[DrawingsOfStep]:
    """Return the drawings of each step in order; empty without a file. If a step occurs twice, its last line counts.

    Raises:
        MMScaleError: the file cannot be read, or a line has another form.
    """
    path = run_dir / DRAWINGS_FILE
    lines = read_metrics(path)
    try:
        steps = {each["step"]: each for each in _LINES.validate_python(lines)}
    except ValidationError as error:
        raise MMScaleError(f"{path} is damaged: {first_fault(error, lines)}") from error
    return [steps[step] for step in sorted(steps)]


def drawing_strips(run_dir: Path, steps: Sequence[DrawingsOfStep]) -> list[DrawingStrip]:
    """Return one strip for each text, with images embedded. A text that occurs n times at a step has n strips."""
    strips: dict[tuple[str, int], list[tuple[int, str]]] = {}
    for each in steps:
        seen = Counter[str]()
        for record in each["drawings"]:
            strips.setdefault((record.text, seen[record.text]), []).append((each["step"], record.image))
            seen[record.text] += 1
    return [
        DrawingStrip(text, [(step, data_url(run_dir, image)) for step, image in _thinned(frames)])
        for (text, _), frames in strips.items()
    ]


def _thinned(frames: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    last, most = len(frames) - 1, min(len(frames), _MOST_STEPS)
    return [frames[round(number * last / max(1, most - 1))] for number in range(most)]


def _encode_webp(pixels: Pixels) -> bytes:
    """Return an image as WebP, at most 256 pixels a side; without loss if it is small."""
    import io

    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((_MOST_SIDE, _MOST_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=max(picture.size) <= 64, quality=90)
    return buffer.getvalue()
