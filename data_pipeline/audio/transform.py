"""Convert a sound to chunks of log-mel frames: decode, mix, resample, cut into chunks, and transform.

    AudioSize --AudioTransform.dry_run--> items (frames of each chunk), without values
    bytes --AudioTransform.decode_task, decode--> the same items with values

The number of frames depends on the index alone, so a document is planned without decoding, as with images and videos.
Nothing is random: the same sound gives the same items in every epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from data_pipeline.audio.log_mel import log_mel
from data_pipeline.document import MediaItem
from data_pipeline.errors import DataConfigError, FaultKind, SampleError
from data_pipeline.media_spec import AudioSpec, MediaSpec, reduced
from data_pipeline.modality import ModalityConfig, ModalityInputs
from data_pipeline.sample import AudioPart, AudioSize, MediaPart, StoredFrames, VideoPart
from data_pipeline.shards.audio_file import MAX_CHANNELS, MAX_RATE, AudioFile, audio_size, track_size
from data_pipeline.shards.av_file import load_av

if TYPE_CHECKING:
    from data_pipeline.text.tokenizer import Tokenizer

_CLIPPED = 0.999
"""Magnitude from which a sample counts as clipped; the largest of 16 bits is 0.99997."""
_TAIL_SECONDS, _TAIL_SAMPLES = 0.05, 64
"""Least silence after a sound, so that the resampler returns every sample of it; its filter is shorter."""


class AudioConfig(ModalityConfig):
    """How a sound becomes log-mel frames and tokens. The model determines bins, rate and length of the chunks."""

    min_seconds: float = Field(default=0.05, ge=0, le=1e5)
    """A shorter sound is a bad sample; 0 to 1e5 seconds. So is one that is too short for a feature of the model."""
    max_seconds: float = Field(default=600.0, gt=0, le=1e5)
    """A longer sound is a bad sample, found before decoding; above 0, at least ``min_seconds``, at most 1e5 seconds."""
    min_rate: int = Field(default=4000, ge=1, le=MAX_RATE)
    """Lowest sampling rate of a stored sound, 1 to 768000 Hz. A lower one is a bad sample."""
    max_rate: int = Field(default=192_000, ge=1, le=MAX_RATE)
    """Highest sampling rate of a stored sound, from ``min_rate`` to 768000 Hz. A higher one is a bad sample."""
    max_channels: int = Field(default=8, ge=1, le=MAX_CHANNELS)
    """Largest number of channels of a stored sound, 1 to 64. More are a bad sample. Channels are averaged."""
    silence: Literal["allow", "reject"] = "allow"
    """``reject``: a silent sound is a bad sample."""
    silence_peak: float = Field(default=1e-4, ge=0, le=1)
    """A sound is silent if no sample of the averaged channels exceeds this share of full scale, 0 to 1 (1e-4: -80
    dB)."""
    max_clipped: float = Field(default=1.0, ge=0, le=1)
    """Largest share of samples at full scale, 0 to 1. A sound with more is a bad sample. 1 allows all."""
    from_video: bool = False
    """Whether the sound track of a video is read too, directly after the video's frames. A video without one gives its
    frames alone."""
    interleave_seconds: float | None = Field(default=None, gt=0, le=1e4)
    """Length of the turns in which the frames of a video and its sound track alternate, above 0 to 1e4 seconds
    (Qwen2.5-Omni: 2). Requires ``from_video``, and a model that makes ``decoder.rope.tokens_per_second`` features of a
    second of sound. null: the sound follows all frames."""
    start: str | None = None
    """Token before each sound: ``<|audio_bos|>`` (Qwen2-Audio). null for none."""
    end: str | None = None
    """Token after each sound: ``<|audio_eos|>``. null for none."""
    placeholder: str | None = None
    """Token that stands for each feature: ``<|AUDIO|>``. null for the tokenizer's image token."""

    @model_validator(mode="after")
    def _ordered(self) -> AudioConfig:
        for least, most in (("min_seconds", "max_seconds"), ("min_rate", "max_rate")):
            if getattr(self, most) < getattr(self, least):
                raise ValueError(f"{most}={getattr(self, most):g} is below {least}={getattr(self, least):g}")
        if self.interleave_seconds is not None and not self.from_video:
            raise ValueError("interleave_seconds: applies to sound tracks of videos; set from_video: true")
        return self

    def inputs(self, tokenizer: Tokenizer, spec: MediaSpec) -> Audios:
        """Return the sounds of a data set for a model of ``spec``, which takes sound.

        Raises:
            DataConfigError: as ``Audios``.
        """
        assert spec.audio is not None, "the builder asks for modalities of the model only"
        if self.interleave_seconds is not None and self.interleave_seconds * (spec.tokens_per_second or 0) < 1:
            raise DataConfigError(
                f"data.audio.interleave_seconds={self.interleave_seconds:g}: needs a model with at least one time "
                "position in these seconds (decoder.rope.tokens_per_second); leave it out"
            )
        features = spec.audio.features_per_second
        if self.interleave_seconds is not None and spec.tokens_per_second != features:
            raise DataConfigError(
                f"data.audio.interleave_seconds={self.interleave_seconds:g}: the model has {spec.tokens_per_second:g} "
                f"time positions a second (decoder.rope.tokens_per_second) and {features:g} features of sound, one "
                "position each, so a turn of the sound would not last as long as one of the frames; leave it out"
            )
        return Audios(self, tokenizer, spec.audio)


