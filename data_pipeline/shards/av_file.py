"""Open an encoded video or sound with ffmpeg: the base class of ``VideoFile`` and ``AudioFile``.

Needs PyAV (extra ``audio-video``).
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, Self

from data_pipeline.errors import DataConfigError, FaultKind, SampleError


def load_av() -> Any:
    """Return the module PyAV, whose ffmpeg prints nothing. Raises ``DataConfigError`` if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise DataConfigError("video and audio members need PyAV: pip install 'mmscale[audio-video]'") from error
    av.logging.set_level(av.logging.PANIC)  # ffmpeg prints its warnings about damaged data to stderr.
    return av


class AvFile(ABC):
    """A file that is open in ffmpeg, as a context manager. The constructor calls ``_open``.

    Args:
        data: The encoded file.
        demuxer: ffmpeg's name of its format.
        **options: Further arguments of ``av.open``.

    Raises:
        SampleError: ffmpeg cannot open the file, or ``_open`` raises.
        DataConfigError: PyAV is not installed.
    """

    noun: ClassVar[str]
    """``video`` or ``sound``, for messages."""

    def __init__(self, data: bytes | memoryview, demuxer: str, **options: Any) -> None:
        av = load_av()
        self._errors = (av.FFmpegError, ValueError, ArithmeticError)
        self._demuxer = demuxer
        with self._faults():
            self._container = av.open(io.BytesIO(data), format=demuxer, metadata_errors="replace", **options)
        try:
            with self._faults():
                self._open()
        except BaseException:
            self._container.close()
            raise

    @abstractmethod
    def _open(self) -> None:
        """Choose a stream of ``self._container``, and read and check its properties."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Raise an error of ffmpeg as ``SampleError``."""
        try:
            yield
        except self._errors as error:
            # ffmpeg's own message is more precise than that of its error code.
            last = getattr(error, "log", None)
            raise self.fault(str(last[2]).strip() if last else str(error).partition("\n")[0]) from error

    @classmethod
    def fault(cls, reason: str) -> SampleError:
        """Return the error of a damaged file."""
        return SampleError(f"a damaged {cls.noun}: {reason}", kind=FaultKind.DECODE)

    @classmethod
    def _with_codec(cls, stream: Any, codecs: Collection[str]) -> Any:
        """Return the stream. Raise ``SampleError`` if its codec is none of ``codecs``."""
        name = stream.codec_context.name if stream.codec_context is not None else "unknown"
        if name not in codecs:
            raise SampleError(
                f"a {cls.noun} with the codec {name!r}; expected one of {', '.join(sorted(codecs))}",
                kind=FaultKind.DECODE,
            )
        return stream
