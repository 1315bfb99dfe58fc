"""Videos: chosen frames, seeking, sizes and pixels against PyAV and transformers; damaged and hostile files."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from transformers import Qwen2VLVideoProcessor
from transformers.video_utils import VideoMetadata

from data_pipeline.errors import DataConfigError, FaultKind, SampleError
from data_pipeline.images.frame_choice import RateChoice, TimesChoice, UniformChoice
from data_pipeline.images.transforms import ImageTransform, TilesTransform
from data_pipeline.images.video import VideoConfig, VideoTransform
from data_pipeline.media_spec import MediaSpec, Placement, SquarePooling
from data_pipeline.sample import VideoPart, VideoSize
from data_pipeline.shards.video_file import VideoFile, video_size
from mmscale.models.connectors.projector import merge_order
from tests.videos import decoded, encoded

SPEC = MediaSpec(Placement.EMBEDDING, patch_size=8, merge=2, frames_per_patch=2)
LIMITS = {"min_pixels": 16 * 16, "max_pixels": 64 * 64}
KINDS = [("mp4", "mpeg4"), ("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx-vp9"), ("webm", "libvpx")]
KINDS += [("gif", "gif")]


def _item(data: bytes, spec: MediaSpec = SPEC, **config: Any) -> Any:
    task = VideoTransform(VideoConfig.model_validate({**LIMITS, **config}), spec).decode_task(VideoPart(data, "mp4"))
    task.decode()
    return task.item


def _frames(item: Any, spec: MediaSpec = SPEC) -> np.ndarray:
    """Return the frames of an item ``(frames, height, width, 3)``."""
    time, rows, columns = item.grid
    side, parts = spec.patch_size, [item.values]
    if item.later_values is not None:
        parts += np.split(item.later_values, spec.frames_per_patch - 1, axis=1)
    patches = np.stack([part.reshape(time, rows, columns, 3, side, side) for part in parts], axis=1)
    return patches.transpose(0, 1, 2, 5, 3, 6, 4).reshape(-1, rows * side, columns * side, 3)


@pytest.mark.parametrize(("kind", "codec"), KINDS)
def test_single_frames_equal_those_of_decoding_from_the_start(kind: str, codec: str) -> None:
    data = encoded(13, kind=kind, codec=codec, key_every=5, height=48)
    expected = decoded(data)
    with VideoFile(data) as file:
        assert (file.num_frames, len(expected)) == (13, 13)
        for numbers in ([0], [12], [4, 5], [11, 2, 6], [*range(13)]):
            found = dict(file.decode(numbers))
            assert list(found) == sorted(numbers)
            assert all((found[number] == expected[number]).all() for number in numbers)
        if kind != "gif":  # A frame of a GIF changes the frame before it.
            assert file.num_decoded([12]) <= 5
        assert file.num_decoded([0, 12]) <= file.num_decoded([*range(13)]) == 13
    assert video_size(data) == VideoSize(13, file.microseconds, 48, 32)
    assert file.microseconds == pytest.approx(13 / 8 * 1e6, rel=0.01)


def test_a_rotated_video_is_upright() -> None:
    data = encoded(4, width=48, rotation=90)
    assert video_size(data)[2:] == (48, 32)
    with VideoFile(data) as file:
        ((_, pixels),) = file.decode([3])
    np.testing.assert_array_equal(pixels, np.rot90(decoded(data)[3]))
    assert _item(data).grid == (2, 6, 4)


def test_a_clip_that_an_edit_list_trims_is_whole() -> None:
    """Phones trim a clip so: all of its frames remain in the file."""
    data = bytearray(encoded(16, codec="libx264"))
    at = data.index(b"elst") + 12
    data[at : at + 4] = (500).to_bytes(4, "big")  # Milliseconds.
    assert video_size(bytes(data))[:2] == (4, 500_000)


@given(
    total=st.integers(2, 3000),
    rate=st.sampled_from([8.0, 10.0, 24000 / 1001, 25.0, 30.0, 60.0]),
    wanted=st.sampled_from([0.5, 1.0, 2.0, 3.0, 7.0]),
    limits=st.sampled_from([(4, 768), (2, 16), (1, 5)]),
)
@example(total=100, rate=30.0, wanted=3.0, limits=(2, 16))  # 3.333333 s in the index.
def test_frames_by_rate_are_those_of_the_references(
    total: int, rate: float, wanted: float, limits: tuple[int, int]
) -> None:
    """transformers, and the code of the authors (qwen-vl-utils, ``smart_nframes`` and ``linspace``)."""
    size, times = VideoSize(total, round(total / rate * 1e6), 32, 32), np.arange(total) / rate
    keys = {"per_second": wanted, "min_frames": limits[0], "max_frames": limits[1]}
    ours = RateChoice(**keys, spread="starts")
    if total / rate * wanted >= 2 and limits[1] % 2 == 0:
        processor = Qwen2VLVideoProcessor(min_frames=limits[0], max_frames=limits[1])
        metadata = VideoMetadata(total_num_frames=total, fps=rate, duration=total / rate)
        theirs = processor.sample_frames(metadata, fps=wanted, temporal_patch_size=2).tolist()
        # Rounding makes their last step end at frame ``total``, which does not exist, for 17 frames at 7 of 8 a second.
        assert ours.numbers(times, size, ours.count(size, 2)) == [number for number in theirs if number < total]
    least, most = math.ceil(limits[0] / 2) * 2, math.floor(min(limits[1], total) / 2) * 2
    count = math.floor(min(min(max(total / rate * wanted, least), most), total) / 2) * 2
    ends = RateChoice(**keys)
    assert ends.count(size, 2) == count
    assert ends.numbers(times, size, count) == torch.linspace(0, total - 1, count).round().long().tolist()


def test_frames_of_a_variable_rate_are_chosen_by_time() -> None:
    starts = [0, 1, 2, 3, 4, 5, 6, 7, 17, 24]
    data = encoded(10, starts=starts)
    with VideoFile(data) as file:
        assert (file.times * 8).tolist() == starts
        size = video_size(data)
        assert UniformChoice(num_frames=4).numbers(file.times, size, 4) == [0, 7, 8, 9]  # Near 0, 8, 16 and 24 units.
        assert UniformChoice(num_frames=2, spread="starts").numbers(file.times, size, 2) == [0, 7]
        assert TimesChoice(seconds=(0.0, 0.2, 0.5, 1.9, 3.0)).numbers(file.times, size, 5) == [0, 1, 4, 7, 9]
    item = _item(data, frames={"kind": "times", "seconds": [0, 0.2, 1.9]})
    expected = decoded(data)[[0, 1, 7, 7]]  # The last one fills the second pair.
    np.testing.assert_array_equal(_frames(item), expected)
    with pytest.raises(SampleError, match="has no frame at 9"):
        _item(data, frames={"kind": "times", "seconds": [9.0]})


@pytest.mark.parametrize(
    ("shape", "cap"), [((5, 60, 44), None), ((8, 32, 80), 40), ((1, 30, 30), None), ((2, 70, 30), 9)]
)
def test_pixels_and_grid_equal_those_of_the_processor(shape: tuple[int, int, int], cap: int | None) -> None:
    data = encoded(shape[0], height=shape[1], width=shape[2])
    item = _item(data, frames={"kind": "uniform", "num_frames": 64}, max_tokens=cap)
    # Their budget is 0.9 times the tokens.
    capped = {"cap_pixels_per_frame": cap is not None, "max_video_tokens": (cap or 9) * 10 / 9}
    processor = Qwen2VLVideoProcessor(patch_size=8, **LIMITS, **capped)
    videos = [torch.from_numpy(decoded(data)).permute(0, 3, 1, 2)]
    found = processor(videos, return_tensors="pt", do_rescale=False, do_normalize=False)
    assert found["video_grid_thw"][0].tolist() == list(item.grid)
    order = merge_order([item.grid], 2)
    values = found["pixel_values_videos"].view(len(order), 3, 2, -1)
    later = item.values if item.later_values is None else item.later_values
    for frame, ours in enumerate((item.values, later)):
        assert torch.equal(torch.from_numpy(ours[order]).view(len(order), 3, -1), values[:, :, frame])


def test_frames_resized_alone_and_together_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    data, found = encoded(5, height=60, width=44), []
    for num_together in (1, 2, 9):
        monkeypatch.setattr("data_pipeline.images.video._PIXELS_TOGETHER", num_together * 60 * 44)
        found.append(_frames(_item(data, frames={"kind": "uniform", "num_frames": 5}, max_pixels=24 * 24)))
    assert len({tuple(frame.reshape(-1)) for frame in found[0]}) == 5
    assert all((frames == found[0]).all() for frames in found)


@pytest.mark.parametrize("count", range(1, 8))
def test_max_tokens_bounds_even_and_odd_numbers_of_frames(count: int) -> None:
    limits = {"min_pixels": 1, "max_pixels": 64 * 64, "max_tokens": 6}
    config = VideoConfig.model_validate({**limits, "frames": {"kind": "uniform", "num_frames": count}})
    (item,) = VideoTransform(config, SPEC).dry_run(VideoSize(9, 1_000_000, 120, 80))
    time, rows, columns = item.grid
    assert time == math.ceil(count / 2)
    assert time <= time * (rows // 2) * (columns // 2) <= 6


def test_towers_of_single_frames_and_of_one_size_take_videos() -> None:
    data = encoded(3)
    item = _item(data, MediaSpec(Placement.EMBEDDING, patch_size=8), frames={"kind": "uniform", "num_frames": 3})
    assert (item.grid, item.later_values) == ((3, 4, 4), None)
    np.testing.assert_array_equal(_frames(item, MediaSpec(patch_size=8)), decoded(data))
    assert _item(data, MediaSpec(Placement.EMBEDDING, patch_size=8, fixed_grid=(2, 2))).grid == (3, 2, 2)
    triples = MediaSpec(Placement.EMBEDDING, patch_size=8, frames_per_patch=3)
    item = _item(encoded(4), triples, frames={"kind": "uniform", "num_frames": 4})
    np.testing.assert_array_equal(_frames(item, triples), decoded(encoded(4))[[0, 1, 2, 3, 3, 3]])
    with pytest.raises(DataConfigError, match=r"data\.video.*connector.kind=embedding"):
        VideoTransform(VideoConfig(), MediaSpec(Placement.CROSS_ATTENTION))


def test_tiles_of_a_frame_are_those_of_the_same_image() -> None:
    """Baichuan-Omni's tower, in small: 182 or 546 features a frame, with at most two tiles and an overview."""
    spec = MediaSpec(Placement.EMBEDDING, 2, fixed_grid=(27, 27), pooling=SquarePooling(2, pads_columns=True))
    tiling = {"kind": "mm1_5", "min_tiles": 1, "max_tiles": 2}
    config = VideoConfig.model_validate({"tiling": tiling, "frames": {"kind": "uniform", "num_frames": 3}})
    images = ImageTransform(TilesTransform.model_validate({"tiling": tiling}), spec)
    for width, per_frame in ((40, 182), (108, 546)):
        data = encoded(5, height=40, width=width, kind="mkv")
        transform = VideoTransform(config, spec)
        task = transform.decode_task(VideoPart(data, "mkv"))
        task.decode()
        expected = list[Any]()
        for number in (0, 2, 4):
            file = io.BytesIO()
            Image.fromarray(decoded(data)[number]).save(file, "png")
            expected += images(file.getvalue())
        assert [(item.grid, item.cell, item.tiles) for item in task.crops] == [
            (e.grid, e.cell, e.tiles) for e in expected
        ]
        for item, same in zip(task.crops, expected, strict=True):
            np.testing.assert_array_equal(item.values, same.values)
        planned = transform.dry_run(video_size(data))
        assert sum(item.num_features(spec) for item in planned) == 3 * per_frame
    with pytest.raises(DataConfigError, match=r"data\.video\.tiling: cuts single frames"):
        VideoTransform(config, MediaSpec(Placement.EMBEDDING, 2, fixed_grid=(28, 28), frames_per_patch=2))
    with pytest.raises(
        DataConfigError, match=r"data\.video\.tiling: each frame is an image, and .* no fixed square size"
    ):
        VideoTransform(config, MediaSpec(Placement.EMBEDDING, 2))
    with pytest.raises(ValidationError, match="exclude each other"):
        VideoConfig.model_validate({"tiling": tiling, "timestamps": "{clock}"})


