"""Resharded data sets agree with plain lists of their input samples."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks.servers import file_server
from data_pipeline.errors import DataConfigError, SampleError, ShardError
from data_pipeline.prepare.choices import OnError, SampleKeys
from data_pipeline.prepare.export import export
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.reshard import NamedManifest, ReshardSource, Selection
from data_pipeline.prepare.skipped import read_skipped
from data_pipeline.prepare.verify import jobs_of, verify
from data_pipeline.shards.manifest import Manifest, write_manifest
from data_pipeline.shards.writer import ShardWriter
from tests.engine.fork_server import fork_program

Stored = list[tuple[str, dict[str, bytes]]]


def write(folder: Path, name: str, samples: Stored, per_shard: int = 7) -> NamedManifest:
    with ShardWriter(folder, name, max_samples=per_shard) as writer:
        for key, members in samples:
            writer.write(key, members)
    return NamedManifest(name, write_manifest(folder / f"{name}.manifest", writer.shards).path)


def samples_of(name: str, count: int) -> Stored:
    """Return samples with members of any kind; unknown ones are copied too."""
    return [
        (f"k{i}", {"txt": f"{name} {i}".encode(), "seg-map.npy": bytes([i % 256]) * (i % 40), "pth": b"\x80"})
        for i in range(count)
    ]


def read(manifest_path: Path) -> Stored:
    manifest, found = Manifest.open(manifest_path), Stored()
    for number in range(manifest.num_shards):
        index = manifest.open_index(number)
        data = index.tar_path.read_bytes()
        for i in range(len(index)):
            row = index.row(i)
            found.append((row.key, {m.ext: data[m.offset : m.offset + m.size] for m in row.members}))
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def line(name: str, samples: Stored, index: int) -> str:
    return json.dumps({"dataset": name, "index": index, "key": samples[index][0], "reason": "a copy"}) + "\n"


def test_sets_are_joined_filtered_and_shuffled(tmp_path: Path) -> None:
    a, b = samples_of("a", 50), samples_of("b", 23)
    sets = [write(tmp_path / "in", "a", a), write(tmp_path / "in", "b", b)]
    rng = random.Random(5)
    gone = rng.sample([("a", i) for i in range(50)] + [("b", i) for i in range(23)], 20)
    by_name = {"a": a, "b": b}
    (tmp_path / "gone.jsonl").write_text("".join(line(name, by_name[name], i) for name, i in gone))
    everything = [(n, i, members) for n, samples in by_name.items() for i, (_, members) in enumerate(samples)]
    left = [(f"{n}/{n}-{i // 7:05d}/k{i}", members) for n, i, members in everything if (n, i) not in gone]
    options: dict[str, Any] = {"exclude": (tmp_path / "gone.jsonl",), "keys": SampleKeys.ORIGIN}

    plain = ReshardSource(sets, Selection(**options))
    report = ingest(plain, tmp_path / "plain", "set", max_samples=10)
    assert (plain.count(), report.num_samples, report.num_shards) == (53, 53, 6)
    assert read(report.manifest) == left
    assert all(shard.damages == [] for shard in verify(jobs_of(report.manifest)[1]))

    orders = []
    for seed, workers in ((1, 0), (1, 2), (2, 0)):
        source = ReshardSource(sets, Selection(**options, shuffle=seed))
        out = tmp_path / f"shuffled-{seed}-{workers}"
        orders.append(read(ingest(source, out, "set", max_samples=10, workers=workers).manifest))
        assert sorted(orders[-1], key=str) == sorted(left, key=str)
    assert files(tmp_path / "shuffled-1-0") == files(tmp_path / "shuffled-1-2")
    assert orders[0] != orders[2]
    assert orders[0] != left

    kept = ReshardSource(sets, Selection(keep=options["exclude"], keys=SampleKeys.NUMBER))
    assert read(ingest(kept, tmp_path / "kept", "set").manifest) == [
        (f"{place:09d}", by_name[name][i][1]) for place, (name, i) in enumerate(sorted(gone), 1)
    ]


@pytest.mark.fault
def test_lists_of_other_data_are_refused(tmp_path: Path) -> None:
    a = samples_of("a", 9)
    named = write(tmp_path / "in", "a", a)
    for text, reason in [
        (line("other", a, 1), "name the data sets other"),
        ('{"dataset": "a", "index": 9, "key": "k9"}\n', "name sample 9"),
        ('{"dataset": "a", "index": 3, "key": "k4"}\n', "a list has another"),
        ("a,3\n", "no line of"),
        ("".join(line("a", a, i) for i in range(9)), "no sample is left"),
    ]:
        (tmp_path / "list").write_text(text)
        with pytest.raises(DataConfigError, match=reason):
            ingest(ReshardSource([named], Selection(exclude=(tmp_path / "list",))), tmp_path / "out", "set")
    with pytest.raises(DataConfigError, match="have the same name"):
        ReshardSource([named, named], Selection())


@pytest.mark.fault
def test_a_data_set_on_a_server_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in", "a", samples_of("a", 3))
    monkeypatch.setenv("MMSCALE_CACHE", str(tmp_path / "cache"))
    with file_server(tmp_path / "in").running() as server:
        url = f"{server.url}/a.manifest"
        with pytest.raises(DataConfigError, match="copy it to a disk first"):
            ReshardSource([NamedManifest("a", Path(url))], Selection())
        with pytest.raises(DataConfigError, match="copy it to a disk first"):
            export(url, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_samples_of_one_key_are_named_with_the_remedy(tmp_path: Path) -> None:
    sets = [write(tmp_path / "in", name, samples_of(name, 9)) for name in "ab"]
    with pytest.raises(ShardError, match=r"'k0' occurs twice.*--keys origin"):
        ingest(ReshardSource(sets, Selection()), tmp_path / "out", "set")


@pytest.mark.fault
def test_a_damaged_sample_fails_or_is_left_out(tmp_path: Path) -> None:
    a = samples_of("a", 20)
    named = write(tmp_path / "in", "a", a)
    shard = tmp_path / "in" / "a-00001.tar"
    time = shard.stat().st_mtime_ns
    shard.write_bytes(shard.read_bytes().replace(b"a 9", b"A 9"))
    os.utime(shard, ns=(time, time))
    source = ReshardSource([named], Selection())
    with pytest.raises(SampleError, match=r"row 10 \(k9\): .*crc32"):
        ingest(source, tmp_path / "fail", "set")
    report = ingest(source, tmp_path / "skip", "set", on_error=OnError.SKIP)
    assert [(row.row, row.key) for row in read_skipped(report.skipped)] == [(10, "k9")]
    assert read(report.manifest) == a[:9] + a[10:]


_DIES = """
import os, signal, sys
from pathlib import Path
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.choices import SampleKeys
from data_pipeline.prepare.reshard import ReshardSource, NamedManifest, Selection
rows = 0
def progress(count):
    global rows
    rows += count
    if rows >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
source = ReshardSource([NamedManifest(n, Path(sys.argv[1]) / f"{n}.manifest") for n in "ab"], Selection())
ingest(source, sys.argv[2], "set", max_samples=5, workers=2, progress=progress)
"""


@pytest.mark.fault
def test_killed_at_random_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Keys repeat in other shards here, as they do when data sets are joined."""
    sets = [write(tmp_path / "in", name, samples_of(name, 200)) for name in "ab"]
    ingest(ReshardSource(sets, Selection()), tmp_path / "whole", "set", max_samples=5)
    out, rng, died = tmp_path / "out", random.Random(), 0
    while died < 2:
        words = [str(tmp_path / "in"), str(out), str(rng.randrange(1 + 150 * died, 150 * (died + 1)))]
        assert fork_program(_DIES, *words, log=tmp_path / "log").wait() == -signal.SIGKILL
        died += 1
    report = ingest(ReshardSource(sets, Selection()), out, "set", max_samples=5)
    assert report.num_resumed >= 100
    assert files(out) == files(tmp_path / "whole")
