"""Data sets with known duplicates: the list, reading the list in a run, and resuming a killed search."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import DataConfigError
from data_pipeline.order.fault_lists import read_exclusions
from data_pipeline.order.fault_policy import FaultConfig
from data_pipeline.prepare.choices import KeepRule
from data_pipeline.prepare.dedup.find import DedupOptions, NamedSet, find_duplicates
from data_pipeline.prepare.dedup.signatures import Criterion
from data_pipeline.shards.manifest import Manifest, write_manifest
from data_pipeline.shards.writer import ShardWriter

REPO = Path(__file__).resolve().parents[4]
EMOJI = REPO / "examples" / "emoji" / "shards" / "train.manifest"


def scene(number: int, side: int = 96, encoding: str = "PNG") -> bytes:
    """Return an encoded image. Equal numbers give the same image at any size."""
    small = np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((192, 192), Image.Resampling.BICUBIC).resize((side, side)).save(out, encoding)
    return out.getvalue()


def data_set(folder: Path, name: str, samples: list[dict[str, bytes]], max_samples: int = 3) -> NamedSet:
    with ShardWriter(folder / name, "part", max_samples=max_samples) as writer:
        for number, members in enumerate(samples):
            writer.write(f"{name}-{number}", members)
    return NamedSet(name, write_manifest(folder / name / f"{name}.manifest", writer.shards))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def search(tmp_path: Path, sets: list[NamedSet], options: DedupOptions, **more: Any) -> dict[tuple[str, int], Any]:
    """Return, for the (set, sample) of each line, the (set, sample) that it duplicates."""
    report = find_duplicates(sets, tmp_path / "out.jsonl", options, signatures=tmp_path / "signatures", **more)
    found = lines(report.output)
    assert report.num_left_out == len(found)
    return {(x["dataset"], x["index"]): tuple(x["duplicate_of"].values()) for x in found}


EXACT, BOTH = DedupOptions((Criterion.EXACT,)), DedupOptions()


def test_exact_and_scaled_copies_are_listed_once(tmp_path: Path) -> None:
    a = data_set(
        tmp_path,
        "a",
        [
            {"png": scene(1), "txt": b"one"},
            {"png": scene(2), "txt": b"two"},
            {"png": scene(1), "txt": b"one again"},
            {"jpg": scene(2, 300, "JPEG"), "txt": b"two, larger"},
            {"txt": b"no image"},
        ],
    )
    b = data_set(tmp_path, "b", [{"png": scene(3)}, {"webp": scene(1, 50, "WEBP")}, {"png": scene(3)}])
    exact = search(tmp_path, [a, b], EXACT)
    assert exact == {("a", 2): ("a", 0), ("b", 2): ("b", 0)}
    both = search(tmp_path, [a, b], BOTH)
    assert both == exact | {("a", 3): ("a", 1), ("b", 1): ("a", 0)}
    largest = search(tmp_path, [a, b], DedupOptions(keep=KeepRule.LARGEST))
    assert largest == {("a", 1): ("a", 3), ("a", 2): ("a", 0), ("b", 1): ("a", 0), ("b", 2): ("b", 0)}
    excluded = read_exclusions(FaultConfig(exclude=(tmp_path / "out.jsonl",)))
    assert {name: found.indices.tolist() for name, found in excluded.items()} == {"a": [1, 2], "b": [1, 2]}


def test_a_training_set_is_cleaned_of_an_evaluation_set_which_stays_whole(tmp_path: Path) -> None:
    train = data_set(tmp_path, "train", [{"png": scene(n)} for n in (1, 2, 3, 4, 4)])
    evaluation = data_set(tmp_path, "eval", [{"png": scene(3)}, {"jpg": scene(1, 200, "JPEG")}, {"png": scene(3)}])
    found = search(tmp_path, [train], BOTH, against=[evaluation])
    assert found == {("train", 0): ("eval", 1), ("train", 2): ("eval", 0), ("train", 4): ("train", 3)}
    assert search(tmp_path, [train], DedupOptions(keep=KeepRule.LARGEST), against=[evaluation]) == found


def test_text_and_pairs(tmp_path: Path) -> None:
    captions = json.dumps({"captions": ["x", "y"]}).encode()
    rows = [
        {"png": scene(1), "txt": b"x"},
        {"png": scene(1), "txt": b"y"},
        {"png": scene(2), "txt": b"x"},
        {"png": scene(1), "txt": b"x"},
        {"png": scene(5), "json": captions},
        {"png": scene(6), "json": captions},
    ]
    a = data_set(tmp_path, "a", rows)
    assert search(tmp_path, [a], DedupOptions((Criterion.PAIR,))) == {("a", 3): ("a", 0)}
    text = {("a", 2): ("a", 0), ("a", 3): ("a", 0), ("a", 5): ("a", 4)}
    assert search(tmp_path, [a], DedupOptions((Criterion.TEXT,))) == text


@pytest.mark.fault
def test_samples_that_cannot_be_compared_are_kept_and_counted(tmp_path: Path) -> None:
    broken = scene(1)[:200]
    two = {"0.png": scene(1), "1.png": scene(2)}
    flat = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(flat, "PNG")
    rows = [{"png": broken}, {"png": broken, "txt": b"x"}, two, two, {"png": flat.getvalue()}, {"txt": b"only"}]
    a = data_set(tmp_path, "a", rows)
    with (tmp_path / "a" / "part-00001.tar").open("r+b") as file:
        content = file.read()
        file.seek(content.index(b"only"))
        file.write(b"0nly")
    os.utime(tmp_path / "a" / "part-00001.tar", (1, 1))  # Keep the old time, so that the damage is not detected by it.
    report = find_duplicates([a], tmp_path / "out.jsonl", BOTH, signatures=tmp_path / "s")
    exact, near = report.criteria["exact"], report.criteria["perceptual"]
    assert (exact.compared, exact.not_compared, exact.left_out) == (5, {"damaged": 1}, {"a": 2})
    assert (near.compared, near.not_compared) == (0, {"damaged": 2, "several": 1, "flat": 1})


def test_no_duplicates_make_an_empty_list_that_a_run_can_read(tmp_path: Path) -> None:
    assert search(tmp_path, [data_set(tmp_path, "a", [{"png": scene(1)}, {"png": scene(2)}])], BOTH) == {}
    assert read_exclusions(FaultConfig(exclude=(tmp_path / "out.jsonl",))) == {}
    assert search(tmp_path, [data_set(tmp_path, "none", [])], BOTH) == {}


def test_another_limit_of_pixels_is_not_answered_by_earlier_signatures(tmp_path: Path) -> None:
    a = data_set(tmp_path, "a", [{"png": scene(1, 64)}, {"png": scene(1, 200)}])
    for limit, found in ((200 * 200, {("a", 1): ("a", 0)}), (200 * 200 - 1, {}), (200 * 200, {("a", 1): ("a", 0)})):
        assert search(tmp_path, [a], DedupOptions((Criterion.PERCEPTUAL,), max_pixels=limit)) == found


@pytest.mark.long
@pytest.mark.slow
def test_processes_and_earlier_signatures_change_nothing(tmp_path: Path) -> None:
    sets = [NamedSet("emoji", Manifest.open(EMOJI.with_name("train-quick.manifest")))]
    alone = find_duplicates(sets, tmp_path / "alone.jsonl", BOTH, signatures=tmp_path / "s")
    shared = find_duplicates(sets, tmp_path / "shared.jsonl", BOTH, signatures=tmp_path / "t", workers=2)
    again = find_duplicates(sets, tmp_path / "again.jsonl", BOTH, signatures=tmp_path / "t")
    assert alone.output.read_bytes() == shared.output.read_bytes() == again.output.read_bytes()
    assert alone.num_read == shared.num_read == alone.num_samples > again.num_read == 0
    assert alone.num_left_out > 0
    damaged = next((tmp_path / "t").glob("*/*.perceptual"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    renewed = find_duplicates(sets, tmp_path / "renewed.jsonl", BOTH, signatures=tmp_path / "t")
    assert 0 < renewed.num_read < alone.num_samples
    assert renewed.output.read_bytes() == alone.output.read_bytes()


def test_every_listed_image_is_near_a_kept_one(tmp_path: Path) -> None:
    sets = [NamedSet("emoji", Manifest.open(EMOJI.with_name("train-quick.manifest")))]
    for distance in (0, 7):
        options = DedupOptions((Criterion.PERCEPTUAL,), distance)
        report = find_duplicates(sets, tmp_path / "out.jsonl", options, signatures=tmp_path / "s")
        found = lines(report.output)
        gone = {line["index"] for line in found}
        assert gone
        assert all(line["distance"] <= distance for line in found)
        assert not {line["duplicate_of"]["index"] for line in found} & gone


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (DedupOptions(()), "at least one"),
        (DedupOptions(distance=17), "0 to 16"),
        (DedupOptions((Criterion.TEXT,) * 2), "once"),
    ],
)
def test_invalid_options_are_rejected(tmp_path: Path, options: DedupOptions, problem: str) -> None:
    a = data_set(tmp_path, "a", [{"txt": b"x"}])
    with pytest.raises(DataConfigError, match=problem):
        find_duplicates([a], tmp_path / "out.jsonl", options, signatures=tmp_path / "s")
    with pytest.raises(DataConfigError, match="two data sets are called 'a'"):
        find_duplicates([a, a], tmp_path / "out.jsonl", BOTH, signatures=tmp_path / "s")


@pytest.mark.fault
@pytest.mark.slow
def test_a_killed_search_can_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "mmscale.cli.main", "data", "dedup", str(EMOJI), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True, cwd=REPO)
    while not list(tmp_path.glob("out.jsonl.signatures/*/*.perceptual")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    sets = [NamedSet("train", Manifest.open(EMOJI))]
    resumed = find_duplicates(sets, out, BOTH, signatures=tmp_path / "out.jsonl.signatures")
    assert 0 < resumed.num_read < resumed.num_samples
    whole = find_duplicates(sets, tmp_path / "whole.jsonl", BOTH, signatures=tmp_path / "whole")
    assert resumed.output.read_bytes() == whole.output.read_bytes()
