"""A sample as it is stored in a shard: text, images, videos and sounds in reading order, with its origin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from data_pipeline.io.json_member import spoken_texts


@dataclass(frozen=True)
class Provenance:
    """Origin of a sample.

    Attributes:
        dataset: Name of its data set.
        shard: Path or URL of its tar.
        key: Its key in the tar.
        index: Its number in the data set, from 0; in a manifest the order of the shards and their samples.
        epoch: Epoch of the data set in which it was read, from 0.
    """

    dataset: str
    shard: str
    key: str
    index: int
    epoch: int = 0


@dataclass(frozen=True)
class TextPart:
    """A piece of text. ``weight`` is the loss weight of its tokens where the template learns it."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class ImagePart:
    """An encoded image (JPEG, PNG or WebP bytes), as stored.

    Attributes:
        data: The encoded bytes; empty if the sample was read without images, for a dry run.
        name: Extension part of the member's name, ``jpg`` or ``0.png``.
        size: Height and width after the EXIF rotation, from the shard's index; None if no index gives it.
        grid: The image as token ids, as ``shards.token_grid`` stores it; None if the sample has none. ``data`` is empty
            if the shards hold only the token ids.
    """

    kind: ClassVar[str] = "image"

    data: bytes
    name: str
    size: tuple[int, int] | None = None
    grid: bytes | None = None

    def __repr__(self) -> str:
        return f"ImagePart(data=<{len(self.data)} bytes>, name={self.name!r}, size={self.size})"


class VideoSize(NamedTuple):
    """The properties of a video that determine how many frames of which size a document has.

    Attributes:
        num_frames: Number of frames; 0 if the file is damaged.
        microseconds: Time from the start of the first frame to the end of the last.
        height, width: Size in pixels after the rotation for display.
    """

    num_frames: int
    microseconds: int
    height: int
    width: int


class AudioSize(NamedTuple):
    """The properties of a sound that determine how many features a document has.

    Attributes:
        samples: Decoded samples of each channel, at the file's own rate; 0 if the file is damaged.
        rate: Samples of a second, Hz.
        channels: Number of channels.
    """

    samples: int
    rate: int
    channels: int


@dataclass(frozen=True)
class StoredFrames:
    """A video that is stored as images, one for each frame.

    Attributes:
        images: The encoded frames in order; each empty if the sample was read without media, for a dry run.
        per_second: Frames for each second, above 0.
    """

    images: tuple[bytes, ...]
    per_second: float

    def __len__(self) -> int:
        return sum(map(len, self.images))

    @property
    def microseconds(self) -> int:
        """Time from the start of the first frame to the end of the last."""
        return round(len(self.images) / self.per_second * 1_000_000)


@dataclass(frozen=True)
class VideoPart:
    """An encoded video (MP4, WebM, Matroska or GIF bytes), as stored, or its encoded frames.

    Attributes:
        data: The encoded bytes; empty if the sample was read without media, for a dry run.
        name: Extension part of the member's name, ``mp4`` or ``0.webm``; of the first frame if it is stored as images.
        size: From the shard's index; None if no index gives it.
        sound: Size of its sound track, from the index: (0, 0, 0) if it has none, 0 samples at another rate if the track
            is damaged; None if no index gives it.
        grid: The video as token ids, as ``shards.token_grid`` stores it; None if the sample has none. ``data`` is empty
            if the shards hold only the token ids.
    """

    kind: ClassVar[str] = "video"

    data: bytes | StoredFrames
    name: str
    size: VideoSize | None = None
    sound: AudioSize | None = None
    grid: bytes | None = None

    def __repr__(self) -> str:
        return f"VideoPart(data=<{len(self.data)} bytes>, name={self.name!r}, size={self.size})"


@dataclass(frozen=True)
class AudioPart:
    """An encoded sound (WAV, FLAC, MP3, Ogg or M4A bytes), as stored.

    Attributes:
        data: The encoded bytes; empty if the sample was read without media, for a dry run. The sound track of a video
            has the bytes of the video.
        name: Extension part of the member's name, ``wav`` or ``0.flac``.
        size: From the shard's index; None if no index gives it.
    """

    kind: ClassVar[str] = "audio"

    data: bytes
    name: str
    size: AudioSize | None = None

    def __repr__(self) -> str:
        return f"AudioPart(data=<{len(self.data)} bytes>, name={self.name!r}, size={self.size})"


MediaPart = ImagePart | VideoPart | AudioPart
Part = TextPart | MediaPart


@dataclass(frozen=True)
class Sample:
    """One decoded tar sample: its parts in reading order plus the fields of its JSON member."""

    parts: tuple[Part, ...]
    fields: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance = Provenance("?", "?", "?", -1)

    @property
    def texts(self) -> list[str]:
        """Every distinct text that a template may use: text parts, further captions, dialogues and annotations."""
        captions = self.fields.get("captions")
        further = [text for text in captions if isinstance(text, str)] if isinstance(captions, list) else []
        further += [text for text in spoken_texts(self.fields) if isinstance(text, str)]
        return list(dict.fromkeys([part.text for part in self.parts if isinstance(part, TextPart)] + further))
