"""The loader benchmark runs on few samples and with the peers of this environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.loader import LoaderRow, PeersMissingError, peers_python, table
from benchmarks.peers.job import Job, Scenario, photo, write_photos
from data_pipeline.sample import ImagePart, TextPart
from data_pipeline.shards.sample_reader import read_samples

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("peer", ["open_clip", "energon"])
@pytest.mark.slow
def test_scenarios_are_measured_beside_a_peer(tmp_path: Path, peer: str) -> None:
    options = ["--samples", "110", "--seconds", "0.05", "--repeats", "1", "--peers", peer]
    options += ["--scenarios", "exact,resume"]
    command = [sys.executable, "-m", "benchmarks.loader", "--json", "--data", str(tmp_path), *options]
    done = subprocess.run(
        command, cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    beside = {name: [c for c in report["cases"] if set(c["peers"]) == {name}] for name in (peer, "bare")}
    assert {(case["case"], case["unit"]) for case in beside[peer]} == {
        (f"{scenario.value}, {workers} workers", unit)
        for scenario in (Scenario.EXACT, Scenario.RESUME)
        for workers in (0, 2)
        for unit in (["s"] if scenario is Scenario.RESUME else ["samples/s", "samples/core-s"])
    }
    assert {(case["case"], case["unit"]) for case in beside["bare"]} == {
        (f"exact, {workers} workers, beside no loader", unit)
        for workers in (0, 2)
        for unit in ("samples/s", "samples/core-s")
    }
    assert len(report["cases"]) == len(beside[peer]) + len(beside["bare"])
    for case in report["cases"]:
        assert case["ours"] > 0
        assert min(case["peers"].values()) > 0
    assert "left out" not in done.stderr


def test_peers_that_cannot_be_installed_are_left_out_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        PeersMissingError, match=r"pip install --quiet mosaicml-streaming litdata failed: .*No matching"
    ):
        peers_python(tmp_path / "env")


def test_the_samples_are_the_same_on_every_machine_and_their_decoder_is_shared(tmp_path: Path) -> None:
    write_photos(tmp_path, 2)
    (first, second) = read_samples(tmp_path / "photos.manifest")
    assert [type(part) for part in first.parts] == [ImagePart, TextPart]
    assert first.parts != second.parts
    image = first.parts[0]
    assert isinstance(image, ImagePart)
    assert image.data == photo(0)
    exact, fast = (Job(tmp_path, scenario, 0).pixels(image.data) for scenario in (Scenario.EXACT, Scenario.FAST))
    assert exact.shape == fast.shape == (3, 224, 224)
    assert 0 < np.abs(exact.astype(int) - fast).mean() < 8


def test_ratios_are_above_one_where_ours_is_better() -> None:
    fast = LoaderRow(Scenario.RAW, 0, "samples/s", {"ours": 200.0, "open_clip": 100.0, "energon": 160.0, "bare": 250.0})
    assert (fast.beside_peers.ratio, fast.beside_bare.ratio) == (1.25, 0.8)
    slow = LoaderRow(Scenario.RESUME, 0, "s", {"ours": 2.0, "open_clip": 1.0, "energon": 3.0})
    assert (slow.beside_peers.ratio, slow.beside_bare.ratio) == (0.5, None)
    assert table([fast, slow]).splitlines()[2:] == [
        "| raw | 0 | samples/s | 200 | 100 | 160 | 250 | 1.25 | 0.80 |",
        "| resume | 0 | s | 2.0000 | 1.0000 | 3.0000 |  | 0.50 |  |",
    ]
