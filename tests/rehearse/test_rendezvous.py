"""Traffic of the rendezvous: counted for few ranks, extrapolated by exact polynomials."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mmscale.rehearse.rendezvous import PART, extrapolate, rehearse_rendezvous
from mmscale.rehearse.report import Report
from mmscale.rehearse.store_program import groups


def test_a_polynomial_is_continued_exactly() -> None:
    counts = {ranks: 2 * ranks**2 + 7 for ranks in (4, 8, 16, 32)}
    assert extrapolate(counts, 8000, 2) == 2 * 8000**2 + 7
    assert extrapolate({ranks: ranks**2 * (154 + 8 * ranks) for ranks in (4, 8, 16, 32)}, 8000, 3) == 8000**2 * 64_154
    assert extrapolate({8: 12, 16: 12}, 10**6, 1) == 12


def test_ranks_that_connect_when_they_talk_read_few_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ | {})
    monkeypatch.delenv("TORCH_GLOO_LAZY_INIT", raising=False)
    eager = groups((4, 8), 8)
    assert [eager[ranks]["calls"] for ranks in ("4", "8")] == [4 + 2 * 16, 8 + 2 * 64]
    assert eager["8"]["bytes"] > 3 * eager["4"]["bytes"]


def test_a_large_run_connects_lazily_and_sums_right() -> None:
    words = [sys.executable, "-m", "mmscale.rehearse.store_program", "groups", "8000", "4", "8", "16"]
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_GLOO_LAZY_INIT"}
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, env=environment)
    lazy = json.loads(done.stdout)
    assert [lazy[ranks]["calls"] for ranks in ("4", "8", "16")] == [20, 40, 80]
    assert lazy["16"]["bytes"] == 4 * lazy["4"]["bytes"]
    assert lazy["16"]["descriptors"] < 10


@pytest.mark.slow
def test_all_ranks_join_one_store() -> None:
    report = Report()
    rehearse_rendezvous(report, 40, most_seconds=60)
    assert report.findings == []
    assert report.value(PART, "ranks that joined one store") == 40
    assert 40 < report.value(PART, "open files of the store") < 80
    # Each rank sends its device type, reads the verdict, and is counted: some hundred bytes.
    assert 40 * 50 < report.value(PART, "bytes that the store received") < 40 * 2000