HOSTILE = {
    "nothing": b"",
    "text": b"no video at all",
    "a list of files": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "a list in MP4's clothes": b"\0\0\0\x08ftyp#EXTM3U\nfile:///etc/passwd\n",
    "half an MP4": encoded(20, height=48)[:1500],
    "half a WebM": encoded(20, kind="webm")[:700],
    "the start of a GIF": encoded(8, kind="gif")[:60],
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.fault
def test_a_damaged_video_is_a_bad_sample(name: str) -> None:
    with pytest.raises(SampleError) as raised:
        _item(HOSTILE[name])
    assert raised.value.kind is FaultKind.DECODE


@pytest.mark.fault
def test_limits_hold_before_memory_is_allocated() -> None:
    data = encoded(8, height=64, width=96)
    with pytest.raises(SampleError, match="96x64 pixels, the limit is 6000"):
        _item(data, max_frame_pixels=6000)
    with pytest.raises(SampleError, match=r"of which [2-8] frames must be decoded, the limit is 1"):
        _item(data, max_decoded_frames=1)
    with pytest.raises(SampleError, match=r"largest aspect is 1\.2"):
        _item(data, max_aspect=1.2)
    with pytest.raises(SampleError), VideoFile(data, max_pixels=6000) as file:
        list(file.decode([0]))
    transform = VideoTransform(VideoConfig.model_validate(LIMITS), SPEC)
    size = video_size(data)
    for wrong in (size._replace(num_frames=9), size._replace(height=96, width=64)):
        task = transform.decode_task(VideoPart(data, "mp4", wrong))
        with pytest.raises(SampleError, match="the index says"):
            task.decode()
    with pytest.raises(SampleError, match="no size for this video"):
        transform.dry_run(VideoSize(0, 0, 0, 0))


@pytest.mark.parametrize("kind", ["mp4", "webm", "mkv", "gif"])
@pytest.mark.fault
def test_mutated_videos_raise_nothing_else(kind: str) -> None:
    data, rng = encoded(8, kind=kind), np.random.default_rng(0)
    num_bad = 0
    for number in range(40):
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 8))):
            changed[rng.integers(len(data))] = rng.integers(256)
        if number % 4 == 0:
            del changed[rng.integers(len(data)) :]
        try:
            _item(bytes(changed))
        except SampleError:
            num_bad += 1
    assert 0 < num_bad < 40