class AudioTransform:
    """Converts the encoded sounds of one data set to items.

    Args:
        config: The sounds of the data set.
        spec: Requirements of the model.
    """

    def __init__(self, config: AudioConfig, spec: AudioSpec) -> None:
        self.config = config
        self.spec = spec

    def decode_task(self, part: AudioPart) -> AudioTask:
        """Plan a sound, and return a task that decodes it later.

        Raises:
            SampleError: as ``dry_run``; without a size from the index, also if the file is damaged.
        """
        size = audio_size(part.data) if part.size is None else part.size
        items = tuple(self._item(np.empty((rows, self.spec.num_bins), np.float32)) for rows in self._plan(size))
        return AudioTask(self, part.data, size, items)

    def dry_run(self, size: AudioSize) -> tuple[MediaItem, ...]:
        """Return the items of a sound of this size with constant values, which take no memory.

        Raises:
            SampleError: the size is unknown (0), or the sound is too short or too long, or has an impossible rate or
                number of channels.
        """
        zero = np.float32(0)
        return tuple(self._item(np.broadcast_to(zero, (rows, self.spec.num_bins))) for rows in self._plan(size))

    def num_samples(self, size: AudioSize) -> int:
        """Return the number of samples at the model's rate: the least that last as long as the sound."""
        return -(-size.samples * self.spec.sample_rate // size.rate)

    def _plan(self, size: AudioSize) -> list[int]:
        """Return the number of rows of each chunk. A rest that is too short for a feature is left out."""
        config, spec = self.config, self.spec
        if size.samples < 1 or size.rate < 1:
            raise SampleError(
                "the index has no length for this sound: the file is damaged, or the index is old; then build it again "
                "with: mmscale data index",
                kind=FaultKind.DECODE,
            )
        if not config.min_rate <= size.rate <= config.max_rate:
            raise SampleError(
                f"a sound of {size.rate} Hz, the limits are {config.min_rate} and {config.max_rate} Hz "
                "(audio.min_rate, audio.max_rate)",
                kind=FaultKind.DECODE,
            )
        if size.channels > config.max_channels:
            raise SampleError(
                f"a sound of {size.channels} channels, the limit is {config.max_channels} (audio.max_channels)",
                kind=FaultKind.DECODE,
            )
        seconds = size.samples / size.rate
        if not config.min_seconds <= seconds <= config.max_seconds:
            raise SampleError(
                f"a sound of {seconds:.6g} s, the limits are {config.min_seconds:g} and {config.max_seconds:g} s "
                "(audio.min_seconds, audio.max_seconds)",
                kind=FaultKind.DECODE,
            )
        whole, rest = divmod(-(-self.num_samples(size) // spec.hop), spec.max_frames)
        chunks = [spec.max_frames + spec.extra_frames] * whole
        if rest and reduced(rest, spec.reductions) > 0:
            chunks.append(spec.max_frames if spec.padded else rest + spec.extra_frames)
        if not chunks:
            raise SampleError(
                f"a sound of {seconds:.6g} s gives {rest} mel frames, of which the model makes no feature",
                kind=FaultKind.DECODE,
            )
        return chunks

    @staticmethod
    def _item(values: npt.NDArray[np.float32]) -> MediaItem:
        return MediaItem(values, (len(values), 1, 1), embedded=True, modality="audio")


@dataclass(frozen=True)
class AudioTask:
    """A planned sound that is not decoded yet.

    Attributes:
        transform: The transform that planned it.
        data: The encoded sound, or the video whose sound track it is.
        size: The size that the plan is for.
        items: Its chunks, with uninitialised values until ``decode`` has run.
    """

    transform: AudioTransform
    data: bytes
    size: AudioSize
    items: tuple[MediaItem, ...]

    @property
    def crops(self) -> tuple[MediaItem, ...]:
        """The chunks of the sound."""
        return self.items

    def decode(self) -> None:
        """Decode the sound and write the values of its chunks. Call it once, from any thread.

        Memory is bounded by one chunk of samples, one decoded block, the items, and a copy of the encoded sound.

        Raises:
            SampleError: the file is damaged, silent, or clipped, or its size is not the planned one.
        """
        spec = self.transform.spec
        chunk_samples = spec.max_frames * spec.hop
        left = self.transform.num_samples(self.size)
        items = iter(self.items)
        with AudioFile(self.data) as file:
            self._check(AudioSize(self.size.samples, file.rate, file.channels))
            for chunk in _chunks(self._resampled(file), chunk_samples):
                heard = chunk[:left]
                left -= len(heard)
                item = next(items, None)
                if item is not None:  # None: the silence after the sound, or a rest without a feature.
                    log_mel(
                        heard,
                        num_bins=spec.num_bins,
                        sample_rate=spec.sample_rate,
                        window=spec.window,
                        hop=spec.hop,
                        max_frames=spec.max_frames,
                        out=item.values,
                    )
        assert left == 0, "the silence after a sound is longer than the filter of the resampler"

    def _resampled(self, file: AudioFile) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the mixed sound at the model's rate, then some silence. Checks its length and level at the end."""
        rate = self.transform.spec.sample_rate
        tail = np.zeros(max(_TAIL_SAMPLES, round(_TAIL_SECONDS * self.size.rate)), np.float32)
        if self.size.rate == rate:
            yield from self._mixed(file)
            yield tail
            return
        av = load_av()
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)

        def frame_of(samples: npt.NDArray[np.float32]) -> object:
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.sample_rate = self.size.rate
            return frame

        for block in self._mixed(file):
            yield from (each.to_ndarray()[0] for each in resampler.resample(frame_of(block)))
        for last in (frame_of(tail), None):
            yield from (each.to_ndarray()[0] for each in resampler.resample(last))

    def _mixed(self, file: AudioFile) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the mean of the channels."""
        config = self.transform.config
        total, num_clipped, peak = 0, 0, 0.0
        for block in file.blocks():
            total += block.shape[1]
            if total > self.size.samples:
                break
            if config.max_clipped < 1:
                num_clipped += int(np.count_nonzero(np.abs(block) >= _CLIPPED))
            mixed = np.full(len(block), 1 / len(block), np.float32) @ block
            if config.silence == "reject":
                peak = max(peak, float(np.abs(mixed).max()))
            yield mixed
        self._check(AudioSize(total, file.rate, file.channels))
        if config.silence == "reject" and peak <= config.silence_peak:
            raise SampleError(
                f"a silent sound: its largest sample is {peak:.3g} of full scale (audio.silence_peak="
                f"{config.silence_peak:g}); audio.silence=allow accepts it",
                kind=FaultKind.DECODE,
            )
        share = num_clipped / (total * file.channels)
        if share > config.max_clipped:
            raise SampleError(
                f"a clipped sound: {share:.3g} of its samples are at full scale, the limit is {config.max_clipped:g} "
                "(audio.max_clipped)",
                kind=FaultKind.DECODE,
            )

    def _check(self, found: AudioSize) -> None:
        if found != self.size:
            more = "more than " if found.samples > self.size.samples else ""
            raise SampleError(
                f"a sound with {more}{_words(found)}, the index says {_words(self.size)}; if the index is old, build "
                "it again with: mmscale data index",
                kind=FaultKind.DECODE,
            )


def _words(size: AudioSize) -> str:
    return f"{size.samples} samples at {size.rate} Hz in {size.channels} channels"


def _chunks(blocks: Iterator[npt.NDArray[np.float32]], length: int) -> Iterator[npt.NDArray[np.float32]]:
    """Join blocks and yield chunks of ``length`` samples, the last of which may be shorter."""
    waiting, num_waiting = list[npt.NDArray[np.float32]](), 0
    for block in blocks:
        waiting.append(block)
        num_waiting += len(block)
        while num_waiting >= length:
            joined = np.concatenate(waiting)
            yield joined[:length]
            waiting, num_waiting = [joined[length:]], num_waiting - length
    if num_waiting:
        yield np.concatenate(waiting)


class Audios(ModalityInputs):
    """The sounds of a data set: their transform, and their tokens with ids instead of names.

    Raises:
        DataConfigError: the tokenizer lacks a token, or start or end is the placeholder.
    """

    part_type: ClassVar[type[MediaPart]] = AudioPart

    def __init__(self, config: AudioConfig, tokenizer: Tokenizer, spec: AudioSpec) -> None:
        self.transform = AudioTransform(config, spec)
        names = {key: getattr(config, key) for key in ("start", "end", "placeholder")}
        ids = {key: tokenizer.special_id(name, f"data.audio.{key}") for key, name in names.items() if name is not None}
        self.placeholder = ids.get("placeholder", tokenizer.image_id)
        self.start, self.end = (((ids[key],) if key in ids else ()) for key in ("start", "end"))
        if self.placeholder < 0:
            raise DataConfigError("data.audio.placeholder: null, and data.tokenizer.image_token is null too; name one")
        if {self.placeholder, tokenizer.image_id} & {*self.start, *self.end}:
            raise DataConfigError("data.audio: start and end must differ from the tokens that stand for features")
        self.reserved = {names[key]: token for key, token in ids.items() if token != tokenizer.image_id}
        self.reads_tracks, self.interleave_seconds = config.from_video, config.interleave_seconds

    def track_of(self, video: VideoPart) -> AudioPart | None:
        """Return the sound track of a video if ``from_video`` is set; None if it has none, as one stored as images.

        Without a size from the index, the track is decoded once to count its samples.

        Raises:
            SampleError: the shards hold only the token ids of the video, not the track that it may have had.
        """
        if not self.reads_tracks or isinstance(video.data, StoredFrames):
            return None
        if video.grid is not None and not video.data and video.size is None:
            raise SampleError(
                f"the video {video.name} is stored as tokens alone, so its sound track cannot be read; encode the data "
                "set again without --grids-only, or set audio.from_video to false",
                kind=FaultKind.DECODE,
            )
        size = track_size(video.data) if video.sound is None else video.sound
        return None if size.rate == 0 else AudioPart(video.data, video.name, size)

    def dry_run(self, part: MediaPart) -> tuple[MediaItem, ...]:
        """Return the items of a sound without decoding it; without a size from the index, it is decoded once.

        Raises:
            SampleError: as ``AudioTransform.dry_run``.
        """
        assert isinstance(part, AudioPart), "part_type"
        return self.transform.dry_run(part.size or audio_size(part.data))

    def decode_task(self, part: MediaPart) -> AudioTask:
        """Plan a sound, as ``AudioTransform.decode_task``."""
        assert isinstance(part, AudioPart), "part_type"
        return self.transform.decode_task(part)
