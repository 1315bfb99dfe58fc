"""Draw clips: an emoji that moves, turns, grows or vanishes, as frames of an encoded video.

The two clips of a pair of opposite motions are made of the same frames in opposite order. So neither a frame nor the
set of frames shows which of the two motions a clip has; only the order of its frames does.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

SIDE = 64
"""Width and height of a frame, pixels."""
NUM_FRAMES = 8
FRAMES_PER_SECOND = 8
EMOJI_SIDE = 44
"""Width and height of an emoji before it grows or shrinks, pixels."""
MOST_SHIFT = 5
"""Largest distance of a path's middle from the middle of the frame, pixels, in each direction."""

OPPOSITES = (
    ("moves left", "moves right"),
    ("moves up", "moves down"),
    ("turns left", "turns right"),
    ("shrinks", "grows"),
    ("vanishes", "appears"),
)
"""Pairs of motions. The second motion of a pair is the first one backwards."""

ENCODER, OPTIONS = "libvpx-vp9", {"crf": "32", "b": "0"}
"""VP9 in WebM. libvpx gives the same bytes in every build with the same version of PyAV; libx264 did not."""


def frames(picture: Image.Image, motion: str, shift: tuple[float, float]) -> list[Image.Image]:
    """Return the frames of a clip.

    Args:
        picture: The emoji on white.
        motion: One of ``OPPOSITES``.
        shift: Position of the middle of the path, each coordinate in [0, 1).
    """
    first = next(pair[0] for pair in OPPOSITES if motion in pair)
    x, y = ((2 * each - 1) * MOST_SHIFT for each in shift)
    drawn = [_frame(picture, first, 2 * i / (NUM_FRAMES - 1) - 1, x, y) for i in range(NUM_FRAMES)]
    return drawn if motion == first else drawn[::-1]


def _frame(picture: Image.Image, motion: str, time: float, x: float, y: float) -> Image.Image:
    """Return the frame at a time from -1 to 1. ``x, y``: shift to the right and downwards, pixels."""
    scale, degrees, opacity = 1.0, 0.0, 1.0
    if motion == "moves left":
        x -= 16 * time
    elif motion == "moves up":
        y -= 16 * time
    elif motion == "turns left":
        degrees = 60 * time  # Counterclockwise.
    elif motion == "shrinks":
        scale = 2 ** (-0.6 * time)
    else:
        opacity = 0.5 - 0.48 * time
    art = picture.convert("RGB").resize((round(EMOJI_SIDE * scale),) * 2, Image.Resampling.LANCZOS)
    art = art.rotate(degrees, Image.Resampling.BICUBIC, fillcolor="white")
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(art, (round(SIDE / 2 + x - art.width / 2), round(SIDE / 2 + y - art.height / 2)))
    return Image.blend(Image.new("RGB", canvas.size, "white"), canvas, opacity)


def encode_clip(pictures: Sequence[Image.Image]) -> bytes:
    """Return a WebM file of pictures of one size."""
    target = io.BytesIO()
    # Without ``bitexact`` the writer stores random identifiers and its version.
    with av.open(target, "w", format="webm", options={"fflags": "+bitexact"}) as file:
        stream: Any = file.add_stream(ENCODER, rate=FRAMES_PER_SECOND, options=OPTIONS)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        stream.codec_context.thread_count = 1
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FRAMES_PER_SECOND)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return target.getvalue()
