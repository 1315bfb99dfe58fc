"""Copies of the media of questions beside their answers, so that the report can show and play them.

answers/NAME/00003-1.webm, 00003-1.png    part 1 of question 3, and frames of it in a row
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import NotRequired

import numpy as np
from PIL import Image
from typing_extensions import TypedDict

from data_pipeline.errors import SampleError
from data_pipeline.images.stored_frames import open_video
from data_pipeline.io.atomic import write_whole
from data_pipeline.sample import AudioPart, ImagePart, Sample, StoredFrames, TextPart, VideoPart

MOST_SHOWN = 8
"""Number of questions of a set whose media are copied."""
MOST_PARTS = 8
"""Number of parts of a question that are copied."""
_MOST_BYTES = 8 << 20
"""Largest sum of the sizes of a question's copied files. The report holds all of them."""
_FRAMES = 8
_FRAME_HEIGHT, _MOST_FRAME_WIDTH = 96, 384
"""Height and largest width of a frame in the row, pixels. A wider frame is squeezed, so its memory is bounded."""
_KINDS = {ImagePart: "image", VideoPart: "video", AudioPart: "audio"}


class ShownMedia(TypedDict):
    """A copied part of a question.

    Attributes:
        kind: ``image``, ``video`` or ``audio``.
        file: Path relative to the folder of answers; absent if the parts of the question are too large to copy.
        frames: Of a video, a picture of evenly spread frames in a row, likewise.
    """

    kind: str
    file: NotRequired[str]
    frames: NotRequired[str]


def copy_media(folder: Path, name: str, number: int, sample: Sample) -> list[ShownMedia]:
    """Write the media of a sample into the folder of answers, each file atomically.

    Args:
        folder: The folder of answers.
        name: Name of the held-out set.
        number: Number of the question in the set.
        sample: The sample.

    Raises:
        OSError: a file cannot be written.
    """
    return list(_copies(folder, f"{name}/{number:05d}", sample))


def _copies(folder: Path, stem: str, sample: Sample) -> Iterator[ShownMedia]:
    parts, room = [part for part in sample.parts if not isinstance(part, TextPart)], _MOST_BYTES
    for number, part in enumerate(parts[:MOST_PARTS]):
        shown, name = ShownMedia(kind=_KINDS[type(part)]), f"{stem}-{number}"
        if not isinstance(part.data, StoredFrames) and 0 < len(part.data) <= room:
            room -= len(part.data)
            shown["file"] = f"{name}.{part.name.rpartition('.')[2]}"
            write_whole(folder / shown["file"], bytes(part.data), parents=True)
        if isinstance(part, VideoPart) and (frames := _frames(part)) is not None:
            shown["frames"] = f"{name}.png"
            write_whole(folder / shown["frames"], frames, parents=True)
        yield shown


def _frames(part: VideoPart) -> bytes | None:
    """Return a PNG of evenly spread frames in a row; None if one of them is damaged."""
    pictures = list[Image.Image]()
    try:
        with open_video(part.data) as file:
            chosen = np.linspace(0, file.num_frames - 1, min(_FRAMES, file.num_frames)).round().astype(int)
            for _, pixels in file.decode(chosen.tolist()):
                height, width = pixels.shape[:2]
                size = (min(_MOST_FRAME_WIDTH, max(1, round(_FRAME_HEIGHT * width / height))), _FRAME_HEIGHT)
                pictures.append(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    except SampleError:
        return None
    row = Image.new("RGB", (sum(picture.width for picture in pictures), _FRAME_HEIGHT))
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width
    encoded = io.BytesIO()
    row.save(encoded, "PNG")
    return encoded.getvalue()
