"""The checkpoint benchmark with a tiny model: every method is measured, and our values are not a peer's."""

from __future__ import annotations

import pytest

from benchmarks import checkpoint


@pytest.mark.slow
def test_every_way_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LAYERS": 1, "DIM": 64, "VOCAB": 64, "REPEATS": 1}.items():
        monkeypatch.setattr(checkpoint, name, value)
    stall, durable = checkpoint.measure()
    assert set(stall.peers) == {"ours, waiting", "torch save", "torch async_save", "torch async_save, process"}
    assert stall.peers["torch save"] == durable.peers["torch save"]
    assert 0 < stall.ours < durable.ours
