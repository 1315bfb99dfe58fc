"""Decode sounds: WAV, FLAC, MP3, Ogg (Opus, Vorbis) and M4A files, and the sound tracks of videos.

    bytes --AudioFile.blocks--> float32 blocks (channels, samples) at the file's own rate

The indexer decodes each sound once and stores the number of decoded samples. ``audio.transform`` plans documents from
it. Encoders of MP3, Opus and AAC add a delay before a sound and padding after it; where the file declares them, ffmpeg
removes them, so the decoded length is the only one that the project uses. Needs PyAV (extra ``audio-video``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.sample import AudioSize
from data_pipeline.shards.av_file import AvFile, load_av

_EXTENSIONS = frozenset({"wav", "flac", "mp3", "ogg", "oga", "opus", "m4a"})
MAX_RATE = 768_000
"""Largest accepted rate, Hz: the largest of studio formats."""
MAX_CHANNELS = 64
_MOST_VALUES = 1 << 31
"""Largest number of decoded samples, all channels together: 12 hours of stereo at 48 kHz. A small file can claim more,
and FLAC stores hours of silence in kilobytes."""
BLOCK_SAMPLES = 1 << 16
"""Samples that are converted together, of each channel."""
_MOST_BLOCK = 1 << 17
"""Largest number of samples of a block of a codec, of each channel. FLAC has the largest: 65535."""
_LOUDEST = float(1 << 16)
"""Largest magnitude of a sample of a floating-point file. Full scale is 1; some tools write 32768."""
# As for videos, decoders and demuxers other than these are not reachable.
_CODECS = frozenset(
    {"pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le", "pcm_alaw", "pcm_mulaw"}
    | {"pcm_s16be", "pcm_s24be", "pcm_s32be", "flac", "alac", "mp3", "mp3float", "aac", "opus", "libopus", "vorbis"}
)
_FLAC, _MATROSKA, _MP3, _MP4, _OGG, _WAV = "flac", "matroska", "mp3", "mp4", "ogg", "wav"
# The header of an M4A gives the number of samples with delay and padding; that of an MP3, in a block with one of these.
_MP3_COUNTS = (b"Xing", b"Info")
_MOST_MP3_HEADER = 1 << 12
"""Bytes before the first block of an MP3 that may hold such a block."""
_LEAST_SHARE, _MOST_PADDING = 0.9, 4096
"""A FLAC, M4A or MP3 is truncated if it has less than this share of the samples in its header, and this many fewer."""
_WAV_HEADER, _MOST_CHUNKS, _UNKNOWN_LENGTH = 12, 1 << 12, 0xFFFFFFFF
"""Bytes before the chunks of a WAV; chunks to look at; the length in the header of a WAV that was written to a pipe."""
_WAV_PROBE_BYTES = 1 << 14
_OGG_PAGE, _OGG_END = b"OggS\0", 0x04
_OGG_FLAGS, _OGG_HEADER = 5, 27
"""Place of the flags of an Ogg page; bytes of its header, which the lengths of its segments follow."""
_FULL_SCALE = {"u1": 128.0, "i2": float(1 << 15), "i4": float(1 << 31), "f4": 1.0, "f8": 1.0}


class NoSoundError(SampleError):
    """A file without a sound track."""


def is_audio(ext: str) -> bool:
    """Return whether a member's extension is that of a sound (``wav``, ``0.flac``)."""
    return ext.rpartition(".")[2] in _EXTENSIONS


def audio_size(data: bytes | memoryview) -> AudioSize:
    """Return the number of samples, the rate and the channels of a sound. Decodes all of it, block by block.

    Raises:
        SampleError: as ``AudioFile`` and its ``blocks``.
        DataConfigError: PyAV is not installed.
    """
    with AudioFile(data) as file:
        samples = sum(block.shape[1] for block in file.blocks())
        return AudioSize(samples, file.rate, file.channels)


