"""Videos stored as images: the same frames, plans and pixels as a video file, and bad lists of frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.history.digest import digest
from data_pipeline.images.video import VideoConfig, VideoTransform
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.prepare.stats.count import count
from data_pipeline.prepare.stats.gallery import gallery
from data_pipeline.prepare.verify import jobs_of, verify
from data_pipeline.sample import ImagePart, Provenance, Sample, StoredFrames, TextPart, VideoPart, VideoSize
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader, assemble
from tests.data_pipeline.conftest import Members, WriteSet, picture
from tests.data_pipeline.loader.test_videos import data_config
from tests.videos import encoded, pictured, stored_frames

SPEC = MediaSpec(Placement.EMBEDDING, patch_size=8, merge=2, frames_per_patch=2)
LIMITS = {"min_pixels": 256, "max_pixels": 64 * 64}


def _members(fields: dict[str, Any], frames: dict[str, bytes]) -> Members:
    return {**frames, "json": json.dumps(fields).encode()}


def _assembled(members: Members) -> Sample:
    return assemble(members, Provenance("?", "?", "000", 0))


def _videos(sample: Sample) -> list[VideoPart]:
    return [part for part in sample.parts if isinstance(part, VideoPart)]


def test_frames_give_the_plan_of_a_file_and_the_pixels_of_the_images(write_set: WriteSet) -> None:
    frames = stored_frames(10, height=48)
    turns = {"messages": [{"role": "user", "content": "<image><video>?"}, {"role": "assistant", "content": "x"}]}
    listed = _members({**turns, "videos": [{"video": list(frames), "fps": 8}]}, {**frames, "0.png": picture(0)})
    paged = {"parts": [{"text": "a"}, {"video": [f"C.{name}" for name in frames], "fps": 8}]}
    page = _members(paged, {f"c.{name}": data for name, data in frames.items()})
    reader = SampleReader(Manifest.open(write_set("clips", [listed, page])), "clips")
    kinds = [[type(part) for part in reader.read(number).parts] for number in (0, 1)]
    assert kinds == [[ImagePart, VideoPart], [TextPart, VideoPart]]
    config = VideoConfig.model_validate({**LIMITS, "frames": {"kind": "rate", "per_second": 4, "min_frames": 2}})
    transform = VideoTransform(config, SPEC)
    like = transform.decode_task(VideoPart(encoded(10, height=48, per_second=8), "mp4"))
    for number in (0, 1):
        (video,), (planned,) = _videos(reader.read(number)), _videos(reader.read_without_images(number))
        assert (len(planned.data), planned.size) == (0, VideoSize(10, 1_250_000, 48, 32))
        bare = VideoPart(video.data, video.name)
        for task in (transform.decode_task(video), transform.decode_task(bare)):
            task.decode()
            assert task.item.grid == like.item.grid == transform.dry_run(planned.size)[0].grid == (2, 6, 4)
            shown = [pictured(i, 48, 32) for i in (0, 3, 6, 9)]
            patches = np.stack([p.reshape(6, 8, 4, 8, 3).transpose(0, 2, 4, 1, 3).reshape(24, -1) for p in shown])
            np.testing.assert_array_equal(task.item.values.reshape(2, 24, -1), patches[::2])
            np.testing.assert_array_equal(task.item.later_values.reshape(2, 24, -1), patches[1::2])
    reader.close()


@pytest.mark.long
def test_batches_depend_on_no_rank_and_no_worker(write_set: WriteSet, tokenizer_path: Path) -> None:
    samples = list[Members]()
    for number in range(8):
        frames = stored_frames(3 + number % 3, seed=number, encoding=("PNG", "JPEG")[number % 2])
        turns = [{"role": "user", "content": f"<video> {number}"}, {"role": "assistant", "content": "x"}]
        samples.append(_members({"messages": turns, "videos": [{"video": list(frames), "fps": 8}]}, frames))
    config = data_config(write_set("clips", samples), tokenizer_path)
    plain = list(digest(config, SPEC, 1, range(3)))
    assert len({checksum for _, checksum in plain}) == 3
    assert list(digest(config, SPEC, 1, range(1, 3), world_size=3, workers=1, resume_at=1)) == plain[1:]


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ({"video": [], "fps": 8}, "0 frames"),
        ({"video": ["0000.png"]}, "fps is None"),
        ({"video": ["0000.png"], "fps": 0}, "fps is 0"),
        ({"video": ["0000.png"], "fps": float("inf")}, "fps is inf"),
        ({"video": ["0000.png"], "fps": 10**400}, "fps is 1000"),
        ({"video": ["0000.png", "0009.png"], "fps": 8}, "'0009.png', which is no image among the 3 members"),
        ({"video": ["../0000.png", 3], "fps": 8}, "names the frame 3"),
    ],
)
@pytest.mark.fault
def test_a_malformed_list_of_frames_is_a_bad_sample(clip: dict[str, Any], message: str) -> None:
    for fields in ({"videos": [clip]}, {"parts": [clip]}):
        with pytest.raises(SampleError, match=message) as raised:
            _assembled(_members(fields, stored_frames(2)))
        assert raised.value.kind is FaultKind.TEXT


@pytest.mark.fault
def test_frames_that_are_damaged_or_differ_in_size_are_a_bad_sample(write_set: WriteSet) -> None:
    fields = {"caption": "x", "videos": [{"video": ["0000.png", "0001.png"], "fps": 8}]}
    odd = {**stored_frames(1), "0001.png": picture(0)}
    cut = {**stored_frames(2), "0001.png": stored_frames(2)["0001.png"][:90]}
    reader = SampleReader(Manifest.open(write_set("bad", [_members(fields, odd), _members(fields, cut)])), "bad")
    transform = VideoTransform(VideoConfig.model_validate(LIMITS), SPEC)
    for number, message in ((0, "differ in size"), (1, "damaged png")):
        (video,) = _videos(reader.read(number))
        with pytest.raises(SampleError, match=message) as raised:
            transform.decode_task(video).decode()
        assert raised.value.kind is FaultKind.DECODE
    with pytest.raises(SampleError, match="frame 1 has 20x16 pixels"):
        transform.decode_task(VideoPart(StoredFrames(tuple(odd.values()), 8.0), "0000.png"))
    reader.close()


def test_verify_and_statistics_know_stored_frames(write_set: WriteSet) -> None:
    fields = {"caption": "x", "videos": [{"video": [*stored_frames(6)], "fps": 4}]}
    manifest: Path = write_set("clips", [_members(fields, stored_frames(6)), {"png": picture(1), "txt": b"y"}])
    (report,) = verify(jobs_of(manifest)[1])
    assert not report.damages
    summary = count(manifest).summary
    assert (summary["videos"]["count"], summary["videos"]["frames"]["max"]) == (1, 6)
    assert (summary["videos"]["seconds"]["max"], summary["images"]["count"]) == (1.5, 7)
    (shown,) = [one for one in gallery(Manifest.open(manifest), 2) if one.num_images and len(one.thumbnails) > 1]
    assert (len(shown.thumbnails), shown.size, shown.problem) == (4, (32, 32), "")
    wrong = _members({"parts": [{"video": ["0000.png", "7.png"], "fps": 8}]}, stored_frames(1))
    (report,) = verify(jobs_of(write_set("wrong", [wrong]))[1])
    assert "'7.png'" in str(report.damages)


@pytest.mark.fault
def test_mutated_frames_raise_nothing_else() -> None:
    rng, num_bad = np.random.default_rng(0), 0
    transform = VideoTransform(VideoConfig.model_validate(LIMITS), SPEC)
    for number in range(30):
        frames = stored_frames(4, encoding=("JPEG", "PNG", "WEBP")[number % 3])
        name = list(frames)[number % 4]
        changed = bytearray(_members({"videos": [{"video": list(frames), "fps": 8}]}, frames)["json"])
        target = changed if number % 5 == 0 else bytearray(frames[name])
        for _ in range(int(rng.integers(1, 8))):
            target[rng.integers(len(target))] = rng.integers(256)
        if number % 4 == 0:
            del target[rng.integers(len(target)) :]
        members = {**frames, "json": bytes(changed)} | ({} if number % 5 == 0 else {name: bytes(target)})
        try:
            for video in _videos(_assembled(members)):
                transform.decode_task(video).decode()
        except SampleError:
            num_bad += 1
    assert 0 < num_bad < 30
