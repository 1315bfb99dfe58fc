"""Read a video file: frame count, duration and size without decoding more than one frame, and single frames by seeking.

    bytes --VideoFile--> packets, frame times --decode(frame numbers)--> RGB pixels of these frames

The indexer stores the size. ``images.video`` chooses the frames. Needs PyAV (extra ``audio-video``).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Container, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.sample import StoredFrames, VideoSize
from data_pipeline.shards.av_file import AvFile, load_av
from data_pipeline.shards.image_header import image_size

_EXTENSIONS = frozenset({"mp4", "m4v", "mov", "webm", "mkv", "gif"})
MAX_FRAME_PIXELS = 1 << 26
"""Largest number of pixels of a frame. ffmpeg rejects a larger one before it allocates memory for it."""
_MAX_PACKETS = 1 << 20
_MAX_MICROSECONDS = 1 << 50  # 35 years. An index stores 63 bits, and headers can claim more.
_MOST_DELAY = 64
"""A decoder is given at most this many packets after the last one that ``num_decoded`` counts. H.264 and H.265 delay a
frame by at most 16 frames, each of one or two packets; other codecs by fewer."""
# ffmpeg contains hundreds of decoders and demuxers. Others than these are not reachable, because rare ones are fuzzed
# less, and some demuxers open further files or URLs.
_CODECS = frozenset({"h264", "hevc", "mpeg4", "vp8", "vp9", "av1", "libdav1d", "gif"})
_GIF, _MATROSKA, _MP4 = "gif", "matroska", "mp4"
_VP8_SHOWN = 0x10  # Bit ``show_frame`` of the first byte of a VP8 frame (RFC 6386, section 9.1).
_LEAST_SHARE = 0.9
"""A file is truncated if its frames last less than this share of the duration in its header."""


def is_video(ext: str) -> bool:
    """Return whether a member's extension is that of a video (``mp4``, ``0.webm``)."""
    return ext.rpartition(".")[2] in _EXTENSIONS


def video_size(data: bytes | memoryview | StoredFrames) -> VideoSize:
    """Return frame count, duration and size of a video.

    Decodes the first frame of a file, which holds the rotation, and no frame that is stored as an image.

    Raises:
        SampleError: as ``VideoFile``, or the first frame is damaged. Of frames that are stored as images, a header is
            damaged, or their sizes differ.
        DataConfigError: PyAV is not installed.
    """
    if isinstance(data, StoredFrames):
        sides = [image_size(image) for image in data.images]
        other = next((i for i, one in enumerate(sides) if one[1:3] != sides[0][1:3]), None)
        if other is not None:
            other_size = f"{sides[other].width}x{sides[other].height}"
            raise VideoFile.fault(
                f"frame {other} has {other_size} pixels, the first {sides[0].width}x{sides[0].height}"
            )
        return VideoSize(len(sides), data.microseconds, sides[0].height, sides[0].width)
    with VideoFile(data) as file:
        ((_, pixels),) = file.decode([0])
        return VideoSize(file.num_frames, file.microseconds, *pixels.shape[:2])


def _demuxer(start: bytes) -> str:
    """Return the name of ffmpeg's demuxer for the first bytes of a file."""
    if start[4:8] == b"ftyp":
        return _MP4
    if start[:4] == b"\x1a\x45\xdf\xa3":
        return _MATROSKA
    if start[:4] == b"GIF8":
        return _GIF
    raise SampleError(
        f"no MP4, WebM, Matroska or GIF: it starts with {start[:8].hex(' ') or 'nothing'}", kind=FaultKind.DECODE
    )


