"""The decode benchmark: it runs, and both modes keep their distance to Pillow. Its speeds are not judged."""

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
