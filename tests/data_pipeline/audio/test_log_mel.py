"""Log-mel spectrograms against the feature extractor of transformers."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from data_pipeline.audio.log_mel import log_mel, mel_filters

TOLERANCE = 1e-6
"""The largest difference over these and 252 further clips is 2.4e-7: both compute in float32, in another order."""


def _spectrogram(samples: np.ndarray, rows: int, num_bins: int) -> np.ndarray:
    out = np.full((rows, num_bins), np.nan, np.float32)
    settings = {"num_bins": num_bins, "sample_rate": 16000, "window": 400, "hop": 160, "max_frames": 3000}
    log_mel(samples, **settings, out=out)
    return out


def _noise(length: int) -> np.ndarray:
    return np.random.default_rng(length).standard_normal(length).astype(np.float32) * 0.1


CLIPS = {
    "one sample": np.ones(1, np.float32),
    "shorter than half a window": _noise(150),
    "a whole number of frames": _noise(16000),
    "a frame and one sample": _noise(161),
    "loud at its end, which the second frame of the silence hears": np.eye(1, 1000, 999, dtype=np.float32)[0],
    "almost silent": _noise(5000) * 1e-6,
    "silent": np.zeros(700, np.float32),
    "the last frame but one": _noise(479_700),
    "the last frame": _noise(479_900),
    "30 seconds": _noise(480_000),
}


@pytest.mark.parametrize("name", CLIPS)
def test_native_and_padded_clips_equal_the_extractors(name: str) -> None:
    samples = CLIPS[name]
    for num_bins in (80, 128):
        extractor = WhisperFeatureExtractor(feature_size=num_bins)
        (theirs,) = extractor(samples, sampling_rate=16000, return_tensors="np").input_features
        native = -(-len(samples) // 160) + 2  # Two frames of the silence, which convolutions read.
        ours = _spectrogram(samples, native, num_bins)
        np.testing.assert_allclose(ours[:3000], theirs.T[:native], rtol=0, atol=TOLERANCE)
        assert not ours[3000:].any()
        np.testing.assert_allclose(_spectrogram(samples, 3000, num_bins), theirs.T, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("num_bins", [80, 128])
def test_filters_equal_the_extractors(num_bins: int) -> None:
    theirs = WhisperFeatureExtractor(feature_size=num_bins).mel_filters
    np.testing.assert_allclose(mel_filters(num_bins, 16000, 400), theirs, rtol=0, atol=1e-15)
