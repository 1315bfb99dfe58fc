"""Load the images, videos and sounds that a record names: files, folders of frames, or bytes in the record.

    reference --store_medium--> members ``0.jpg``, ``1.mp4``, ``2.0000.jpg`` ..., and the part that names them

The extension of a member follows its content, not its name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import SampleError
from data_pipeline.io.untrusted import read_bytes
from data_pipeline.prepare.rows import Members
from data_pipeline.shards.audio_file import audio_size
from data_pipeline.shards.frame_list import rate_of
from data_pipeline.shards.image_header import ImageFormat, image_size, is_image
from data_pipeline.shards.interleaved import from_base64, text_of
from data_pipeline.shards.media_kind import extension_of, media_kind
from data_pipeline.shards.video_file import video_size

EXTENSION_OF_FORMAT = {ImageFormat.JPEG: "jpg", ImageFormat.PNG: "png", ImageFormat.WEBP: "webp"}
_EXPECTED = {"image": "jpg", "video": "mp4", "audio": "wav"}
"""An extension for each kind of field."""
_MOST_FILE_BYTES = 1 << 31
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


def store_medium(
    field: str, reference: Any, prefix: str, members: Members, load: Callable[[Any], bytes], rate: Any = None
) -> dict[str, Any]:
    """Load an image, a video or a sound, and add its members.

    Args:
        field: Kind of the field that refers to it: ``image`` for a file of any kind, ``video`` or ``audio``.
        reference: A path, bytes, or a dict of both. With ``video``, a list of them or the path of a folder of images is
            a video in frames; the images of a folder are sorted by name, with numbers by value.
        prefix: Beginning of the members' extensions: empty, or ``0.``.
        members: The members of the sample; unchanged if this raises.
        load: Returns the bytes of a reference.
        rate: Frames for each second of a video in frames.

    Returns:
        The part that names the members: ``{"image": "0.png"}``, ``{"video": "0.mp4"}``, ``{"audio": "0.wav"}`` or
        ``{"video": ["0.0000.jpg", ...], "fps": 8}``.

    Raises:
        SampleError: the medium cannot be loaded or is damaged, is no video or sound although the field says so, or a
            video in frames has no valid rate.
    """
    frames = _frames_of(reference, load) if field == "video" else None
    if frames is not None:
        stored, rate = Members(), rate_of(rate, len(frames))
        for number, frame in enumerate(frames):
            ext, content = load_image(frame, load)
            stored[f"{prefix}{number:04d}.{ext}"] = content
        members |= stored
        return {"video": list(stored), "fps": rate}
    content = load(reference)
    found = extension_of(content) or _EXPECTED[field]  # Of an unknown format, the message lists the known ones.
    is_named = isinstance(reference, str) and reference.lower().endswith(".m4a")
    if found == "mp4" and (field == "audio" or is_named):  # Many M4A files have the brand of MP4.
        found = "m4a"
    kind = media_kind(found) or "image"
    try:
        if kind == "image":
            image_size(content)
        else:
            _ = video_size(content) if kind == "video" else audio_size(content)
    except SampleError as error:
        raise SampleError(f"{_location(reference)}{error.reason}") from error
    if field not in ("image", kind):
        raise SampleError(f"{_location(reference)}a file of kind {kind}, named by the field {field}")
    members[f"{prefix}{found}"] = content
    return {kind: f"{prefix}{found}"}


def _frames_of(reference: Any, load: Callable[[Any], bytes]) -> list[Any] | None:
    """Return the references to the frames of a video in frames; None for any other reference."""
    if isinstance(reference, list | tuple):
        return list(reference)
    if not isinstance(reference, str) or not isinstance(load, FileLoader) or _DATA_URL.match(reference):
        return None
    folder = load.path_of(reference)
    if not folder.is_dir():
        return None
    names = frame_names(sorted(os.listdir(folder)))
    if not names:
        raise SampleError(f"{reference}: a folder without images")
    return [f"{reference}/{name}" for name in names]


def frame_names(names: Sequence[str]) -> list[str]:
    """Return the names of images in the order of frames: by their numbers and the text between them."""

    def order(name: str) -> list[tuple[int, int, str]]:
        pieces = re.split(r"(\d+)", name)
        return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces if piece]

    return sorted((name for name in names if is_image(name.lower()) and not name.startswith(".")), key=order)


def _location(reference: Any) -> str:
    return f"{reference}: " if isinstance(reference, str) else ""


def load_image(reference: Any, load: Callable[[Any], bytes]) -> tuple[str, bytes]:
    """Return (extension, bytes) of an image; the extension follows the content.

    Raises:
        SampleError: the image cannot be loaded, or its header is damaged or of another format.
    """
    content = load(reference)
    try:
        return EXTENSION_OF_FORMAT[image_size(content).format], content
    except SampleError as error:
        raise SampleError(f"{_location(reference)}{error.reason}") from error


@dataclass(frozen=True)
class FileLoader:
    """Load the media that a record names: files in one folder, or bytes in the record. Nothing is downloaded.

    Attributes:
        folder: Folder of relative paths. A path that leads outside is a ``SampleError``.
        holds_urls: Read a URL from the file ``folder``/URL-without-scheme, the layout that ``wget -x`` writes.
    """

    folder: Path
    holds_urls: bool = False

    def __call__(self, reference: Any) -> bytes:
        if isinstance(reference, bytes):
            return reference
        if isinstance(reference, Mapping) and set(reference) <= {"bytes", "path"}:
            content = reference.get("bytes")
            if isinstance(content, str):  # JSON cannot hold bytes, so they are in base64.
                return from_base64(content)
            return content if isinstance(content, bytes) else self(reference.get("path"))
        path = text_of(reference, "the path of an image, video or sound")
        if _DATA_URL.match(path):
            return from_base64(path.partition(",")[2])
        return read_file(self.path_of(path))

    def path_of(self, path: str) -> Path:
        """Return the file that a path or a URL names.

        Raises:
            SampleError: it is outside of the folder, or a URL although the folder holds none.
        """
        if _URL.match(path):
            if not self.holds_urls:
                raise SampleError(
                    f"{path}: a URL; ingest downloads nothing: fetch with img2dataset and ingest its tars, or give the "
                    "folder of files that wget -x made with --images"
                )
            path = path.partition("://")[2]
        root = os.path.abspath(self.folder)
        if os.path.commonpath([root, os.path.abspath(self.folder / path)]) != root:
            raise SampleError(f"{path}: outside of {self.folder}; give the folder of the images with --images")
        return self.folder / path


def read_file(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        SampleError: the file is missing, cannot be read, or is larger than 2 GiB.
    """
    try:
        return read_bytes(path, most_bytes=_MOST_FILE_BYTES)
    except FileNotFoundError as error:
        raise SampleError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name.
        raise SampleError(f"{path}: cannot be read: {error}") from error
