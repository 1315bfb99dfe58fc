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
        texts: Tokens before each group's ``start``.
        frame_break: Tokens between two groups.
    """

    start: Ids
    end: Ids
    texts: tuple[Ids, ...]
    frame_break: Ids

    def tagged(self, crops: Sequence[MediaItem], image: int) -> tuple[MediaItem, ...]:
        """Return the crops unchanged, see ``ImageLayout.tagged``."""
        return tuple(crops)

    def elements(self, crops: Sequence[MediaItem], image: int, spec: MediaSpec) -> Iterator[LayoutElement]:
        """Yield the layout of a video, whose only crop has a group of frames for each text.

        Raises:
            SampleError: the grid of the crop does not fit the model.
        """
        (crop,) = crops
        assert crop.grid[0] == len(self.texts), "the texts are those of this video"
        count = crop.num_features(spec) // len(self.texts)
        for group, words in enumerate(self.texts):
            if before := (self.frame_break if group else ()) + words + self.start:
                yield LayoutTokens(before)
            yield LayoutFeatures(0, group * count, count)
            if self.end:
                yield LayoutTokens(self.end)
