"""Exported tars: no other files next to them, readable by webdataset, and ingested again to the same samples."""

from __future__ import annotations

import io
import json
import os
import random
import signal
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from data_pipeline.errors import DataConfigError, SampleError, ShardError
from data_pipeline.prepare.choices import TarNaming
from data_pipeline.prepare.export import export
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.sources import open_source
from data_pipeline.sample import Sample
from data_pipeline.shards.sample_reader import read_samples
from tests.engine.fork_server import fork_program


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (shade, 10, 20)).save(buffer, "png")
    return buffer.getvalue()


def data_set(root: Path, count: int = 40, *, pairs_only: bool = False) -> Path:
    """Write a data set of pairs and, unless ``pairs_only``, documents and texts."""
    source = root / "in"
    source.mkdir(parents=True)
    for i in range(count):
        stem = source / f"{i:03d}"
        kind = 0 if pairs_only else i % 4
        if kind < 2:
            stem.with_suffix(".png").write_bytes(picture(i))
        if kind == 0:
            stem.with_suffix(".json").write_text(json.dumps({"caption": f"caption {i}", "n": i}))
        elif kind < 3:
            stem.with_suffix(".txt").write_text(f"text {i}")
        else:
            (source / f"{i:03d}.0.png").write_bytes(picture(i))
            (source / f"{i:03d}.1.png").write_bytes(picture(i + 1))
            parts = [{"text": "see"}, {"image": "1.png"}, {"text": "and"}, {"image": "0.png"}]
            stem.with_suffix(".json").write_text(json.dumps({"parts": parts}))
    return ingest(source, root / "shards", "set", max_samples=7).manifest


def contents_of(samples: list[Sample]) -> list[object]:
    return [(sample.provenance.key.rpartition("/")[2], sample.parts, sample.fields) for sample in samples]


def test_export_and_ingest_again_give_the_same_samples(tmp_path: Path) -> None:
    manifest = data_set(tmp_path)
    report = export(manifest, tmp_path / "tars", workers=2)
    names = [f"set-{i:05d}.tar" for i in range(6)]
    assert (report.num_samples, report.num_shards, report.num_resumed) == (40, 6, 0)
    assert sorted(path.name for path in (tmp_path / "tars").iterdir()) == names
    read = webdataset.WebDataset([str(tmp_path / "tars" / name) for name in names], shardshuffle=False)
    seen = {sample["__key__"]: {ext: sample[ext] for ext in sample if ext[0] != "_"} for sample in read}
    files = {f"{i:03d}": dict[str, bytes]() for i in range(40)}
    for path in (tmp_path / "in").iterdir():
        key, _, ext = path.name.partition(".")
        files[key][ext] = path.read_bytes()
    assert seen == files
    again = ingest(tmp_path / "tars", tmp_path / "again", "set").manifest
    assert contents_of(list(read_samples(again))) == contents_of(list(read_samples(manifest)))


def test_img2dataset_names_are_taken_by_its_readers(tmp_path: Path) -> None:
    manifest = data_set(tmp_path, pairs_only=True)
    export(manifest, tmp_path / "tars", naming=TarNaming.IMG2DATASET)
    tars = sorted((tmp_path / "tars").iterdir())
    assert [tar.name for tar in tars] == [f"{i:05d}.tar" for i in range(6)]
    read = list(webdataset.WebDataset(list(map(str, tars)), shardshuffle=False).decode())
    assert [s["__key__"] for s in read] == [f"{i // 7:05d}{i % 7:04d}" for i in range(40)]
    assert [(s["txt"], s["json"]["caption"]) for s in read] == [(f"caption {i}",) * 2 for i in range(40)]
    source = open_source(tmp_path / "tars")
    assert "img2dataset" in source.description
    again = list(read_samples(ingest(source, tmp_path / "again", "set").manifest))
    before = list(read_samples(manifest))
    assert [sample.parts for sample in again] == [sample.parts for sample in before]
    assert [sample.fields["source_key"] for sample in again] == [sample.provenance.key for sample in before]
    assert [sample.fields["n"] for sample in again] == list(range(40))


@pytest.mark.fault
def test_samples_without_img2dataset_names_and_changed_tars_are_rejected(tmp_path: Path) -> None:
    manifest = data_set(tmp_path)
    out = tmp_path / "tars"
    with pytest.raises(SampleError, match=r"set-00000\.tar/002: 1 of kind text: .*--naming keep"):
        export(manifest, out, naming=TarNaming.IMG2DATASET)
    assert [path.name for path in out.iterdir()] == [".mmscale-export.json"]
    shard = tmp_path / "shards" / "set-00001.tar"
    time = shard.stat().st_mtime_ns
    shard.write_bytes(shard.read_bytes().replace(b"caption 8", b"caption 9"))
    os.utime(shard, ns=(time, time))
    with pytest.raises(ShardError, match=r"set-00001\.tar: its sha256 differs"):
        export(manifest, out)
    assert sorted(path.name for path in out.iterdir()) == [".mmscale-export.json", "set-00000.tar"]
    with pytest.raises(DataConfigError, match="unfinished export of other"):
        export(manifest, out, naming=TarNaming.IMG2DATASET)
    shard.write_bytes(shard.read_bytes().replace(b"caption 9", b"caption 8"))
    assert export(manifest, out).num_resumed == 1
    with pytest.raises(DataConfigError, match="exists already"):
        export(manifest, out)


_DIES = """
import os, signal, sys
from data_pipeline.prepare.choices import TarNaming
from data_pipeline.prepare.export import export
samples = 0
def progress(count):
    global samples
    samples += count
    if samples >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
export(sys.argv[1], sys.argv[2], naming=TarNaming.IMG2DATASET, workers=2, progress=progress)
"""


@pytest.mark.fault
def test_killed_at_random_it_ends_with_the_same_tars(tmp_path: Path) -> None:
    manifest = data_set(tmp_path, 200, pairs_only=True)
    export(manifest, tmp_path / "whole", naming=TarNaming.IMG2DATASET)
    words = [str(manifest), str(tmp_path / "out"), str(random.randrange(7, 190))]
    assert fork_program(_DIES, *words, log=tmp_path / "log").wait() == -signal.SIGKILL
    assert export(manifest, tmp_path / "out", naming=TarNaming.IMG2DATASET).num_resumed > 0
    left = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "out")]
    assert left[0] == left[1]
