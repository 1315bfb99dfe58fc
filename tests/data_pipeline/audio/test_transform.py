"""Sounds: formats, rates, chunks and limits against PyAV and transformers; damaged and hostile files."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from data_pipeline.audio.transform import AudioConfig, AudioTransform
from data_pipeline.errors import DataConfigError, FaultKind, SampleError
from data_pipeline.media_spec import AudioSpec
from data_pipeline.sample import AudioPart, AudioSize
from data_pipeline.shards.audio_file import AudioFile, audio_size, track_size
from tests.sounds import encoded, tones
from tests.videos import encoded as encoded_video

QWEN2 = {"reductions": ((3, 1, 1), (3, 2, 1), (2, 2, 0)), "num_bins": 80}
SPEC = AudioSpec(padded=False, extra_frames=2, **QWEN2)
KINDS = ["wav", "flac", "mp3", "opus", "ogg", "m4a"]
RATES = {"opus": 48000, "ogg": 48000}
"""Opus always decodes to 48 kHz."""


def _items(data: bytes, spec: AudioSpec = SPEC, size: AudioSize | None = None, **config: Any) -> list[Any]:
    task = AudioTransform(AudioConfig.model_validate(config), spec).decode_task(AudioPart(data, "wav", size))
    task.decode()
    return list(task.crops)


def _expected(samples: np.ndarray, seconds: int = 30) -> np.ndarray:
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=seconds)
    return np.asarray(extractor(samples, sampling_rate=16000, return_tensors="np").input_features[0].T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (24000, 2)])
def test_every_format_gives_the_sound_that_was_encoded(kind: str, rate: int, channels: int) -> None:
    samples = rate // 2 + 17
    data = encoded(samples, kind=kind, rate=rate, channels=channels)
    size = audio_size(data)
    ratio = RATES.get(kind, rate) / rate
    assert (size.rate, size.channels) == (RATES.get(kind, rate), channels)
    # AAC has no length but that of its blocks; Opus is resampled.
    assert 0 <= size.samples - samples * ratio < {"m4a": 1024, "opus": 80, "ogg": 80}.get(kind, 1)
    (item,) = _items(data, size=size)
    # The tones are formulas, so they can be sampled at any rate.
    expected = _expected(tones(16000 * samples // rate, 16000, channels).mean(axis=0))
    loud = expected[5:45] > expected.max() - 0.7  # Within 28 dB of the loudest value.
    difference = np.abs(item.values[5:45] - expected[5:45])[loud]
    assert loud.sum() > 100
    assert difference.max() < {"wav": 2e-3, "flac": 2e-3}.get(kind, 0.15)


@pytest.mark.parametrize("codec", ["pcm_u8", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le"])
def test_every_sample_type_has_the_same_scale(codec: str) -> None:
    samples = tones(700, 16000, 2)
    with AudioFile(encoded(samples, codec=codec)) as file:
        found = np.concatenate(list(file.blocks()), axis=1)
    np.testing.assert_allclose(found, samples, rtol=0, atol=1 / 128 if codec == "pcm_u8" else 1e-6)


def test_a_chunk_is_the_extractors_clip_and_a_rest_without_a_feature_is_left_out() -> None:
    samples = tones(16000 * 2 + 9000, 16000)
    wave = encoded(samples, codec="pcm_f32le")
    for padded in (False, True):
        spec = AudioSpec(padded=padded, extra_frames=0 if padded else 2, max_frames=100, **QWEN2)
        items = _items(wave, spec)
        rows = [100, 100, 100] if padded else [102, 102, 57 + 2]
        assert [item.grid for item in items] == [(n, 1, 1) for n in rows]
        assert [spec.num_features(item.grid) for item in items] == [25, 25, 25 if padded else 14]
        for number, item in enumerate(items):
            expected = _expected(samples[0, 16000 * number :][:16000], seconds=1)
            shared = min(len(item.values), 100)
            np.testing.assert_allclose(item.values[:shared], expected[:shared], rtol=0, atol=1e-6)
    # 320 samples more are two frames, of which no feature is made.
    spec = AudioSpec(padded=False, extra_frames=2, max_frames=100, **QWEN2)
    assert [len(item.values) for item in _items(encoded(16320), spec)] == [102]
    assert [len(item.values) for item in _items(encoded(16321), spec)] == [102, 5]


@given(
    samples=st.integers(1, 300_000),
    rate=st.sampled_from([4000, 8000, 11025, 16000, 22050, 44100, 48000, 96000]),
    padded=st.booleans(),
)
def test_the_plan_is_a_pure_function_of_the_size(samples: int, rate: int, padded: bool) -> None:
    spec = AudioSpec(padded=padded, extra_frames=0 if padded else 2, max_frames=300, **QWEN2)
    transform = AudioTransform(AudioConfig(min_seconds=0, max_seconds=60), spec)
    size = AudioSize(samples, rate, 1)
    if samples / rate > 60 or -(-samples * 16000 // rate) <= 320:
        with pytest.raises(SampleError):
            transform.dry_run(size)
        return
    items = transform.dry_run(size)
    frames = sum(len(item.values) - spec.extra_frames for item in items)
    heard = -(-samples * 16000 // rate) / 160
    assert frames == 300 * len(items) if padded else heard - 3 < frames < heard + 1
    assert all(spec.num_features(item.grid) >= 1 for item in items)


def test_rare_lengths_and_rates_keep_every_sample() -> None:
    """The resampler's own end would lose up to 16 samples of short sounds."""
    spec = AudioSpec(padded=False, num_bins=80)
    for rate in (20, 4000, 11025, 44100, 192_000):
        for samples in (max(1, rate // 100), rate // 10 + 1):
            loud_end = np.zeros((1, samples), np.float32)
            loud_end[:, -max(1, rate // 2000) :] = 0.5
            (item,) = _items(encoded(loud_end, rate=rate, codec="pcm_f32le"), spec, min_seconds=0, min_rate=1)
            assert len(item.values) == math.ceil(math.ceil(samples * 16000 / rate) / 160)
            assert item.values[-1].max() > 0.5


def test_a_window_without_a_middle_is_rejected() -> None:
    with pytest.raises(DataConfigError, match="window=401: must be even"):
        AudioSpec(window=401)


@pytest.mark.fault
def test_limits_hold_before_decoding() -> None:
    transform = AudioTransform(AudioConfig(max_seconds=2, max_rate=48000, min_rate=8000, max_channels=2), SPEC)
    for size, words in {
        AudioSize(0, 0, 0): "no length for this sound",
        AudioSize(100, 16000, 1): "a sound of 0.00625 s, the limits are 0.05 and 2 s",
        AudioSize(1 << 62, 16000, 1): "a sound of 2.88",
        AudioSize(9000, 96000, 1): "a sound of 96000 Hz, the limits are 8000 and 48000 Hz",
        AudioSize(9000, 4000, 1): "a sound of 4000 Hz",
        AudioSize(9000, 16000, 6): "a sound of 6 channels, the limit is 2",
    }.items():
        with pytest.raises(SampleError, match=words) as raised:
            transform.dry_run(size)
        assert raised.value.kind is FaultKind.DECODE
    with pytest.raises(SampleError, match="gives 2 mel frames, of which the model makes no feature"):
        AudioTransform(AudioConfig(min_seconds=0), SPEC).dry_run(AudioSize(320, 16000, 1))


@pytest.mark.fault
def test_silence_and_clipping_are_faults_where_the_configuration_says_so() -> None:
    silent = encoded(np.full((1, 4000), 5e-5, np.float32), codec="pcm_f32le")
    assert len(_items(silent)) == 1
    with pytest.raises(SampleError, match="a silent sound: its largest sample is 5e-05"):
        _items(silent, silence="reject")
    assert _items(silent, silence="reject", silence_peak=1e-5)
    # Opposite channels cancel when they are averaged, so the model would hear silence.
    opposite = np.concatenate([tones(4000, 16000), -tones(4000, 16000)])
    with pytest.raises(SampleError, match="a silent sound"):
        _items(encoded(opposite, codec="pcm_f32le"), silence="reject")
    clipped = encoded(np.clip(5 * tones(4000, 16000), -1, 1))
    assert _items(clipped)
    with pytest.raises(SampleError, match=r"a clipped sound: 0\.[0-9]+ of its samples are at full scale"):
        _items(clipped, max_clipped=0.01)
    assert _items(encoded(4000), max_clipped=0.0)


def _wav(rate: int, channels: int, declared: int, data: bytes = b"\0\1" * 400, block: int = 0) -> bytes:
    """Return a WAV file of 16 bits, whose header may be wrong."""
    block = block or 2 * channels & 0xFFFF
    head = struct.pack("<HHIIHH", 1, channels & 0xFFFF, rate, rate * block & 0xFFFFFFFF, block, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", declared) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


HOSTILE = {
    "nothing": b"",
    "text": b"no sound at all",
    "a list of files": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "a list in a WAV": b"RIFF\x40\0\0\0WAVE#EXTM3U\nfile:///etc/passwd\n",
    "a WAV without samples": _wav(16000, 1, 0, b""),
    "a WAV of 0 Hz": _wav(0, 1, 800),
    "a WAV of 4 GHz": _wav(0xFFFFFFF0, 1, 800),
    "a WAV without channels": _wav(16000, 0, 800, block=2),
    "a WAV of 60000 channels": _wav(16000, 60000, 800),
    "a WAV that declares hours": _wav(16000, 1, 0x7FFFFFF0),
    "a float WAV that is not finite": encoded(np.full((1, 4000), np.nan, np.float32), codec="pcm_f32le"),
    "a float WAV of 1e30": encoded(np.full((1, 4000), 1e30, np.float32), codec="pcm_f32le"),
    "half a WAV": encoded(4000)[:4000],
    "half a FLAC": encoded(9000, kind="flac")[:3000],
    "half an MP3": encoded(20000, kind="mp3")[:2000],
    "half an Ogg": encoded(48000, kind="opus", rate=48000)[:5000],
    "half an M4A": encoded(9000, kind="m4a")[:2000],
    "a video without sound": encoded_video(4, height=16, width=16),
    "a GIF": encoded_video(2, kind="gif", height=16, width=16),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.fault
def test_a_damaged_sound_is_a_bad_sample(name: str) -> None:
    with pytest.raises(SampleError) as raised:
        _items(HOSTILE[name])
    assert raised.value.kind is FaultKind.DECODE


@pytest.mark.fault
def test_an_ogg_that_ends_inside_its_last_page_is_truncated() -> None:
    data = encoded(64000, kind="opus")
    assert data.count(b"OggS") > 3, "pages of sound before the last one, so that ffmpeg alone finds no damage"
    last = data.rfind(b"OggS")
    for stop in (last + 4, last + 5, last + 6, last + 27, len(data) - 1):
        with pytest.raises(SampleError, match="its last page is not marked as the last, or is not complete"):
            audio_size(data[:stop])
    assert audio_size(data).samples == 192000


@pytest.mark.fault
def test_a_flac_that_ends_between_two_blocks_is_truncated() -> None:
    data = encoded(40_000, kind="flac")
    with AudioFile(data) as file:
        places = [packet.pos for packet in file._container.demux(file._stream) if packet.size]
    with pytest.raises(SampleError, match="truncated: its header says 40000 samples"):
        audio_size(data[: places[len(places) // 2]])


def test_a_piped_wav_whose_header_has_no_length_is_read() -> None:
    assert audio_size(_wav(16000, 1, 0xFFFFFFFF)) == AudioSize(400, 16000, 1)


@pytest.mark.fault
def test_a_sound_that_differs_from_its_index_is_a_bad_sample() -> None:
    data = encoded(4000)
    for wrong in (AudioSize(3000, 16000, 1), AudioSize(5000, 16000, 1), AudioSize(4000, 8000, 1)):
        with pytest.raises(SampleError, match="the index says"):
            _items(data, size=wrong)


@pytest.mark.fault
def test_a_small_file_of_hours_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence in FLAC takes 13 bytes for 4608 samples. The index stops counting, and a plan for less stops decoding."""
    data = encoded(np.zeros((2, 500_000), np.float32), kind="flac")
    assert len(data) < 20_000
    with pytest.raises(SampleError, match="the index says"):
        _items(data, size=AudioSize(4000, 16000, 2))
    monkeypatch.setattr("data_pipeline.shards.audio_file._MOST_VALUES", 100_000)
    with pytest.raises(SampleError, match="a sound of more than 50000 samples"):
        audio_size(data)


def test_the_track_of_a_video_is_absent_damaged_or_a_sound() -> None:
    assert track_size(encoded_video(4, height=16, width=16)) == AudioSize(0, 0, 0)
    assert track_size(encoded_video(2, kind="gif", height=16, width=16)) == AudioSize(0, 0, 0)
    assert track_size(encoded(4000, kind="m4a")).samples > 4000
    assert track_size(b"no video") == AudioSize(0, 1, 1)


@pytest.mark.fault
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_sounds_raise_nothing_else(kind: str) -> None:
    """25 of each of six formats; a file that still decodes has the size that its index says."""
    data, rng = encoded(6000, kind=kind), np.random.default_rng(0)
    num_bad = 0
    for number in range(25):
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 12))):
            changed[rng.integers(len(data))] = rng.integers(256)
        if number % 3 == 0:
            del changed[rng.integers(len(data)) :]
        try:
            size = audio_size(bytes(changed))
            items = _items(bytes(changed), size=size, max_seconds=60)
            planned = AudioTransform(AudioConfig(max_seconds=60), SPEC).dry_run(size)
            assert [item.grid for item in items] == [item.grid for item in planned]
            assert all(np.isfinite(item.values).all() for item in items)
        except SampleError:
            num_bad += 1
    assert 0 < num_bad <= 25
