"""Tokens of a video whose frames are laid out one by one: a text with the time, then the features of the frame.

    text of group 1 | start | features of group 1 | end | break | text of group 2 | start | ...

A group is a frame, or the frames that share a patch. Not for: videos without such texts, whose tokens are those of an
image (``image_tokens``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.document import MediaItem
from data_pipeline.images.image_tokens import Ids, LayoutElement, LayoutFeatures, LayoutTokens
from data_pipeline.media_spec import MediaSpec

_FIELD = re.compile(r"\{(?:(n)|(clock)|seconds(?::\.([0-3])f)?)\}")
_INTRO_FIELD = re.compile(r"\{(frames|words|duration)\}")
_UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *(f"{stem}teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine")),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def check_pattern(pattern: str) -> None:
    """Check a text with fields in braces, see ``filled``.

    Raises:
        ValueError: a brace belongs to no known field.
    """
    if re.search(r"[{}]", _FIELD.sub("", pattern)):
        raise ValueError(
            f"timestamps={pattern!r}: only {{seconds}}, {{seconds:.1f}} (0 to 3 digits), {{clock}} and {{n}} are "
            "allowed in braces"
        )


def filled(pattern: str, seconds: float, number: int) -> str:
    """Return the text of a group of frames.

    Args:
        pattern: May contain ``{seconds}`` (whole seconds, rounded down), ``{seconds:.1f}`` (0 to 3 digits, rounded),
            ``{clock}`` (minutes and seconds, ``01:05``) and ``{n}`` (the number of the group).
        seconds: Time of the group.
        number: Number of the group, from 1.
    """

    def value(match: re.Match[str]) -> str:
        if match[1]:
            return str(number)
        if match[2]:
            return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"
        return str(int(seconds)) if match[3] is None else f"{seconds:.{match[3]}f}"

    return _FIELD.sub(value, pattern)


def check_intro(pattern: str) -> None:
    """Check a text with fields in braces, see ``introduced``.

    Raises:
        ValueError: a brace belongs to no known field.
    """
    if re.search(r"[{}]", _INTRO_FIELD.sub("", pattern)):
        raise ValueError(f"intro={pattern!r}: only {{frames}}, {{words}} and {{duration}} are allowed in braces")


def introduced(pattern: str, num_frames: int, seconds: float) -> str:
    """Return the text before a video.

    Args:
        pattern: May contain ``{frames}`` (the number of frames), ``{words}`` (the same in English words) and
            ``{duration}`` (hours, minutes and seconds, rounded down: ``0:01:05``).
        num_frames: Number of frames, below a million.
        seconds: Duration of the video.
    """
    minutes = int(seconds) // 60
    duration = f"{minutes // 60}:{minutes % 60:02d}:{int(seconds) % 60:02d}"
    values = {"frames": str(num_frames), "words": in_words(num_frames), "duration": duration}
    return _INTRO_FIELD.sub(lambda match: values[match[1]], pattern)


def in_words(number: int) -> str:
    """Return a number from 0 to below a million in words, as the package num2words writes it in English."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_UNITS[number % 10]}" if number % 10 else "")
    unit, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    rest = number % unit
    joint = ", " if rest >= 100 else " and " if rest else ""
    return f"{in_words(number // unit)} {name}{joint}{in_words(rest) if rest else ''}"


def group_times(times: Sequence[float], size: int) -> list[float]:
    """Return the time of each group of ``size`` frames: the middle of its first and last; the last frame fills a group.

    Source: ``Qwen3VLProcessor._calculate_timestamps`` of transformers.
    """
    full = [*times, *[times[-1]] * (-len(times) % size)]
    return [(full[i] + full[i + size - 1]) / 2 for i in range(0, len(full), size)]


@dataclass(frozen=True)
class VideoLayout:
    """The tokens of one video, frame group by frame group. The model reads and does not learn them.

    Attributes:
        start, end: Tokens before and after the features of each group.
        texts: Tokens before each group's ``start``, those of the break included.
    """

    start: Ids
    end: Ids
    texts: tuple[Ids, ...]

    def tagged(self, crops: Sequence[MediaItem], image: int) -> tuple[MediaItem, ...]:
        """Return the crops unchanged, see ``ImageLayout.tagged``."""
        return tuple(crops)

    def elements(self, crops: Sequence[MediaItem], image: int, spec: MediaSpec) -> Iterator[LayoutElement]:
        """Yield the layout of a video: one crop with a group of frames for each text, or one crop for each text.

        Raises:
            SampleError: the grid of a crop does not fit the model.
        """
        num_groups = len(self.texts)
        assert sum(crop.grid[0] for crop in crops) == num_groups, "the texts are those of this video"
        for group, words in enumerate(self.texts):
            if before := words + self.start:
                yield LayoutTokens(before)
            if len(crops) == 1:
                count = crops[0].num_features(spec) // num_groups
                yield LayoutFeatures(0, group * count, count)
            else:
                yield LayoutFeatures(group, 0, crops[group].num_features(spec))
            if self.end:
                yield LayoutTokens(self.end)
