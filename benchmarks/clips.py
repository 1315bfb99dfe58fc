"""Decoding of videos and sounds without a loader: ``python -m benchmarks.clips --json``.

Videos become frames of 224 px, sounds become the log-mel frames of Whisper, each on one thread. The peers are
torchcodec, the loader of transformers, and Energon's decoder, with torchvision's resize and transformers' feature
extractor behind them. Ours also cuts the frames into patches, and knows the sizes from the index. torchcodec needs
FFmpeg's libraries and the version for this torch (``pip install torchcodec``); without it the benchmark says so and
leaves it out.
"""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms.v2 import InterpolationMode, functional

from benchmarks.peers.job import photo
from benchmarks.report import Case, main
from data_pipeline.audio.transform import AudioConfig, AudioTransform
from data_pipeline.images.decode import decode_image
from data_pipeline.images.frame_choice import UniformChoice
from data_pipeline.images.video import VideoConfig, VideoTransform
from data_pipeline.media_spec import AudioSpec, MediaSpec, Placement
from data_pipeline.sample import AudioPart, AudioSize, VideoPart, VideoSize

SIDE, SECONDS, RATE, REPEATS = 224, 10, 30, 5
FEW, MANY = 16, 80
"""Frames used of a video: a share of them, where seeking helps, and more frames than it has key frames."""
SOUND_RATE, AUDIO_RATES = 16000, {"flac": 44100, "opus": 48000}
Side = Callable[[], object]


