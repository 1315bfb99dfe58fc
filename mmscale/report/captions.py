"""``captions.json`` and its images: held-out images with what is true of them and what the model says."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from data_pipeline.io.atomic import as_utf8, write_whole
from data_pipeline.io.strict import first_fault
from data_pipeline.io.untrusted import read_json
from mmscale.errors import MMScaleError
from mmscale.metrics.sample_images import Pixels

CAPTIONS_FILE = "captions.json"
IMAGES_FOLDER = "report/images"


@dataclass(frozen=True)
class CaptionRecord:
    """One held-out image.

    Attributes:
        set: Name of the held-out set.
        image: Path of a PNG, relative to the run folder.
        expected: The field that a right caption names.
        generated: What the model said.
        right: Whether ``generated`` names ``expected``.
    """

    set: str
    image: str
    expected: str
    generated: str
    right: bool


class _File(TypedDict):
    captions: list[CaptionRecord]


_FILE = TypeAdapter(_File)


def names(generated: str, expected: str) -> bool:
    """Whether a caption contains an expression as whole words; case, width and punctuation do not matter."""
    return f" {_words(expected)} " in f" {_words(generated)} "


def _words(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded))


def save_captions(run_dir: Path, items: Sequence[tuple[str, Pixels, str, str]]) -> Path:
    """Writes ``captions.json`` and one PNG an item, each whole or not at all. Rank 0 only.

    Args:
        run_dir: The run folder.
        items: (set, pixels, expected, generated) in the order of display.

    Returns:
        The path of ``captions.json``.
    """
    records = []
    for number, (set_name, pixels, expected, generated) in enumerate(items):
        image = f"{IMAGES_FOLDER}/{number:04d}.png"
        write_whole(run_dir / image, encode_png(pixels), parents=True)
        records.append(CaptionRecord(set_name, image, expected, generated, names(generated, expected)))
    path = run_dir / CAPTIONS_FILE
    payload = {"captions": [asdict(record) for record in records]}
    write_whole(path, as_utf8(json.dumps(payload, indent=2, ensure_ascii=False) + "\n"), parents=True)
    return path


def read_captions(run_dir: Path) -> list[CaptionRecord]:
    """Return the records of ``captions.json``; none if there is no such file.

    Raises:
        MMScaleError: the file cannot be read, or is damaged.
    """
    path = run_dir / CAPTIONS_FILE
    if not path.exists():
        return []
    value = None
    try:
        value = read_json(path)
        return _FILE.validate_python(value)["captions"]
    except ValidationError as error:
        raise MMScaleError(f"{path} is damaged: {first_fault(error, value)}") from error
    except (OSError, ValueError) as error:
        raise MMScaleError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def encode_png(pixels: Pixels) -> bytes:
    """PNG bytes of uint8 ``(height, width, 3)``."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
