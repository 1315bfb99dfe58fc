"""The remote benchmark on few samples: both readers yield all of them, and the relay counts requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import remote


def test_both_readers_are_measured_behind_the_slow_link(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "SAMPLES", 64)
    monkeypatch.setattr(remote, "PER_SHARD", 16)
    monkeypatch.setattr(remote, "MILLISECONDS", 1)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "")  # Restore the variables that the benchmark sets.
    with remote.served() as place:
        streamed = remote.peer(place)
        cold, warm = remote.ours(place, tmp_path, 8), remote.ours(place, tmp_path, 8)
        single = remote.ours(place, tmp_path / "other", 1, "indexes")
    assert streamed.requests == 4
    assert place.needed_bytes < streamed.num_bytes < 1.3 * place.needed_bytes
    assert cold.num_bytes > place.needed_bytes
    assert warm.requests < 4
    assert warm.num_bytes < 10_000
    assert single.requests >= 64
    assert min(e.samples_per_second for e in (streamed, cold, warm, single)) > 0