def video() -> bytes:
    """Return an H.264 video of 320x240 pixels: a window that moves over a photograph, with a key frame a second."""
    scene = decode_image(photo(0, 480, 640), max_pixels=1 << 20)
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"g": str(RATE), "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for number in range(SECONDS * RATE):
            left, top = (round(160 + 159 * wave(number / 40)) for wave in (math.sin, math.cos))
            frame = np.ascontiguousarray(scene[top * 3 // 4 :][:240, left : left + 320])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


def sound(kind: str) -> bytes:
    """Return an encoded stereo sound of noise under a slow envelope; ``kind``: ``flac`` or ``opus``."""
    codec, container_format = {"flac": ("flac", "flac"), "opus": ("libopus", "ogg")}[kind]
    rate = AUDIO_RATES[kind]
    noise = np.random.default_rng(0).normal(0, 0.1, (2, SECONDS * rate)) * np.sin(np.arange(SECONDS * rate) / rate) ** 2
    out = io.BytesIO()
    with av.open(out, "w", format=container_format) as container:
        stream: Any = container.add_stream(codec, rate=rate, layout="stereo")
        samples = (noise * 32767).clip(-32768, 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples.T.reshape(1, -1)), format="s16", layout="stereo"
        )
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def _resized(frames: torch.Tensor) -> torch.Tensor:
    return functional.resize(frames, [SIDE, SIDE], interpolation=InterpolationMode.BICUBIC, antialias=True)


def _frame_numbers(count: int) -> list[int]:
    return [int(n) for n in torch.linspace(0, SECONDS * RATE - 1, count).round()]


def our_frames(data: bytes, count: int) -> npt.NDArray[np.uint8]:
    """Ours: patches of the frames."""
    choice = UniformChoice(num_frames=count)
    config = VideoConfig(frames=choice, min_pixels=SIDE * SIDE, max_pixels=SIDE * SIDE)
    spec = MediaSpec(Placement.EMBEDDING, fixed_grid=(SIDE // 14, SIDE // 14))
    task = VideoTransform(config, spec).decode_task(
        VideoPart(data, "mp4", VideoSize(SECONDS * RATE, SECONDS * 1_000_000, 240, 320))
    )
    task.decode()
    return task.crops[0].values


def energon_frames(data: bytes, count: int) -> torch.Tensor:
    """Energon's decoder, which seeks to each range of frames."""
    from megatron.energon.av import AVDecoder

    decoder = AVDecoder(io.BytesIO(data), suppress_warnings=True)
    clips, _ = decoder.get_video_clips([(n, n) for n in _frame_numbers(count)], "frames")
    return _resized(torch.cat([clip[:1] for clip in clips]))


def transformers_frames(data: bytes, count: int) -> torch.Tensor:
    """transformers' loader with PyAV, which decodes from the start."""
    from transformers.video_utils import read_video_pyav

    frames, _ = read_video_pyav(io.BytesIO(data), lambda metadata, **_: _frame_numbers(count))  # type: ignore[arg-type]
    return _resized(torch.from_numpy(frames).permute(0, 3, 1, 2))


def torchcodec_frames(data: bytes, count: int) -> torch.Tensor:
    """torchcodec."""
    from torchcodec.decoders import VideoDecoder

    return _resized(VideoDecoder(data, num_ffmpeg_threads=1).get_frames_at(_frame_numbers(count)).data)


def our_mel(data: bytes, kind: str) -> npt.NDArray[np.float32]:
    """Ours: log-mel frames of the clip's own length."""
    rate = AUDIO_RATES[kind]
    part = AudioPart(data, kind, AudioSize(SECONDS * rate, rate, 2))
    task = AudioTransform(AudioConfig(), AudioSpec(num_bins=128)).decode_task(part)
    task.decode()
    return task.crops[0].values


@cache
def _extractor() -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=128)


def _features(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    found = _extractor()(samples, sampling_rate=SOUND_RATE, padding="longest", return_tensors="np")
    features: npt.NDArray[np.float32] = found["input_features"]
    return features


def pyav_mel(data: bytes) -> npt.NDArray[np.float32]:
    """PyAV's resampler, and transformers' feature extractor without padding to 30 seconds."""
    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=SOUND_RATE)
    with av.open(io.BytesIO(data), "r") as container:
        frames = [each for frame in container.decode(audio=0) for each in resampler.resample(frame)]
    frames += resampler.resample(None)
    return _features(np.concatenate([frame.to_ndarray().mean(0) for frame in frames]))


def torchcodec_mel(data: bytes) -> npt.NDArray[np.float32]:
    """torchcodec's decoder and resampler, and transformers' feature extractor without padding to 30 seconds."""
    from torchcodec.decoders import AudioDecoder

    samples = AudioDecoder(data, sample_rate=SOUND_RATE, num_channels=1).get_all_samples().data
    return _features(samples[0].numpy())


def _has_torchcodec() -> bool:
    try:
        import torchcodec.decoders  # noqa: F401  (loads FFmpeg's libraries)
    except (ImportError, OSError, RuntimeError):
        print("torchcodec is left out: it is not installed for this torch, or finds no FFmpeg", file=sys.stderr)
        return False
    return True


def _case(name: str, sides: Mapping[str, Side], amount: float, unit: str) -> Case:
    """Return a case of rates in ``amount`` per second of CPU time; all take turns, and the fastest turn counts."""
    best = dict.fromkeys(sides, math.inf)
    for turn in range(REPEATS + 1):  # The first turn imports and warms up.
        for side, work in sides.items():
            start = time.process_time()
            work()
            if turn:
                best[side] = min(best[side], time.process_time() - start)
    return Case.from_sides(
        name, {side: amount / seconds for side, seconds in best.items()}, unit, lower_is_better=False
    )


def measure() -> Sequence[Case]:
    """Return the rates of videos and sounds."""
    torch.set_num_threads(1)
    with_torchcodec, data = _has_torchcodec(), video()
    cases = []
    for count in (FEW, MANY):
        readers: dict[str, Any] = {
            "ours": our_frames,
            "energon": energon_frames,
            "transformers": transformers_frames,
            **({"torchcodec": torchcodec_frames} if with_torchcodec else {}),
        }
        sides = {name: partial(reader, data, count) for name, reader in readers.items()}
        name = f"H.264 {SECONDS} s, {count} frames to {SIDE} px"
        cases.append(_case(name, sides, count, "frames/core-s"))
    for kind, rate in AUDIO_RATES.items():
        encoded = sound(kind)
        hearing: dict[str, Side] = {
            "ours": partial(our_mel, encoded, kind),
            "PyAV, transformers": partial(pyav_mel, encoded),
        }
        if with_torchcodec:
            hearing["torchcodec, transformers"] = partial(torchcodec_mel, encoded)
        cases.append(_case(f"{kind} {rate} Hz, stereo, to log-mel", hearing, SECONDS, "s/core-s"))
    return cases


if __name__ == "__main__":
    main("clips", measure)
