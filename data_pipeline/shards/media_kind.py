"""The kinds of media members: which extensions are images, videos and sounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from data_pipeline.shards.audio_file import is_audio
from data_pipeline.shards.image_header import ImageFormat, is_image, known_format
from data_pipeline.shards.video_file import is_video

MEDIA_KINDS: Mapping[str, Callable[[str], bool]] = {"image": is_image, "video": is_video, "audio": is_audio}
"""Tests of an extension, by the name of the kind in pages and dialogues."""

MEDIA_FORMATS = (
    "an image (.jpg .jpeg .png .webp) nor a video (.mp4 .m4v .mov .webm .mkv .gif) nor a sound "
    "(.wav .flac .mp3 .ogg .oga .opus .m4a)"
)
"""The formats in words, after ``neither``."""


def extension_of(content: bytes) -> str | None:
    """Return the usual extension of a file's format, from its first bytes; None if they are of no known format."""
    start, image = content[:64], known_format(content)
    if image is not None:
        return "jpg" if image is ImageFormat.JPEG else image.value
    if start[4:8] == b"ftyp":
        return "m4a" if start[8:11] in (b"M4A", b"M4B") else "mp4"
    if start[:4] == b"\x1a\x45\xdf\xa3":
        return "webm" if b"webm" in start else "mkv"
    if start[:4] == b"RIFF" and start[8:12] == b"WAVE":
        return "wav"
    if start[:3] == b"ID3" or (len(start) > 1 and start[0] == 0xFF and start[1] & 0xE0 == 0xE0 and start[1] & 0x06):
        return "mp3"
    return {b"GIF8": "gif", b"fLaC": "flac", b"OggS": "ogg"}.get(start[:4])


@lru_cache(maxsize=1024)  # Called for every member of every sample.
def media_kind(ext: str) -> str | None:
    """Return the kind of a member's extension, a key of ``MEDIA_KINDS``; None if it is no image, video or sound."""
    return next((kind for kind, is_kind in MEDIA_KINDS.items() if is_kind(ext)), None)
