"""The decode benchmark runs, and both modes differ from Pillow as expected. Speeds are not checked."""

from __future__ import annotations

import pytest

from benchmarks import decode


def test_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "PHOTOS", 2)
    monkeypatch.setattr(decode, "REPEATS", 1)
    exact, fast, *distances = decode.measure()
    assert exact.unit == fast.unit == "images/core-s"
    assert set(exact.peers) == {"pillow", "torchvision"}
    assert [case.peers for case in distances] == [{"limit": 70.0}, {"limit": 40.0}]
    assert all(case.ours > case.peers["limit"] for case in distances)