def track_size(data: bytes | memoryview) -> AudioSize:
    """Return the size of a video's sound track: (0, 0, 0) without one, 0 samples at 1 Hz if it is damaged."""
    try:
        return audio_size(data)
    except NoSoundError:
        return AudioSize(0, 0, 0)
    except SampleError:
        return AudioSize(0, 1, 1)


def _demuxer(start: bytes) -> str:
    """Return the name of ffmpeg's demuxer for the first bytes of a file."""
    if start[:4] == b"RIFF" and start[8:12] == b"WAVE":
        return _WAV
    if start[:4] == b"fLaC":
        return _FLAC
    if start[:5] == _OGG_PAGE:
        return _OGG
    if start[4:8] == b"ftyp":
        return _MP4
    if start[:4] == b"\x1a\x45\xdf\xa3":
        return _MATROSKA
    if start[:4] == b"GIF8":
        raise NoSoundError("a file without sound", kind=FaultKind.DECODE)
    # An MP3 begins with tags, or with the 11 set bits of a frame, whose layer is not 0 (which is AAC's).
    if start[:3] == b"ID3" or (len(start) > 1 and start[0] == 0xFF and start[1] & 0xE0 == 0xE0 and start[1] & 0x06):
        return _MP3
    raise SampleError(
        f"no WAV, FLAC, MP3, Ogg or M4A: it starts with {start[:8].hex(' ') or 'nothing'}", kind=FaultKind.DECODE
    )


