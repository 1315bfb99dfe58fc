"""The kinds of media members: which extensions are images, videos and sounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from data_pipeline.shards.audio_file import is_audio
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.video_file import is_video

MEDIA_KINDS: Mapping[str, Callable[[str], bool]] = {"image": is_image, "video": is_video, "audio": is_audio}
"""Tests of an extension, by the name of the kind in pages and dialogues."""

MEDIA_FORMATS = (
    "an image (.jpg .jpeg .png .webp) nor a video (.mp4 .webm .mkv .gif) nor a sound (.wav .flac .mp3 .ogg .opus .m4a)"
)
"""The formats in words, after ``neither``."""


@lru_cache(maxsize=1024)  # Called for every member of every sample.
def media_kind(ext: str) -> str | None:
    """Return the kind of a member's extension, a key of ``MEDIA_KINDS``; None if it is no image, video or sound."""
    return next((kind for kind, is_kind in MEDIA_KINDS.items() if is_kind(ext)), None)
