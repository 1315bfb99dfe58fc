"""The sample log benchmark runs on few steps."""

from __future__ import annotations

import pytest

from benchmarks import sample_log


def test_cases_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 2000, "EVERY": 32, "SAMPLES": 3000}.items():
        monkeypatch.setattr(sample_log, name, value)
    cases = {case.case: case for case in sample_log.measure()}
    assert 4 < cases["a document without losses"].ours < cases["a document with losses"].ours < 10
    assert cases["a document with losses"].peers == {"plain columns": 34}
    assert "the 5 steps of a sample" in cases  # The steps draw 5.3 epochs.