class AudioFile(AvFile):
    """An encoded sound, opened as a context manager. Opening decodes none of its samples, except to find the codec.

    Args:
        data: WAV, FLAC, MP3, Ogg or M4A; or a video, of which the first sound track is used.

    Attributes:
        rate: Samples of a second. It is checked against each decoded block.
        channels: Number of channels, also checked.

    Raises:
        SampleError: the file is damaged, has no sound, has another format or codec, or an impossible rate or number of
            channels.
        DataConfigError: PyAV is not installed.
    """

    noun = "sound"

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = data
        self._first_byte = 0
        demuxer = _demuxer(bytes(data[:12]))
        # ffmpeg reads 5 MB of a WAV by default, in search of another codec inside.
        options = {"probesize": str(_WAV_PROBE_BYTES)} if demuxer == _WAV else {}
        super().__init__(data, demuxer, container_options=options)

    def _open(self) -> None:
        self._stream = self._find_stream()
        self._context = self._stream.codec_context
        self._context.thread_count = 1  # Each worker process has one core.
        self._context.options = {"max_samples": str(_MOST_BLOCK)}
        if self._demuxer == _FLAC:  # Each block has a checksum.
            self._context.options |= {"err_detect": "crccheck+explode"}
        self.rate, self.channels = self._checked(self._context.sample_rate, self._context.layout.nb_channels)

    def _find_stream(self) -> Any:
        streams = self._container.streams.audio
        if not streams:
            raise NoSoundError("a file without sound", kind=FaultKind.DECODE)
        return self._with_codec(streams[0], _CODECS)

    def _checked(self, rate: int, channels: int) -> tuple[int, int]:
        if not 1 <= rate <= MAX_RATE:
            raise SampleError(f"a sound of {rate} Hz; expected 1 to {MAX_RATE}", kind=FaultKind.DECODE)
        if not 1 <= channels <= MAX_CHANNELS:
            raise SampleError(f"a sound with {channels} channels; expected 1 to {MAX_CHANNELS}", kind=FaultKind.DECODE)
        return rate, channels

    def blocks(self) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the decoded sound from its start to its end, once.

        Codecs decode to as few as 480 samples at a time. ffmpeg's queue joins them, so that numpy is called less often.

        Yields:
            float32 ``(channels, samples)``; full scale is 1. All but the last have ``BLOCK_SAMPLES`` samples.

        Raises:
            SampleError: the data are damaged, truncated, empty or not finite, change their rate or channels, or decode
                to too many samples.
        """
        total, queue = 0, load_av().AudioFifo()
        with self._faults():
            for frame in self._frames():
                if (frame.sample_rate, frame.layout.nb_channels) != (self.rate, self.channels):
                    raise self.fault(
                        f"{self.rate} Hz and {self.channels} channels become {frame.sample_rate} Hz and "
                        f"{frame.layout.nb_channels} channels"
                    )
                total += frame.samples
                if total * self.channels > _MOST_VALUES:
                    raise SampleError(
                        f"a sound of more than {_MOST_VALUES // self.channels} samples", kind=FaultKind.DECODE
                    )
                frame.pts = None  # The queue would require times without gaps.
                queue.write(frame)
                if queue.samples >= BLOCK_SAMPLES:
                    yield from map(_values, queue.read_many(BLOCK_SAMPLES))
            yield from map(_values, queue.read_many(BLOCK_SAMPLES, partial=True))
        if not total:
            raise self.fault("it has no sample")
        self._check_whole(total)

    def _frames(self) -> Iterator[Any]:
        for packet in self._container.demux(self._stream):
            self._first_byte = self._first_byte or packet.pos or 0
            # The last packet of a WAV from a pipe is marked, because its header gives no length.
            if packet.is_corrupt and self._demuxer != _WAV:
                raise self.fault("a corrupt packet")
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise self.fault("a corrupt block")
                if frame.samples:
                    yield frame

    def _check_whole(self, total: int) -> None:
        """Raise ``SampleError`` if the header promises more samples than there are, or the end of an Ogg is missing."""
        declared = self._stream.duration
        before = bytes(self._data[max(0, self._first_byte - _MOST_MP3_HEADER) : self._first_byte])
        declares = self._demuxer in (_FLAC, _MP4) or (
            self._demuxer == _MP3 and any(mark in before for mark in _MP3_COUNTS)
        )
        if declares and declared is not None:
            num_declared = round(float(declared * self._stream.time_base) * self.rate)
            if total < _LEAST_SHARE * num_declared - _MOST_PADDING:
                raise self.fault(f"truncated: its header says {num_declared} samples, {total} are there")
        if self._demuxer == _WAV and not _is_whole_wav(self._data):
            raise self.fault("truncated: its header says more samples than are there")
        if self._demuxer == _OGG and not _is_whole_ogg(bytes(self._data)):
            raise self.fault("truncated: its last page is not marked as the last, or is not complete")


def _is_whole_wav(data: bytes | memoryview) -> bool:
    """Return whether a WAV file holds all the bytes of samples that its header says."""
    at = _WAV_HEADER
    for _ in range(_MOST_CHUNKS):
        name, size = bytes(data[at : at + 4]), int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8
        if name == b"data":
            return size == _UNKNOWN_LENGTH or at + size <= len(data)
        at += size + size % 2
    return False


def _is_whole_ogg(data: bytes) -> bool:
    """Return whether the last page of an Ogg file is complete and marked as the last."""
    page = data[max(0, data.rfind(_OGG_PAGE)) :]
    if len(page) < _OGG_HEADER or not page[_OGG_FLAGS] & _OGG_END:
        return False
    stop = _OGG_HEADER + page[_OGG_HEADER - 1]  # The last byte of the header is the number of segments.
    return len(page) >= stop + sum(page[_OGG_HEADER:stop])


def _values(frame: Any) -> npt.NDArray[np.float32]:
    """Return the samples of a decoded block ``(channels, samples)``."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    scale = _FULL_SCALE.get(values.dtype.str[1:])
    if scale is None:
        raise SampleError(f"a sound with samples of the type {frame.format.name}", kind=FaultKind.DECODE)
    if values.dtype.kind == "f":
        if not -_LOUDEST <= values.min() <= values.max() <= _LOUDEST:  # Also false for NaN.
            raise AudioFile.fault(f"a sample is no number, or above {_LOUDEST:g} times full scale")
        return values.astype(np.float32, copy=False)
    if values.dtype.kind == "u":  # 8 bits, of which 128 is silence.
        values = values.astype(np.int16) - 128
    return np.multiply(values, np.float32(1 / scale), dtype=np.float32, casting="same_kind")
