"""Encoded data sets: the same bytes for any number of processes and after a kill, and grids equal to the encoder's."""

from __future__ import annotations

import io
import json
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data_pipeline.errors import DataConfigError, ManifestError, SampleError
from data_pipeline.prepare.choices import OnError
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.reshard import NamedManifest, ReshardSource, Selection
from data_pipeline.prepare.verify import check_manifest, jobs_of, verify
from data_pipeline.sample import ImagePart
from data_pipeline.shards.manifest import Manifest, write_manifest
from data_pipeline.shards.sample_reader import SampleReader, read_samples
from data_pipeline.shards.token_grid import decode_grid, encode_grid
from tests import videos
from tests.data_pipeline.conftest import Members, WriteSet, captioned, page, picture, plain_text
from tests.data_pipeline.prepare.encoders import DIGEST, BatchEncoder, encoded
from tests.engine.fork_server import fork_program
from tests.videos import stored_frames


class MeanEncoder(BatchEncoder):
    """The mean of each square of 8 x 8 pixels: codes that Pillow can compute too."""

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.integer[Any]]:
        count, _, height, width = images.shape
        squares = images.reshape(count, 3, height // 8, 8, width // 8, 8).astype(np.int64)
        return squares.sum(axis=(1, 3, 5)) // 192


def samples(count: int) -> list[Members]:
    """Write pictures of three sizes, texts and pages."""
    kinds = [captioned, plain_text, page, lambda n: {"png": picture(n, 8 * (2 + n % 2), 24), "txt": b"x"}]
    return [kinds[number % 4](number) for number in range(count)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_grids_are_those_of_the_encoder_and_all_else_is_kept(write_set: WriteSet, tmp_path: Path) -> None:
    stored = samples(70)
    source = encoded(write_set("a", stored), MeanEncoder())
    report = ingest(source, tmp_path / "out", "b", image_tokenizer=source.image_tokenizer)
    manifest = Manifest.open(report.manifest)
    assert manifest.image_tokenizer == DIGEST
    assert manifest.computed_fingerprint() == manifest.fingerprint
    assert check_manifest(str(report.manifest)) == []
    assert all(shard.damages == [] for shard in verify(jobs_of(report.manifest)[1]))
    assert report.orphans.no_text == 0
    found = list(read_samples(report.manifest))
    assert len(found) == 70
    seen = 0
    for members, sample in zip(stored, found, strict=True):
        for part in sample.parts:
            if isinstance(part, ImagePart):
                seen += 1
                assert part.data == members[part.name]
                assert part.grid is not None
                codes, made_by = decode_grid(part.grid, part.name)
                assert made_by == DIGEST
                with Image.open(io.BytesIO(part.data)) as image:
                    pixels = image.convert("RGB").resize(
                        (codes.shape[1] * 8, codes.shape[0] * 8), Image.Resampling.BICUBIC
                    )
                means = np.asarray(pixels, np.int64).reshape(codes.shape[0], 8, codes.shape[1], 8, 3).sum((1, 3, 4))
                assert np.abs(codes - means // 192).max() <= 1  # Two resizers may round a pixel differently.
    assert seen == sum(name.endswith(("png", "jpg")) for members in stored for name in members)


def test_a_sample_with_a_video_is_a_bad_sample(write_set: WriteSet, tmp_path: Path) -> None:
    frames = stored_frames(2)
    listed = json.dumps({"caption": "x", "videos": [{"video": list(frames), "fps": 2}]}).encode()
    stored = [captioned(0), {"mp4": videos.encoded(2), "txt": b"x"}, {**frames, "json": listed}]
    report = ingest(encoded(write_set("a", stored), MeanEncoder()), tmp_path / "out", "b", on_error=OnError.SKIP)
    assert (report.num_samples, report.num_skipped) == (1, 2)


def test_without_pixels_a_sample_is_read_like_any_other(write_set: WriteSet, tmp_path: Path) -> None:
    stored = samples(12)
    report = ingest(encoded(write_set("a", stored), MeanEncoder(), grids_only=True), tmp_path / "out", "b")
    assert report.orphans.no_image == 3  # The plain texts.
    assert all(shard.damages == [] for shard in verify(jobs_of(report.manifest)[1]))
    reader = SampleReader(Manifest.open(report.manifest), "b")
    for number, members in enumerate(stored):
        sample = reader.read(number)
        images = [part for part in sample.parts if isinstance(part, ImagePart)]
        assert sorted(image.name for image in images) == sorted(n for n in members if n.endswith(("png", "jpg")))
        assert all(image.data == b"" and image.grid for image in images)
        assert reader.read_without_images(number) == sample


_DIES = """
import os, signal, sys
from pathlib import Path
from data_pipeline.prepare.ingest import ingest
from tests.data_pipeline.prepare.encoders import BatchEncoder, encoded
rows = 0
def progress(count):
    global rows
    rows += count
    if rows >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
source = encoded(Path(sys.argv[1]), BatchEncoder())
ingest(source, sys.argv[2], "b", max_samples=5, workers=2, image_tokenizer=source.image_tokenizer, progress=progress)
"""


@pytest.mark.fault
def test_killed_it_ends_with_the_bytes_of_one_process(write_set: WriteSet, tmp_path: Path) -> None:
    """The encoder's codes depend on the batch, so a resume that begins inside a chunk must rebuild the batch."""
    manifest = write_set("a", samples(90))
    source, out = encoded(manifest, BatchEncoder()), tmp_path / "out"
    options: dict[str, Any] = {"max_samples": 5, "image_tokenizer": source.image_tokenizer}
    ingest(source, tmp_path / "whole", "b", **options)
    dies_at = random.Random(4).randrange(20, 80)
    process = fork_program(_DIES, str(manifest), str(out), str(dies_at), log=tmp_path / "log")
    assert process.wait() == -signal.SIGKILL
    assert list(out.glob("*.index"))
    with pytest.raises(DataConfigError, match="unfinished ingest of another source"):
        ingest(encoded(manifest, BatchEncoder("cd" * 32)), out, "b", **options)
    report = ingest(source, out, "b", **options)
    assert report.num_resumed % 32, "the resume began at a chunk, so it tested nothing"
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.fault
def test_an_image_that_cannot_be_encoded_fails_or_is_left_out(write_set: WriteSet, tmp_path: Path) -> None:
    source = encoded(write_set("a", [captioned(0), {"png": b"junk", "txt": b"x"}, captioned(2)]), MeanEncoder())
    with pytest.raises(SampleError, match="row 2: no JPEG, PNG or WebP"):
        ingest(source, tmp_path / "fail", "b")
    assert ingest(source, tmp_path / "skip", "b", on_error=OnError.SKIP).num_samples == 2


@pytest.mark.fault
def test_transforms_with_several_crops_are_refused(write_set: WriteSet) -> None:
    manifest = write_set("a", samples(2))
    with pytest.raises(DataConfigError, match="several crops"):
        encoded(manifest, MeanEncoder(), kind="tiles", size=16)


@pytest.mark.fault
def test_sets_of_different_tokenizers_are_not_joined(write_set: WriteSet, tmp_path: Path) -> None:
    plain, sets = write_set("a", samples(4)), []
    for name, digest in (("b", DIGEST), ("c", DIGEST), ("d", "cd" * 32)):
        source = encoded(plain, MeanEncoder(digest))
        report = ingest(source, tmp_path / name, name, image_tokenizer=source.image_tokenizer)
        sets.append(NamedManifest(name, report.manifest))
    assert ReshardSource(sets[:2], Selection()).image_tokenizer == DIGEST
    assert ReshardSource([NamedManifest("a", plain), sets[0]], Selection()).image_tokenizer == DIGEST
    with pytest.raises(DataConfigError, match="of different image tokenizers"):
        ReshardSource(sets, Selection())


@pytest.mark.parametrize("size", [1, 1 << 16, (1 << 16) + 1])
def test_a_grid_is_read_as_it_was_written(size: int) -> None:
    codes = np.random.default_rng(0).integers(0, size, (3, 5))
    data = encode_grid(codes, size, DIGEST)
    found = decode_grid(data, "jpg")
    np.testing.assert_array_equal(found.codes, codes)
    assert found.tokenizer == DIGEST


@pytest.mark.fault
def test_a_damaged_grid_is_a_bad_sample() -> None:
    data = encode_grid(np.zeros((2, 3), np.int64), 9, DIGEST)
    entry = {"dtype": "U16", "shape": [2, 3], "data_offsets": [0, 12]}
    good = {"codes": entry, "__metadata__": {"tokenizer": DIGEST}}
    bad: list[Any] = [
        {},
        [],
        {**good, "codes": {**entry, "shape": [2, 4]}},
        {**good, "codes": {**entry, "shape": [-2, -3]}},
        {**good, "codes": {**entry, "shape": [2.0, 3]}},
        {**good, "codes": {**entry, "shape": [1 << 40, 0]}},
        {**good, "codes": {**entry, "dtype": "I64"}},
        {**good, "codes": {**entry, "dtype": []}},
        {**good, "codes": None},
        {**good, "__metadata__": {"tokenizer": 3}},
    ]
    headers = [json.dumps(each).encode() for each in bad]
    damaged = [len(header).to_bytes(8, "little") + header + bytes(12) for header in headers]
    damaged += [data[:-1], data + b"\0", data[:5], b"", b"\xff" * 8 + data[8:]]
    for each in damaged:
        with pytest.raises(SampleError, match=r"\.jpg: damaged token grid"):
            decode_grid(each, "jpg")
    with pytest.raises(ValueError, match="values below 3"):
        encode_grid(np.full((2, 2), 3), 3, DIGEST)


@pytest.mark.fault
def test_a_manifest_with_a_damaged_tokenizer_is_refused(write_set: WriteSet) -> None:
    path = write_set("a", samples(2))
    manifest = Manifest.open(path)
    write_manifest(path, [manifest.shard_path(0)], image_tokenizer=DIGEST)
    raw = path.read_bytes()
    assert raw.count(b'\\"' + DIGEST.encode() + b'\\"') == 1
    path.write_bytes(raw.replace(b'\\"' + DIGEST.encode() + b'\\"', b"1" + b" " * (len(DIGEST) + 3)))
    with pytest.raises(ManifestError, match="the image tokenizer is 1"):
        Manifest.open(path)
