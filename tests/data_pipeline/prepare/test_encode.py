"""Encoded data sets: the same bytes for any number of processes and after a kill, and grids equal to the encoder's."""

from __future__ import annotations

import io
import json
import random
import signal
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from PIL import Image

from data_pipeline.errors import DataConfigError, ManifestError, SampleError
from data_pipeline.images.video import VideoConfig
from data_pipeline.prepare.choices import OnError
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.reshard import NamedManifest, ReshardSource, Selection
from data_pipeline.prepare.skipped import read_skipped
from data_pipeline.prepare.verify import check_manifest, jobs_of, verify
from data_pipeline.sample import ImagePart, VideoPart
from data_pipeline.shards.manifest import Manifest, write_manifest
from data_pipeline.shards.sample_reader import SampleReader, read_samples
from data_pipeline.shards.token_grid import GridTimes, decode_grid, encode_grid
from tests import videos
from tests.data_pipeline.conftest import Members, WriteSet, captioned, page, picture, plain_text
from tests.data_pipeline.prepare.encoders import DIGEST, BatchEncoder, encoded
from tests.engine.fork_server import fork_program
from tests.videos import stored_frames


class MeanEncoder(BatchEncoder):
    """The mean of each square of 8 x 8 pixels of an image or a pair of frames: codes that Pillow can compute too."""

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.integer[Any]]:
        *_, height, width = images.shape
        squares = images.reshape(len(images), -1, height // 8, 8, width // 8, 8).astype(np.int64)
        return squares.sum(axis=(1, 3, 5)) // (64 * squares.shape[1])


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
                codes, made_by, _ = decode_grid(part.grid, part.name)
                assert made_by == DIGEST
                with Image.open(io.BytesIO(part.data)) as image:
                    pixels = image.convert("RGB").resize(
                        (codes.shape[1] * 8, codes.shape[0] * 8), Image.Resampling.BICUBIC
                    )
                means = np.asarray(pixels, np.int64).reshape(codes.shape[0], 8, codes.shape[1], 8, 3).sum((1, 3, 4))
                assert np.abs(codes - means // 192).max() <= 1  # Two resizers may round a pixel differently.
    assert seen == sum(name.endswith(("png", "jpg")) for members in stored for name in members)


def frame_list(num_frames: int, seed: int = 0) -> Members:
    """Return a sample with a video that is stored as images of 32 x 32 pixels, eight a second."""
    frames = stored_frames(num_frames, seed=seed)
    listed = {"caption": "x", "videos": [{"video": list(frames), "fps": 8}]}
    return {**frames, "json": json.dumps(listed).encode()}


@pytest.mark.fault
def test_without_a_choice_of_frames_a_sample_with_a_video_is_a_bad_sample(write_set: WriteSet, tmp_path: Path) -> None:
    stored = [captioned(0), {"mp4": videos.encoded(2), "txt": b"x"}, frame_list(2)]
    source = encoded(write_set("a", stored), MeanEncoder(), video=None)
    report = ingest(source, tmp_path / "out", "b", on_error=OnError.SKIP)
    assert (report.num_samples, report.num_skipped) == (1, 2)
    with pytest.raises(SampleError, match="say which of its frames to encode with --video"):
        ingest(source, tmp_path / "fail", "b")


def expected_codes(frames: npt.NDArray[np.uint8], numbers: list[int]) -> npt.NDArray[np.int64]:
    """Return the codes of pairs of the chosen frames; the last one fills its pair."""
    chosen = frames[[*numbers, *[numbers[-1]] * (len(numbers) % 2)]].astype(np.int64)
    pairs = chosen.reshape(len(chosen) // 2, 2, 4, 8, 4, 8, 3)
    return pairs.sum(axis=(1, 3, 5, 6)) // 384


@pytest.mark.parametrize("grids_only", [False, True])
def test_the_grid_of_a_video_is_that_of_the_encoder(write_set: WriteSet, tmp_path: Path, grids_only: bool) -> None:
    clip, lists = videos.encoded(8), {count: frame_list(count) for count in (5, 3, 1)}
    stored: list[Members] = [{"mp4": clip, "txt": b"x"}, *lists.values(), captioned(1)]
    source = encoded(write_set("a", stored), MeanEncoder(), grids_only)
    report = ingest(source, tmp_path / "out", "b", image_tokenizer=source.image_tokenizer)
    assert all(shard.damages == [] for shard in verify(jobs_of(report.manifest)[1]))
    assert (report.orphans.no_image, report.orphans.no_text) == (0, 0)
    drawn = np.stack([videos.pictured(number, 32, 32) for number in range(8)])
    # The frames are the first ones of four equal parts, rounded down.
    chosen = [(videos.decoded(clip), [0, 2, 4, 6], 8), (drawn, [0, 1, 2, 3], 5), (drawn, [0, 1, 2], 3), (drawn, [0], 1)]
    reader = SampleReader(Manifest.open(report.manifest), "b")
    for number, (frames, numbers, total) in enumerate(chosen):
        sample = reader.read(number)
        (part,) = (part for part in sample.parts if isinstance(part, VideoPart))
        assert part.grid is not None
        codes, made_by, times = decode_grid(part.grid, part.name)
        np.testing.assert_array_equal(codes, expected_codes(frames, numbers))
        assert (made_by, times) == (DIGEST, (total / 8, 8 * len(numbers) / total))
        assert (len(part.data) == 0) == grids_only
        if grids_only:
            assert reader.read_without_images(number) == sample
    (image,) = (part for part in reader.read(4).parts if isinstance(part, ImagePart))
    assert image.grid is not None


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_video(write_set: WriteSet) -> None:
    values = {"frames": {"kind": "uniform", "num_frames": 32}, "min_pixels": 64 * 64, "max_pixels": 64 * 64}
    peaks = []
    for num_frames in (60, 600):
        stored: list[Members] = [{"mkv": videos.encoded(num_frames, height=64, width=64, kind="mkv"), "txt": b"x"}]
        video = VideoConfig.model_validate(values)
        source = encoded(write_set(f"a{num_frames}", stored), BatchEncoder(batch_pixels=1 << 14), video=video)
        ((row,),) = source.chunks()
        tracemalloc.start()
        (members,) = source.reader.read([row])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert not isinstance(members, SampleError)
        assert decode_grid(members["mkv.tokens"], "mkv").codes.shape == (16, 8, 8)
    assert peaks[1] < 1.5 * peaks[0]


def test_a_page_with_images_and_a_video_has_a_grid_of_each(write_set: WriteSet, tmp_path: Path) -> None:
    parts = [{"image": "0.png"}, {"text": "then"}, {"video": ["1.0000.png", "1.0001.png"], "fps": 2}]
    both = {"0.png": picture(1), **stored_frames(2, name="1."), "json": json.dumps({"parts": parts}).encode()}
    shared = [{"image": "0000.png"}, {"video": ["0000.png"], "fps": 1}]
    twice = {**stored_frames(2), "json": json.dumps({"parts": shared}).encode()}
    longer = [{"video": ["0000.png"], "fps": 1}, {"video": ["0000.png", "0001.png"], "fps": 1}]
    differ, same = (
        {**stored_frames(2), "json": json.dumps({"parts": each}).encode()} for each in (longer, longer[1:] * 2)
    )
    source = encoded(write_set("a", [both, twice, differ, same]), MeanEncoder())
    report = ingest(source, tmp_path / "out", "b", on_error=OnError.SKIP)
    assert [row.reason.partition(", which")[0] for row in read_skipped(report.skipped)] == [
        "0000.png is an image and the first frame of a video",
        "0000.png is the first frame of two videos",
    ]
    sample, repeated = read_samples(report.manifest)
    assert [part.grid is not None for part in repeated.parts if isinstance(part, VideoPart)] == [True, True]
    image, _, video = sample.parts
    assert isinstance(image, ImagePart)
    assert isinstance(video, VideoPart)
    assert image.grid is not None
    assert video.grid is not None
    assert decode_grid(image.grid, "").times is None
    assert decode_grid(video.grid, "").codes.shape == (1, 4, 4)


@pytest.mark.fault
@pytest.mark.parametrize("name", ["tiling", "start", "timestamps"])
def test_tokens_and_tiles_of_videos_are_refused(write_set: WriteSet, name: str) -> None:
    value = {"kind": "mm1_5", "min_tiles": 1, "max_tiles": 2} if name == "tiling" else "x"
    video = VideoConfig.model_validate({name: value})
    with pytest.raises(DataConfigError, match=rf"video\.{name}: a token grid holds the codes of whole frames alone"):
        encoded(write_set("a", [captioned(0)]), MeanEncoder(), video=video)


def test_without_pixels_a_sample_is_read_like_any_other(write_set: WriteSet, tmp_path: Path) -> None:
    stored = samples(12)
    report = ingest(encoded(write_set("a", stored), MeanEncoder(), grids_only=True), tmp_path / "out", "b")
    assert report.orphans.no_image == 3  # The plain texts.
    assert sum(shard.orphans.no_image for shard in verify(jobs_of(report.manifest)[1])) == 3
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
    stored = samples(90)
    stored[7::9] = [frame_list(3, seed) for seed in range(len(stored[7::9]))]
    manifest = write_set("a", stored)
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
    cut = {"mp4": videos.encoded(4)[:-400], "txt": b"x"}
    stored = [captioned(0), {"png": b"junk", "txt": b"x"}, captioned(2), cut, frame_list(2)]
    source = encoded(write_set("a", stored), MeanEncoder())
    with pytest.raises(SampleError, match=r"row 2 \(000001\): no JPEG, PNG or WebP"):
        ingest(source, tmp_path / "fail", "b")
    assert ingest(source, tmp_path / "skip", "b", on_error=OnError.SKIP).num_samples == 3


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
@pytest.mark.parametrize("times", [None, GridTimes(0.1 + 0.2, 30000 / 1001)])
def test_a_grid_is_read_as_it_was_written(size: int, times: GridTimes | None) -> None:
    codes = np.random.default_rng(0).integers(0, size, (3, 5) if times is None else (2, 3, 5))
    data = encode_grid(codes, size, DIGEST, times)
    found = decode_grid(data, "jpg")
    np.testing.assert_array_equal(found.codes, codes)
    assert (found.tokenizer, found.times) == (DIGEST, times)
    named = {} if times is None else {name: repr(value) for name, value in times._asdict().items()}
    stored = codes.astype(np.uint16 if size <= 1 << 16 else np.uint32)
    theirs = safetensors.numpy.save({"codes": stored}, {"tokenizer": DIGEST, **named})
    assert len(theirs) == len(data)
    assert times is not None or theirs == data  # Theirs orders several metadata at random.
    np.testing.assert_array_equal(safetensors.numpy.load(data)["codes"], stored)


@pytest.mark.fault
def test_a_damaged_grid_is_a_bad_sample() -> None:
    data = encode_grid(np.zeros((2, 3), np.int64), 9, DIGEST)
    entry = {"dtype": "U16", "shape": [2, 3], "data_offsets": [0, 12]}
    good = {"codes": entry, "__metadata__": {"tokenizer": DIGEST}}
    clip = {"seconds": "1.0", "frames_per_second": "4.0"}
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
        {**good, "codes": {**entry, "shape": [1, 2, 3]}},
        *(
            {"codes": {**entry, "shape": [1, 2, 3]}, "__metadata__": {"tokenizer": DIGEST, **clip, **change}}
            for change in ({"seconds": "nan"}, {"seconds": -1}, {"seconds": [1]}, {"frames_per_second": 0})
        ),
        {"codes": {**entry, "shape": [1, 1, 2, 3]}, "__metadata__": {"tokenizer": DIGEST, **clip}},
        {"codes": {**entry, "shape": [1, 2, 3]}, "__metadata__": {"tokenizer": DIGEST, **clip, "seconds": 10**400}},
    ]
    headers = [json.dumps(each).encode() for each in bad]
    damaged = [len(header).to_bytes(8, "little") + header + bytes(12) for header in headers]
    damaged += [data[:-1], data + b"\0", data[:5], b"", b"\xff" * 8 + data[8:]]
    for each in damaged:
        with pytest.raises(SampleError, match=r"\.jpg: damaged token grid"):
            decode_grid(each, "jpg")
    with pytest.raises(ValueError, match="values below 3"):
        encode_grid(np.full((2, 2), 3), 3, DIGEST)
    with pytest.raises(ValueError, match=r"expected \(time, height, width\)"):
        encode_grid(np.full((2, 2), 1), 3, DIGEST, GridTimes(1, 4))


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