class VideoFile(AvFile):
    """An encoded video, opened as a context manager. Opening reads all packets, and decodes none.

    Args:
        data: The encoded video: MP4, WebM, Matroska or GIF with a codec of ``_CODECS``.
        max_pixels: Frames with more pixels raise before memory is allocated for them.

    Attributes:
        num_frames: Number of frames, at least 1.
        microseconds: Time from the start of the first frame to the end of the last.
        times: Start of each frame in seconds after the first frame, ascending, float64 ``(num_frames,)``.

    Raises:
        SampleError: the file is damaged, truncated or empty, has no video, or has another format or codec.
        DataConfigError: PyAV is not installed.
    """

    noun = "video"

    def __init__(self, data: bytes | memoryview, max_pixels: int = MAX_FRAME_PIXELS) -> None:
        self._options = {"max_pixels": str(max_pixels)}
        super().__init__(data, _demuxer(bytes(data[:12])), options=self._options)

    def _open(self) -> None:
        self._stream = self._find_stream()
        self._context = self._stream.codec_context
        self._context.options = self._options
        self._context.thread_count = 1  # Each worker process has one core, and threads delay frames.
        self._reformatter = load_av().video.reformatter.VideoReformatter()
        self._packets, last = self._read_packets()
        self._pts = sorted(packet.pts for packet in self._packets if self._is_shown(packet))
        unit = Fraction(self._stream.time_base)
        self.num_frames = len(self._pts)
        self.microseconds = round((last - self._pts[0]) * unit * 1_000_000)
        if not 0 <= self.microseconds <= _MAX_MICROSECONDS:
            raise self.fault(f"its frames last {self.microseconds / 1e6:g} s")
        self.times: npt.NDArray[np.float64] = (np.array(self._pts) - self._pts[0]) * float(unit)
        self._check_whole()

    def _find_stream(self) -> Any:
        cover = load_av().stream.Disposition.attached_pic  # The picture of an album.
        streams = [stream for stream in self._container.streams.video if not stream.disposition & cover]
        if not streams:
            reason = "a video file without video; for its sound alone, rename an MP4 to .m4a, convert others to .ogg"
            raise SampleError(reason, kind=FaultKind.DECODE)
        return self._with_codec(streams[0], _CODECS)

    def _read_packets(self) -> tuple[list[Any], int]:
        """Return the packets in the order of decoding, and the end of the last frame in units of the stream.

        Raises:
            SampleError: there is none, there are too many, or one is cut off or has no time.
        """
        packets = list[Any]()
        for packet in self._container.demux(self._stream):
            if not packet.size:  # The last packet of ``demux`` only flushes the decoder.
                continue
            if packet.is_corrupt:
                raise self.fault(f"truncated inside frame {len(packets)}")
            if packet.pts is None:
                raise self.fault(f"frame {len(packets)} has no time")
            packets.append(packet)
            if len(packets) > _MAX_PACKETS:
                raise SampleError(f"a video of more than {_MAX_PACKETS} frames", kind=FaultKind.DECODE)
        times = sorted(packet.pts for packet in packets if self._is_shown(packet))
        if not times:
            raise self.fault("it has no frame")
        if any(earlier == later for earlier, later in itertools.pairwise(times)):
            raise self.fault("two frames have the same time")
        mean = max(1, round((times[-1] - times[0]) / max(1, len(times) - 1)))
        end = times[-1] + (next(p.duration for p in packets if p.pts == times[-1]) or mean)
        return packets, end

    def _is_shown(self, packet: Any) -> bool:
        """Return whether a packet gives a frame; an edit list hides frames, and VP8 has frames for reference only."""
        is_reference_only = self._context.name == "vp8" and not bytes(packet)[0] & _VP8_SHOWN
        return not packet.is_discard and not is_reference_only

    def _check_whole(self) -> None:
        """Raise ``SampleError`` if the header promises more frames or more time than the packets have."""
        # Not ``stream.frames``, which counts frames that an edit list cuts off: phones trim clips so.
        num_listed = len(self._stream.index_entries) if self._demuxer == _MP4 else 0
        if num_listed > len(self._packets):
            raise self.fault(f"truncated: its header lists {num_listed} frames, {len(self._packets)} are there")
        declared = self._stream.metadata.get("DURATION", "")  # Matroska: ``00:00:02.500000000``.
        parts = declared.replace(":", ".").split(".")
        if self._demuxer == _MATROSKA and len(parts) >= 3 and all(part.isdecimal() for part in parts[:3]):
            hours, minutes, seconds = (int(part) for part in parts[:3])
            if self.microseconds < _LEAST_SHARE * 1_000_000 * (3600 * hours + 60 * minutes + seconds):
                raise self.fault(
                    f"truncated: its header says {declared}, its frames last {self.microseconds / 1e6:.2f} s"
                )

    def num_decoded(self, numbers: Sequence[int]) -> int:
        """Return how many packets ``decode`` needs for these frames, which determines its time."""
        return sum(stop - start for start, stop in self._ranges(numbers))

    def _ranges(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """Return ascending, disjoint ranges of packets that begin at key frames and contain these frames."""
        place = {packet.pts: i for i, packet in enumerate(self._packets)}
        starts = self._starts()
        ranges = list[tuple[int, int]]()
        for number in sorted(set(numbers)):
            last = place[self._pts[number]]
            if ranges and starts[last] <= ranges[-1][1]:
                ranges[-1] = (ranges[-1][0], max(ranges[-1][1], last + 1))
            else:
                ranges.append((starts[last], last + 1))
        return ranges

    def _starts(self) -> list[int]:
        """Return the packet from which each packet can be decoded: the last key frame that is not later in time.

        A frame that precedes a key frame in time, but follows it in the file, needs the frames before that key frame.
        """
        starts, keys, times = list[int](), list[int](), list[int]()
        for i, packet in enumerate(self._packets):
            # A frame of a GIF may change its predecessor, although its packet is marked as a key frame.
            if packet.is_keyframe and self._demuxer != _GIF:
                while times and times[-1] >= packet.pts:  # An earlier key frame that is later in time is never needed.
                    del keys[-1], times[-1]
                keys.append(i)
                times.append(packet.pts)
            at = bisect.bisect_right(times, packet.pts)
            starts.append(keys[at - 1] if at else 0)
        return starts

    def decode(self, numbers: Sequence[int]) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """Yield (number, pixels) of frames, ascending and each once. Decodes from key frames, not from the start.

        Args:
            numbers: Numbers of frames in order of time, from 0.

        Yields:
            uint8 ``(height, width, 3)``, rotated for display; transparent pixels are blended with white.

        Raises:
            SampleError: a frame is damaged or missing, or is rotated by no multiple of 90 degrees.
        """
        wanted = {self._pts[number]: number for number in numbers}
        ranges = self._ranges(numbers)
        with self._faults():
            for i, (start, stop) in enumerate(ranges):
                following = min(ranges[i + 1][0] if i + 1 < len(ranges) else len(self._packets), stop + _MOST_DELAY)
                inside = {packet.pts for packet in self._packets[start:stop]} & wanted.keys()
                for frame in self._frames(start, following, wanted.keys()):
                    if frame.pts in inside:
                        inside.remove(frame.pts)
                        yield wanted.pop(frame.pts), self._pixels(frame)
                    if not inside:
                        break
                self._context.flush_buffers()
        if wanted:
            raise self.fault(f"the decoder returns no frame {min(wanted.values())}")

    def _frames(self, start: int, stop: int, wanted: Container[int]) -> Iterator[Any]:
        """Yield frames of a range of packets; the decoder may need packets after the one of a frame.

        Frames that are not wanted are left out if no other frame refers to them, which saves their decoding.
        """
        for packet in self._packets[start:stop]:
            self._context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from self._context.decode(packet)
        yield from self._context.decode(None)

    def _pixels(self, frame: Any) -> npt.NDArray[np.uint8]:
        """Return RGB pixels of a frame as it is displayed."""
        if frame.is_corrupt:
            raise self.fault(f"the frame at {float(frame.time or 0):.2f} s is corrupt")
        turns, rest = divmod(frame.rotation, 90)
        if rest:
            raise SampleError(
                f"a video rotated by {frame.rotation} degrees; expected a multiple of 90", kind=FaultKind.DECODE
            )
        has_alpha = any(component.is_alpha for component in frame.format.components)
        # One reformatter for all frames, in this thread: another for each frame would take longer than the conversion.
        converted = self._reformatter.reformat(frame, format="rgba" if has_alpha else "rgb24", threads=1)
        pixels: npt.NDArray[np.uint8] = converted.to_ndarray()
        if has_alpha:
            colors = pixels.astype(np.uint16)
            alpha = colors[..., 3:]
            # (x + 127) // 255 rounds to nearest. The sum does not overflow 16 bits: 255 * 255 + 127 < 65536.
            pixels = ((colors[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        # ffmpeg's angle is counterclockwise, as that of numpy.
        return np.ascontiguousarray(np.rot90(pixels, int(turns)))
