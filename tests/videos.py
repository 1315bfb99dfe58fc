"""Tiny videos for tests, encoded by PyAV."""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

DEMUXERS = {"mp4": "mp4", "webm": "webm", "mkv": "matroska", "gif": "gif"}
CODECS = {"mp4": "mpeg4", "webm": "libvpx-vp9", "mkv": "libx264", "gif": "gif"}


def encoded(
    num_frames: int = 8,
    *,
    height: int = 32,
    width: int = 32,
    kind: str = "mp4",
    codec: str | None = None,
    per_second: int = 8,
    key_every: int = 4,
    rotation: int = 0,
    starts: Sequence[int] | None = None,
    seed: int = 0,
    sound: npt.NDArray[np.float32] | None = None,
) -> bytes:
    """Return a video of smooth colours that change from frame to frame.

    Args:
        num_frames, height, width, per_second: Its size.
        kind: Extension of the file.
        codec: Name of the encoder; None for the usual one of ``kind``.
        key_every: Largest distance of key frames.
        rotation: Rotation for display, degrees counterclockwise.
        starts: Start of each frame in units of ``1 / per_second``; None for a constant rate.
        seed: Determines the colours.
        sound: Samples of a sound track of 16 kHz, ``(1, samples)``, in FLAC; for a Matroska file.
    """
    out = io.BytesIO()
    with av.open(out, "w", format=DEMUXERS[kind]) as container:
        codec = codec or CODECS[kind]
        stream = container.add_stream(codec, rate=per_second)
        stream.height, stream.width = height, width
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.codec_context.gop_size = key_every
        if codec in ("libx264", "mpeg4"):
            stream.codec_context.max_b_frames = 2
        track = None if sound is None else container.add_stream("flac", rate=16_000, layout="mono")
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(pictured(number, height, width, seed), format="rgb24")
            frame.pts = number if starts is None else starts[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            assert isinstance(track, av.AudioStream)
            heard = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), format="fltp", layout="mono")
            heard.sample_rate, heard.pts = 16_000, 0
            for one in (heard, None):
                container.mux(track.encode(one))
    return out.getvalue()


def pictured(number: int, height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Return the pixels of a frame before encoding: a gradient, and a bright bar that moves down."""
    rows, columns = np.mgrid[:height, :width]
    phase = 16 * number + 40 * seed
    colors = np.stack([rows * 4 + phase, columns * 4 + 2 * phase, rows + columns + 3 * phase], axis=2) % 256
    colors[(2 * number) % height :][:4] = (255, 255 - 8 * number % 200, 0)
    return colors.astype(np.uint8)


def decoded(data: bytes) -> npt.NDArray[np.uint8]:
    """Return all frames ``(frames, height, width, 3)``, decoded from the start and not rotated."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def stored_frames(
    num_frames: int, *, height: int = 32, width: int = 32, name: str = "", encoding: str = "PNG", seed: int = 0
) -> dict[str, bytes]:
    """Return the frames of ``pictured`` as image members ``NAME0000.png``, ..., in order."""
    members = dict[str, bytes]()
    for number in range(num_frames):
        out = io.BytesIO()
        Image.fromarray(pictured(number, height, width, seed)).save(out, encoding)
        members[f"{name}{number:04d}.{'jpg' if encoding == 'JPEG' else encoding.lower()}"] = out.getvalue()
    return members
