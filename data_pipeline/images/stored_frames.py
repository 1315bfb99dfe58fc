"""Read a video of either form: an encoded file, or one encoded image for each frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType

import numpy as np

from data_pipeline.images.decode import Pixels, decode_image
from data_pipeline.sample import StoredFrames
from data_pipeline.shards.video_file import MAX_FRAME_PIXELS, VideoFile


def open_video(data: bytes | memoryview | StoredFrames, max_pixels: int = MAX_FRAME_PIXELS) -> VideoFile | FrameFiles:
    """Open a video as a context manager; see ``VideoFile``, whose interface ``FrameFiles`` has.

    Raises:
        SampleError: the file is damaged, see ``VideoFile``.
        DataConfigError: ``data`` is a file, and PyAV is not installed.
    """
    return FrameFiles(data, max_pixels) if isinstance(data, StoredFrames) else VideoFile(data, max_pixels)


class FrameFiles:
    """The frames of a video that is stored as images. Only the frames that ``decode`` yields are decoded.

    Args:
        frames: The encoded frames.
        max_pixels: Frames with more pixels raise before memory is allocated for them.

    Attributes:
        num_frames, microseconds, times: As in ``VideoFile``.
    """

    def __init__(self, frames: StoredFrames, max_pixels: int = MAX_FRAME_PIXELS) -> None:
        self._frames, self._max_pixels = frames, max_pixels
        self.num_frames, self.microseconds = len(frames.images), frames.microseconds
        self.times = np.arange(self.num_frames) / frames.per_second

    def __enter__(self) -> FrameFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: there is no file to close."""

    def num_decoded(self, numbers: Sequence[int]) -> int:
        """Return the number of different frames."""
        return len(set(numbers))

    def decode(self, numbers: Sequence[int]) -> Iterator[tuple[int, Pixels]]:
        """Yield (number, pixels) of frames, ascending and each once, as ``VideoFile.decode``.

        Raises:
            SampleError: a frame is damaged.
        """
        for number in sorted(set(numbers)):
            yield number, decode_image(self._frames.images[number], max_pixels=self._max_pixels)
