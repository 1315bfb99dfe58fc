"""Speak digits and names of emoji with the voices of espeak-ng, and encode them as Opus."""

from __future__ import annotations

import io
import itertools
import subprocess
import wave
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN_VOICES = (
    "en-us",
    "en-us+f2",
    "en-us+m3",
    "en+f4",
    "en+m7",
    "en-gb-x-rp",
    "en-gb-x-rp+f1",
    "en-gb-scotland+m4",
    "en-gb-x-gbclan+f3",
    "en-029+m2",
)
HELDOUT_VOICES = ("en-us+m1", "en+f5", "en-gb-x-gbcwmd+m5")
"""An accent and a timbre (after the plus) each. No training voice has one of these timbres, or the last accent."""
SLOWEST, FASTEST = 165, 205
"""Range of the speed, words per minute."""
LOWEST, HIGHEST = 35, 65
"""Range of the pitch; 50 is that of the voice."""
BITS_PER_SECOND = 16_000


@dataclass(frozen=True)
class Utterance:
    """A text and how it is spoken: voice, words per minute, pitch from 0 to 99."""

    text: str
    voice: str
    speed: int
    pitch: int


def transcripts(names: list[str], num_sequences: int, share: Callable[[str], float]) -> list[str]:
    """Return a digit with each name, and ``num_sequences`` sequences of three digits, those of the lowest ``share``."""
    sequences = [" ".join(digits) for digits in itertools.product(DIGITS, repeat=3)]
    pairs = [f"{digit} {name}" for digit in DIGITS for name in names]
    return pairs + sorted(sequences, key=share)[:num_sequences]


def utterance(text: str, voice: str, share: Callable[[str], float]) -> Utterance:
    """Return how a voice speaks a text. ``share`` gives each text a number in [0, 1), which chooses speed and pitch."""
    speed = SLOWEST + int((FASTEST - SLOWEST) * share(f"speed:{voice}:{text}"))
    return Utterance(text, voice, speed, LOWEST + int((HIGHEST - LOWEST) * share(f"pitch:{voice}:{text}")))


def speak(utterance: Utterance) -> bytes:
    """Return an utterance as an Ogg Opus file with one channel.

    Raises:
        OSError, CalledProcessError: espeak-ng is not installed, or fails.
    """
    command = ["espeak-ng", "-v", utterance.voice, "-s", str(utterance.speed), "-p", str(utterance.pitch), "--stdout"]
    spoken = subprocess.run([*command, utterance.text], check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(spoken)) as file:  # Its header claims 2 GiB, because espeak-ng writes to a pipe.
        rate, samples = file.getframerate(), np.frombuffer(file.readframes(1 << 30), np.int16)
    return _opus(samples[None], rate)


def _opus(samples: Any, rate: int) -> bytes:
    target = io.BytesIO()
    # Without ``bitexact`` the writer stores a random serial number and its version.
    with av.open(target, "w", format="ogg", options={"fflags": "+bitexact"}) as file:
        stream: Any = file.add_stream("libopus", rate=48_000, options={"application": "voip", "frame_duration": "60"})
        stream.layout, stream.bit_rate = "mono", BITS_PER_SECOND
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        sound = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        sound.sample_rate = rate
        resampler = av.AudioResampler(format="s16", layout="mono", rate=48_000)
        for frame in [*resampler.resample(sound), *resampler.resample(None)]:
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return target.getvalue()
