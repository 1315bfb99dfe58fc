"""Tiny sounds for tests, encoded by PyAV."""

from __future__ import annotations

import io

import av
import numpy as np
import numpy.typing as npt

FORMATS = {
    "wav": ("wav", "pcm_s16le"),
    "flac": ("flac", "flac"),
    "mp3": ("mp3", "libmp3lame"),
    "opus": ("ogg", "libopus"),
    "ogg": ("ogg", "libopus"),
    "m4a": ("ipod", "aac"),
    "mka": ("matroska", "flac"),
}
"""ffmpeg's format and encoder of each extension."""


def tones(samples: int, rate: int, channels: int = 1, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return a tone that rises from 200 Hz, with another one in each channel, ``(channels, samples)``."""
    seconds = np.arange(samples) / rate
    phases = [2 * np.pi * (200 + 40 * seed + 110 * c + 300 * seconds) * seconds for c in range(channels)]
    return (0.4 * np.sin(np.stack(phases))).astype(np.float32)


def encoded(
    samples: int | npt.NDArray[np.float32] = 4000,
    *,
    kind: str = "wav",
    rate: int = 16000,
    channels: int = 1,
    codec: str | None = None,
    seed: int = 0,
) -> bytes:
    """Return an encoded sound.

    Args:
        samples: Number of samples of ``tones``, or the samples ``(channels, samples)``.
        kind: Extension of the file.
        rate: Samples of a second.
        channels: 1, or 2; or another number for a WAV file.
        codec: Name of the encoder; None for the usual one of ``kind``.
        seed: Determines the tones.
    """
    values = tones(samples, rate, channels, seed) if isinstance(samples, int) else samples
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(values)]
    container_format, usual = FORMATS[kind]
    out = io.BytesIO()
    with av.open(out, "w", format=container_format) as container:
        stream = container.add_stream(codec or usual, rate=rate, layout=layout)
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(values), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        for one in (frame, None):
            container.mux(stream.encode(one))
    return out.getvalue()
