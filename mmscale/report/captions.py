"""Write and read ``captions.json`` and its images: held-out images with expected and generated captions."""

from __future__ import annotations

import base64
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
from data_pipeline.io.untrusted import read_bytes, read_json
from mmscale.errors import MMScaleError
from mmscale.metrics.sample_images import Pixels, encode_png

CAPTIONS_FILE = "captions.json"
IMAGES_FOLDER = "report/images"
_MOST_IMAGE_BYTES = 16 << 20
_MEDIA_TYPES = {
    ".png": "image/png",
    ".webp": "image/webp",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/mp4",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".mp3": "audio/mpeg",
    ".ogg": "audio/ogg",
    ".oga": "audio/ogg",
    ".opus": "audio/ogg",
    ".m4a": "audio/mp4",
}
"""Media types that browsers know, by extension."""


@dataclass(frozen=True)
class CaptionRecord:
    """One held-out image.

    Attributes:
        set: Name of the held-out set.
        image: Path of a PNG, relative to the run folder.
        expected: The text that a right caption contains.
        generated: The model's caption.
        right: Whether ``generated`` names ``expected``.
    """

    set: str
    image: str
    expected: str
    generated: str
    right: bool


class _CaptionsFile(TypedDict):
    captions: list[CaptionRecord]


_FILE = TypeAdapter(_CaptionsFile)


def names(generated: str, expected: str) -> bool:
    """Whether a caption contains the expected text as whole words.

    Ignores case, punctuation, and differences that Unicode NFKC removes, such as full-width letters.
    """
    return f" {_words(expected)} " in f" {_words(generated)} "


def _words(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded))


def save_captions(run_dir: Path, items: Sequence[tuple[str, Pixels, str, str]]) -> Path:
    """Write ``captions.json`` and one PNG per item, each atomically. Call it on rank 0 only.

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
    """Return the records of ``captions.json``; an empty list if there is no such file.

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


def data_url(run_dir: Path, file: str) -> str:
    """Return an image, video or sound of the run folder as a data URL.

    Returns an empty text if the file is absent, outside of the folder, too large or of an unknown kind.

    Args:
        run_dir: The run folder.
        file: Path relative to it, from a file of the run; not trusted.
    """
    try:
        path = (run_dir / file).resolve()
        kind = _MEDIA_TYPES.get(path.suffix.lower())
        if kind is None or not path.is_relative_to(run_dir.resolve()):
            return ""
        content = read_bytes(path, most_bytes=_MOST_IMAGE_BYTES)
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"
    except (OSError, ValueError):  # Absent or too large, or the name holds a null byte.
        return ""
