"""Tars that webdataset wrote and tars that webdataset reads: equal samples, with an index and streamed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from data_pipeline.loader.front_to_back import StreamedSet, expand_shards
from data_pipeline.order.fault_lists import RunFaults
from data_pipeline.order.fault_policy import FaultConfig
from data_pipeline.sample import ImagePart, Sample
from data_pipeline.shards.index import build_index
from data_pipeline.shards.manifest import Manifest, write_manifest
from data_pipeline.shards.sample_reader import SampleReader, read_samples
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.storage.storage import Storage
from tests.data_pipeline.conftest import picture

LONG = "folder/" * 20 + "of-a-long-name"
KEYS = ["a/000", "a/001", "é-2", LONG, *(f"{number:04d}" for number in range(9))]


def _members(number: int) -> dict[str, bytes]:
    fields = {"name": f"thing {number}", "captions": [f"caption {number}", "ü" * number]}
    images = (
        {"png": picture(number)} if number % 3 else {"0.png": picture(number), "1.jpg": picture(1, encoding="JPEG")}
    )
    return {**images, "json": json.dumps(fields).encode(), "cls": b"%d" % number}


SAMPLES = {key: _members(number) for number, key in enumerate(KEYS)}


def test_a_tar_written_here_is_read_by_plain_webdataset(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "part", max_samples=5) as writer:
        for key, members in SAMPLES.items():
            writer.write(key, members)
    assert len(writer.shards) == 3
    urls = str(tmp_path / "part-{00000..00002}.tar")
    raw = list(wds.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in raw] == KEYS
    assert [_content(sample) for sample in raw] == list(SAMPLES.values())
    decoded = list(wds.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    for sample, members in zip(decoded, SAMPLES.values(), strict=True):
        assert sample["json"] == json.loads(members["json"])
        assert sample["cls"] == int(members["cls"])
        for ext in {"png", "0.png", "1.jpg"} & set(members):
            with Image.open(io.BytesIO(members[ext])) as image:
                assert np.array_equal(sample[ext], np.asarray(image))


def _content(sample: dict[str, Any]) -> dict[str, bytes]:
    return {ext: value for ext, value in sample.items() if not ext.startswith("__")}


@pytest.mark.parametrize("kind", ["TarWriter", "ShardWriter", "tgz"])
def test_a_tar_that_webdataset_wrote_is_read_here_with_an_index_and_streamed(kind: str, tmp_path: Path) -> None:
    samples = [{"__key__": key, **members} for key, members in SAMPLES.items()]
    if kind == "ShardWriter":
        with wds.ShardWriter(str(tmp_path / "part-%05d.tar"), maxcount=5, verbose=0, encoder=False) as shards:
            for sample in samples:
                shards.write(sample)
    else:
        name = "part.tar" if kind == "TarWriter" else "part.tar.gz"
        with wds.TarWriter(str(tmp_path / name), encoder=False) as tar:
            for sample in samples:
                tar.write(sample)
    paths = sorted(tmp_path.glob("part*"))
    assert len(paths) == (3 if kind == "ShardWriter" else 1)
    streamed = _streamed([str(path) for path in paths])
    assert set(streamed) == set(KEYS)
    for key, sample in streamed.items():
        assert _images(sample) == [SAMPLES[key][ext] for ext in ("png", "0.png", "1.jpg") if ext in SAMPLES[key]]
        assert sample.fields["name"] == json.loads(SAMPLES[key]["json"])["name"]
    if kind == "tgz":
        return  # Only plain tars can be indexed.
    for path in paths:
        build_index(path)
    write_manifest(tmp_path / "all.manifest", paths)
    indexed = {sample.provenance.key: sample for sample in read_samples(tmp_path / "all.manifest")}
    assert list(indexed) == KEYS
    for key, sample in indexed.items():
        assert _images(sample) == _images(streamed[key])
        assert [part for part in sample.parts if not isinstance(part, ImagePart)] == [
            part for part in streamed[key].parts if not isinstance(part, ImagePart)
        ]
        assert sample.fields == streamed[key].fields
        assert sample.provenance.shard == streamed[key].provenance.shard
    reader = SampleReader(Manifest.open(tmp_path / "all.manifest"), "one")
    assert _images(reader.read(7)) == _images(streamed[KEYS[7]])
    reader.close()


def _streamed(paths: list[str]) -> dict[str, Sample]:
    """Return the samples of one epoch of two lanes, by key."""
    with Storage() as storage:
        shared = StreamedSet("plain", expand_shards(paths), 1, 4, storage, RunFaults(FaultConfig()))
        found = dict[str, Sample]()
        for lane in range(2):
            source = shared.lane(lane, 2)
            for place, *_ in source.epoch(0):
                sample = source.read(place.sample, place.epoch)
                assert sample.provenance.key not in found
                found[sample.provenance.key] = sample
    return found


def _images(sample: Sample) -> list[bytes]:
    return [part.data for part in sample.parts if isinstance(part, ImagePart)]
