"""Which frames of a video are used: kinds of the key ``frames`` of ``data.video``.

Number and planned times of the frames depend on the index alone; ``numbers`` also knows when each frame starts.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.io.strict import StrictConfig
from data_pipeline.sample import VideoSize

_MICROSECOND = 1e-6
_IRREGULAR = 0.25
"""A frame rate is variable if a frame starts by more than this share of a mean frame before or after its regular time.
WebM rounds times to milliseconds, which is below this share up to 500 frames a second."""


class _Spread(StrictConfig):
    """Base class of choices of evenly spread frames."""

    spread: Literal["ends", "starts", "middles"] = "ends"
    """``ends``: from the first to the last frame (the code of Qwen2-VL's authors). ``starts``: the first frame of each
    of as many equal parts (transformers). ``middles``: the middle frame of each (InternVL). In a video with a variable
    frame rate, frames are spread evenly in time."""

    def numbers(self, times: npt.NDArray[np.float64], size: VideoSize, count: int) -> list[int]:
        """Return the numbers of the ``count`` frames of a video, ascending. ``times``: start of each frame, seconds."""
        total = len(times)
        mean = float(times[-1]) / max(1, total - 1)
        is_regular = bool((np.abs(times - mean * np.arange(total)) <= _IRREGULAR * mean).all())
        if is_regular:
            return self._regular_numbers(total, count)
        if self.spread != "ends":
            targets = (np.arange(count) + (0.5 if self.spread == "middles" else 0)) * (total * mean / count)
            return [int(i) for i in np.searchsorted(times, targets + _MICROSECOND, side="right") - 1]
        # The nearest frame, or the earlier one of two; by bisection, because a file may have a million frames.
        targets = mean * _places(total, count).numpy().astype(np.float64)
        later = np.searchsorted(times, targets).clip(1, total - 1)
        is_later = times[later] - targets < targets - times[later - 1]
        return [int(i) for i in later - 1 + is_later]

    def _regular_numbers(self, total: int, count: int) -> list[int]:
        if self.spread != "ends":
            half = int(self.spread == "middles")
            return [(2 * i + half) * total // (2 * count) for i in range(count)]
        return [int(i) for i in _places(total, count).round()]

    def planned_times(self, size: VideoSize, count: int) -> list[float]:
        """Return the times of the frames in seconds, as if the frame rate were constant."""
        rate = frame_rate(size)
        return [number / rate for number in self._regular_numbers(size.num_frames, count)]


def _places(total: int, count: int) -> torch.Tensor:
    """Return ``count`` evenly spread places among ``total`` frames."""
    return torch.linspace(0, total - 1, count)  # float32, as in the authors' code: it decides which frame is nearer.


class RateChoice(_Spread):
    """A number of frames for each second of the video.

    Source: Qwen2-VL (arXiv 2409.12191), section 2.1, and ``smart_nframes`` of the package qwen-vl-utils.
    """

    kind: Literal["rate"] = "rate"
    per_second: float = Field(default=2.0, gt=0, le=1e4)
    """Frames for each second, above 0, at most 1e4."""
    min_frames: int = Field(default=4, ge=1, le=1 << 16)
    """Least number of frames, 1 to 65536; a video with fewer frames gives all of them."""
    max_frames: int = Field(default=768, ge=1, le=1 << 16)
    """Largest number of frames, from ``min_frames`` to 65536."""

    @model_validator(mode="after")
    def _ordered(self) -> RateChoice:
        if self.max_frames < self.min_frames:
            raise ValueError(f"max_frames={self.max_frames} is below min_frames={self.min_frames}")
        return self

    def count(self, size: VideoSize, multiple: int) -> int:
        """Return the number of frames: a multiple of ``multiple``, unless the video has fewer frames than that."""
        most = min(self.max_frames, size.num_frames) // multiple * multiple
        least = -(-self.min_frames // multiple) * multiple
        # In this order, as the authors: 100 frames at 30 a second last 3.333333 s, of which 3 a second are 9.999999.
        wanted = min(max(size.num_frames / frame_rate(size) * self.per_second, least), most)
        return max(math.floor(wanted / multiple) * multiple, min(multiple, size.num_frames))


class UniformChoice(_Spread):
    """A number of frames, whatever the length of the video."""

    kind: Literal["uniform"] = "uniform"
    num_frames: int = Field(default=16, ge=1, le=1 << 16)
    """Number of frames, 1 to 65536; a video with fewer frames gives all of them."""

    def count(self, size: VideoSize, multiple: int) -> int:
        """Return the number of frames."""
        return min(self.num_frames, size.num_frames)


class TimesChoice(StrictConfig):
    """The frames that are shown at given times."""

    kind: Literal["times"] = "times"
    seconds: tuple[Annotated[float, Field(ge=0, le=1e6)], ...] = Field(min_length=1, max_length=1 << 16)
    """Times after the first frame, ascending, 0 to 1e6 seconds. A video that ends before one of them is a bad
    sample."""

    @model_validator(mode="after")
    def _ascending(self) -> TimesChoice:
        if list(self.seconds) != sorted(self.seconds):
            raise ValueError(f"seconds={list(self.seconds)}: must be ascending")
        return self

    def count(self, size: VideoSize, multiple: int) -> int:
        """Return the number of frames. Raises ``SampleError`` if the video ends before the last of ``seconds``."""
        if self.seconds[-1] * 1e6 >= size.microseconds:
            raise SampleError(
                f"a video of {size.microseconds / 1e6:g} seconds has no frame at {self.seconds[-1]:g} (frames.seconds)",
                kind=FaultKind.DECODE,
            )
        return len(self.seconds)

    def numbers(self, times: npt.NDArray[np.float64], size: VideoSize, count: int) -> list[int]:
        """Return the numbers of the frames, ascending; a number may occur more than once."""
        return [int(i) for i in np.searchsorted(times, np.array(self.seconds) + _MICROSECOND, side="right") - 1]

    def planned_times(self, size: VideoSize, count: int) -> list[float]:
        """Return the times of the frames in seconds, as if the frame rate were constant."""
        rate = frame_rate(size)
        return [min(int((time + _MICROSECOND) * rate), size.num_frames - 1) / rate for time in self.seconds]


class TrimmedChoice(StrictConfig):
    """A number of frames for each second, and of long videos none from the first and the last second.

    Frames are counted, whatever their times. Source: ``SmolVLMVideoProcessor.sample_frames`` of transformers.
    """

    kind: Literal["trimmed"] = "trimmed"
    per_second: float = Field(default=1.0, gt=0, le=1e4)
    """Frames for each second, above 0, at most 1e4."""
    max_frames: int = Field(default=64, ge=1, le=1 << 16)
    """Largest number of frames, 1 to 65536."""
    skip_seconds: int = Field(default=1, ge=0, le=1 << 16)
    """Seconds to leave out at both ends, 0 to 65536, of a video that has more than ``max_frames`` times ``per_second``
    seconds between them."""

    def _numbers(self, size: VideoSize) -> list[int]:
        rate, seconds = frame_rate(size), size.microseconds / 1e6
        wanted = max(1, min(round(self.per_second * seconds), self.max_frames))
        first, last = 0, size.num_frames - 1
        if self.skip_seconds and seconds - 2 * self.skip_seconds > self.max_frames * self.per_second:
            first, last = int(self.skip_seconds * rate), min(int(size.num_frames - self.skip_seconds * rate), last)
        if first >= last:
            first, last = 0, size.num_frames - 1
        return [int(i) for i in np.unique(np.linspace(first, last, wanted, dtype=int))]

    def count(self, size: VideoSize, multiple: int) -> int:
        """Return the number of frames."""
        return len(self._numbers(size))

    def numbers(self, times: npt.NDArray[np.float64], size: VideoSize, count: int) -> list[int]:
        """Return the numbers of the frames, ascending."""
        return self._numbers(size)

    def planned_times(self, size: VideoSize, count: int) -> list[float]:
        """Return the times of the frames in seconds, as if the frame rate were constant."""
        rate = frame_rate(size)
        return [number / rate for number in self._numbers(size)]


FrameChoice = Annotated[RateChoice | UniformChoice | TimesChoice | TrimmedChoice, Field(discriminator="kind")]


def frame_rate(size: VideoSize) -> float:
    """Return the mean number of frames for each second.

    The index holds the duration in whole microseconds, so several rates are possible. Rates of films are whole numbers,
    these times 1000/1001, or fractions with a small denominator; the first of these with the same duration is returned.
    """
    exact = Fraction(10**6 * size.num_frames, max(1, size.microseconds))
    whole, ntsc = Fraction(round(exact)), Fraction(1000 * round(exact * 1001 / 1000), 1001)
    for rate in (whole, ntsc, exact.limit_denominator(1001)):
        if rate > 0 and round(10**6 * size.num_frames / rate) == size.microseconds:
            return float(rate)
    return float(exact)
