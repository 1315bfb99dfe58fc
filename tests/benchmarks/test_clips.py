"""The benchmark of clips runs, and all sides give frames and sounds of the same content. Speeds are not checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import clips


def test_all_sides_return_the_same_frames_and_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "SECONDS", 1)
    video = clips.video()
    expected = clips.transformers_frames(video, 4).float()
    patches = torch.from_numpy(clips.our_frames(video, 4).copy()).reshape(4, 16, 16, 3, 14, 14)
    ours = patches.permute(0, 3, 1, 4, 2, 5).reshape(4, 3, 224, 224).float()
    assert expected.std() > 20
    assert (ours - expected).abs().mean() < 0.5
    torch.testing.assert_close(clips.energon_frames(video, 4).float(), expected)
    sound = clips.sound("flac")
    reference = clips.pyav_mel(sound)[0].T
    assert np.abs(clips.our_mel(sound, "flac")[: len(reference) - 4] - reference[:-4]).mean() < 0.02


def test_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "SECONDS", 1)
    monkeypatch.setattr(clips, "REPEATS", 1)
    monkeypatch.setattr(clips, "MANY", 6)
    monkeypatch.setattr(clips, "_has_torchcodec", lambda: False)
    cases = clips.measure()
    assert [case.unit for case in cases] == ["frames/core-s"] * 2 + ["s/core-s"] * 2
    assert [set(case.peers) for case in cases] == [{"energon", "transformers"}] * 2 + [{"PyAV, transformers"}] * 2
