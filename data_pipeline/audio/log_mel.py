"""Log-mel spectrograms of sounds, as ``WhisperFeatureExtractor`` of transformers computes them.

    samples (n,) --windows, FFT, mel filters, logarithm--> (frames, bins)

The extractor fills every clip with silence to 30 seconds first. Here the silence is not computed: its frames all have
one value, which is known once the clip's loudest value is.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_FLOOR = 1e-10
"""Smallest power, before the logarithm."""
_RANGE = 8.0
"""Decades below a clip's largest value that are kept."""
_LINEAR_STEP = 200.0 / 3
"""Hertz of a mel in the linear part of Slaney's scale, which ends at ``_BREAK_HZ``."""
_BREAK_HZ = 1000.0
_LOG_STEP = math.log(6.4) / 27
_FRAMES_AT_ONCE = 128
"""Frames of one call of the FFT. Their 0.2 MB of spectra stay in the processor's cache."""


def _mel(hertz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    linear = hertz / _LINEAR_STEP
    return np.where(
        hertz < _BREAK_HZ,
        linear,
        _BREAK_HZ / _LINEAR_STEP + np.log(np.maximum(hertz, _BREAK_HZ) / _BREAK_HZ) / _LOG_STEP,
    )


def _hertz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    first = _BREAK_HZ / _LINEAR_STEP
    return np.where(mel < first, mel * _LINEAR_STEP, _BREAK_HZ * np.exp(_LOG_STEP * np.maximum(mel - first, 0.0)))


def mel_filters(num_bins: int, sample_rate: int, window: int) -> npt.NDArray[np.float64]:
    """Return triangular filters ``(window // 2 + 1, num_bins)`` of equal area, from 0 Hz to half of ``sample_rate``.

    Source: Slaney, Auditory Toolbox (1998), as in librosa (``htk=False``, ``norm="slaney"``).
    """
    places = np.linspace(0.0, sample_rate / 2, window // 2 + 1)
    edges = _hertz(np.linspace(0.0, float(_mel(np.array(sample_rate / 2))), num_bins + 2))
    slopes = edges[None, :] - places[:, None]
    widths = np.diff(edges)
    triangles = np.maximum(0.0, np.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]))
    return np.asarray(triangles * (2.0 / (edges[2:] - edges[:-2])))


@lru_cache(maxsize=16)
def _constants(num_bins: int, sample_rate: int, window: int) -> tuple[Tensor, Tensor]:
    filters = torch.from_numpy(mel_filters(num_bins, sample_rate, window)).float()
    return filters, torch.hann_window(window)


def log_mel(
    samples: npt.NDArray[np.float32],
    *,
    num_bins: int,
    sample_rate: int,
    window: int,
    hop: int,
    max_frames: int,
    out: npt.NDArray[np.float32],
) -> None:
    """Write the first frames of the spectrogram of a clip that silence extends to ``max_frames`` frames.

    Args:
        samples: The clip, ``(n,)``, at most ``max_frames * hop`` samples.
        num_bins: Mel bins.
        sample_rate: Samples of a second.
        window: Samples of a frame.
        hop: Samples from a frame to the next.
        max_frames: Frames of the extended clip.
        out: ``(rows, num_bins)``, written: the first frames. Rows from ``max_frames`` on, where the extended clip has
            no frame, become 0, which is what a convolution's padding reads there.
    """
    filters, hann = _constants(num_bins, sample_rate, window)
    half = window // 2
    # Later frames hold no sample of the clip.
    num_heard = min(max_frames, -(-(len(samples) + half) // hop) + 1)
    # The extended clip is mirrored at both ends. The right mirror is reached only where its last frames are computed.
    length = min(max_frames * hop, num_heard * hop + window)
    padded = np.zeros(length + window, np.float32)
    padded[half : half + len(samples)] = samples
    padded[:half] = padded[half + 1 : 2 * half + 1][::-1]
    padded[half + length :] = padded[length - 1 : half + length - 1][::-1]
    frames = torch.from_numpy(padded).unfold(0, window, hop)[:num_heard]
    mel = torch.empty((num_heard, num_bins))
    for first in range(0, num_heard, _FRAMES_AT_ONCE):
        spectrum = torch.fft.rfft(frames[first : first + _FRAMES_AT_ONCE] * hann)
        squares = torch.view_as_real(spectrum).square_()
        torch.mm(squares[..., 0] + squares[..., 1], filters, out=mel[first : first + _FRAMES_AT_ONCE])
    mel.clamp_(min=_FLOOR).log10_()
    silence = math.log10(_FLOOR)
    loudest = float(mel.max())
    if num_heard < max_frames:
        loudest = max(loudest, silence)
    floor = loudest - _RANGE
    mel.clamp_(min=floor).add_(4.0).div_(4.0)
    written = torch.from_numpy(out)
    num_copied = min(num_heard, len(out))
    written[:num_copied] = mel[:num_copied]
    written[num_copied:max_frames] = (max(silence, floor) + 4.0) / 4.0
    written[max_frames:] = 0.0
