"""Imported Qwen2-VL reads videos like transformers: pixels, documents, logits, loss, all gradients, and answers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.config import DatasetConfig
from data_pipeline.document import Document
from data_pipeline.images.video import VideoConfig, VideoTransform
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.sample import ImagePart, Provenance, Sample, TextPart, VideoPart, VideoSize
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.writer import ShardWriter
from mmscale.errors import CheckpointError
from mmscale.hf.image_input import ImageSource
from mmscale.hf.layouts import qwen2_vl
from mmscale.hf.read import read_processor
from mmscale.models.build import media_spec
from mmscale.models.connectors.projector import merge_order
from mmscale.objectives.next_token import NextToken
from tests.hf.pages import AUTO, BOS, EOS, Seen, load, normalised, picture, save_tokenizer, stored
from tests.hf.reference_models import import_reference, loaded
from tests.hf.test_qwen2_vl import (
    BOUND,
    END,
    IMAGE,
    LAYOUT,
    PIXELS,
    SPECIAL,
    START,
    VIDEO,
    processor,
    reference_model,
)
from tests.hf.train_and_export import VOCABULARY, train_and_export
from tests.models.reference_models import distance
from tests.parity_table import Recorder
from tests.videos import decoded, encoded

pytestmark = pytest.mark.parity
Clip = tuple[int, ...]
"""(frames, height, width) of a video, and its frames a second if these are not 8."""
PAGES: dict[str, list[str | tuple[int, ...]]] = {
    "video": [(4, 60, 60), "a video"],
    "odd number of frames": ["x", (3, 50, 70), "three"],
    "image and videos": [(31, 90), "one, ", (2, 40, 90), "two", (4, 64, 64), "three", (50, 50)],
    "one frame": [(1, 56, 56), "still"],
}
LONG = [(10, 40, 40), "the positions of this text"]
CONFIG = {"start": START, "end": END, "placeholder": VIDEO, "frames": {"kind": "uniform", "num_frames": 64}, **PIXELS}


def _rate(clip: Clip) -> int:
    return clip[3] if len(clip) > 3 else 8


@functools.cache  # Both implementations need the same bytes, and an encoder may give others the next time.
def _clip(clip: Clip) -> bytes:
    return encoded(clip[0], height=clip[1], width=clip[2], per_second=_rate(clip))


def video_seen(folder: Path, ours: Any, pages: list[list[Any]], make: Callable[[Path], Any] = processor) -> Seen:
    """Return both inputs of pages of texts, images (height, width) and clips; asserts equal token ids.

    ``make`` returns the processor of transformers with the tokenizer of a path.
    """
    tokenizer = save_tokenizer(folder / "tokenizer.json", SPECIAL)
    spec = media_spec(ours.config)
    documents, theirs = _documents(tokenizer, spec, pages), make(tokenizer)
    inputs = [_inputs(theirs, page) for page in pages]
    for document, one in zip(documents, inputs, strict=True):
        assert document.token_ids.tolist() == one["input_ids"][0].tolist()
    return Seen(documents, inputs, spec)


def _documents(tokenizer: Path, spec: MediaSpec, pages: list[list[Any]]) -> list[Document]:
    block = {
        "name": "x",
        "manifest": "x",
        "template": {"kind": "interleaved"},
        "transforms": {"kind": "native", "layout": LAYOUT, **PIXELS},
        "video": CONFIG,
    }
    build = DocumentBuilder(DatasetConfig.model_validate(block), load(tokenizer, IMAGE), spec)

    def part(one: Any) -> TextPart | ImagePart | VideoPart:
        if isinstance(one, str):
            return TextPart(one)
        return VideoPart(_clip(one), "mp4") if len(one) > 2 else ImagePart(stored(picture(one)), "png")

    origin = Provenance("x", "shard", "key", 0)
    return [build(Sample(tuple(map(part, page)), {}, origin)) for page in pages]


def _inputs(theirs: Any, page: list[Any]) -> dict[str, Tensor]:
    theirs.video_processor.size = {"shortest_edge": PIXELS["min_pixels"], "longest_edge": PIXELS["max_pixels"]}
    images, clips = list[Any](), list[Clip]()
    text = BOS
    for part in page:
        if isinstance(part, str):
            text += part
            continue
        text += f"{START}{IMAGE if len(part) == 2 else VIDEO}{END}"
        if len(part) == 2:
            images.append(picture(part))
        else:
            clips.append(part)
    given: dict[str, Any] = {"images": images or None}
    if clips:
        given["videos"] = [decoded(_clip(clip)).transpose(0, 3, 1, 2) for clip in clips]
        given["video_metadata"] = [
            {"total_num_frames": clip[0], "fps": _rate(clip), "frames_indices": [*range(clip[0])]} for clip in clips
        ]
        given["cap_pixels_per_frame"] = False
    return dict(theirs(text=[text + EOS], **given, return_tensors="pt", add_special_tokens=False))


@pytest.fixture
def models(tmp_path: Path) -> tuple[Any, Any]:
    theirs = reference_model()
    return import_reference(theirs, tmp_path), theirs


def test_the_frames_of_a_patch_learn_unlike_each_other(models: tuple[Any, Any], tmp_path: Path) -> None:
    """Those of a still image learn alike."""
    ours, _ = models
    NextToken()(ours, video_seen(tmp_path, ours, [PAGES["video"]]).batch()).loss_sum.backward()
    weight = ours.vision.patch_embed.projection.weight.grad.view(32, 3, 2, 14, 14)
    assert not torch.allclose(weight[:, :, 0], weight[:, :, 1], rtol=0.1)


def test_pixels_grids_and_positions(models: tuple[Any, Any], tmp_path: Path, parity: Recorder) -> None:
    ours, theirs = models
    seen = video_seen(tmp_path, ours, [*PAGES.values()])
    for document, inputs in zip(seen.documents, seen.inputs, strict=True):
        videos = [item for item in document.items if item.grid[0] > 1 or item.later_values is not None]
        if "video_grid_thw" in inputs and videos:
            assert [list(item.grid) for item in videos] == inputs["video_grid_thw"].tolist()
            order = torch.from_numpy(merge_order([item.grid for item in videos], 2))
            expected = inputs["pixel_values_videos"].view(len(order), 3, 2, -1)
            for frame, values in enumerate(([v.values for v in videos], [v.later_values for v in videos])):
                mine = normalised(ours.config.vision, torch.from_numpy(np.concatenate(values)))[order]
                parity("qwen2_vl", "pixels", distance(mine, expected[:, :, frame].flatten(1)), BOUND)
        grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        positions, _ = theirs.model.get_rope_index(
            inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], **grids
        )
        assert document.position_ids.T.tolist() == positions[:, 0].tolist()


def test_text_after_a_long_video_follows_its_last_frame(models: tuple[Any, Any], tmp_path: Path) -> None:
    """transformers 5.24 lets it follow the largest row or column, so its text overlaps the video in time."""
    ours, theirs = models
    seen = video_seen(tmp_path, ours, [LONG])
    (document,), (inputs,) = seen.documents, seen.inputs
    video = document.position_ids[2:22]  # Five pairs of frames, each of 2 x 2 features, after two tokens.
    assert video[:, 0].tolist() == [2 + pair for pair in range(5) for _ in range(4)]
    assert document.position_ids[22].tolist() == [7, 7, 7]
    positions = torch.from_numpy(document.position_ids.T.astype(np.int64))[:, None]
    with torch.no_grad():
        assert distance(seen.ours(ours), theirs(**inputs, position_ids=positions).logits[0]) < BOUND
        assert distance(seen.ours(ours), theirs(**inputs).logits[0]) > 100 * BOUND


def test_a_folder_with_a_video_processor_gives_its_frames(models: tuple[Any, Any], tmp_path: Path) -> None:
    """In a file of its own or nested; without one, those of the authors' code."""
    from transformers import Qwen2VLVideoProcessor
    from transformers.video_utils import VideoMetadata

    def video() -> dict[str, Any]:
        found = qwen2_vl.images(ImageSource(models[0].config, {}, read_processor(tmp_path), "config.json")).video
        assert found is not None
        return found

    authors = {"start": START, "end": END, "placeholder": VIDEO}
    assert video() == authors
    area, sampled = {"shortest_edge": 4 * 784, "longest_edge": 99 * 784}, {"do_sample_frames": True, "fps": 3}
    theirs = Qwen2VLVideoProcessor(size=area, max_pixels=9 * 784, resample=2, max_frames=10, **sampled)
    theirs.save_pretrained(tmp_path)
    alone = tmp_path / "video_preprocessor_config.json"
    ours = VideoTransform(VideoConfig.model_validate(video()), media_spec(models[0].config))
    assert ours.config.interpolation == "bilinear"
    for total, rate, height, width in ((40, 8, 500, 300), (9, 30, 20, 30), (200, 25, 90, 90)):
        expected = theirs.sample_frames(VideoMetadata(total, fps=rate)).tolist()
        size = VideoSize(total, round(total / rate * 1e6), height, width)
        count = ours.config.frames.count(size, 2)
        assert ours.config.frames.numbers(np.arange(total) / rate, size, count) == expected
        (item,) = ours.dry_run(size)
        assert np.prod(item.grid) == theirs.get_num_of_video_patches(count, height, width, {})
    (tmp_path / "processor_config.json").write_text('{"video_processor": {"max_pixels": 7840}}')
    assert video() == {**authors, "max_pixels": 7840}  # It precedes the file of its own, as in transformers.
    (tmp_path / "processor_config.json").unlink()
    alone.write_text(json.dumps({**json.loads(alone.read_text()), "temporal_patch_size": 4}))
    with pytest.raises(CheckpointError, match="video_processor: temporal_patch_size=4 is not supported, only 2"):
        video()


@pytest.mark.dist
@pytest.mark.slow
def test_trained_on_two_ranks_of_which_some_have_no_video(tmp_path: Path) -> None:
    """Every third sample is text alone, so packs without a video occur on either rank; the run must not hang."""
    theirs = reference_model(vocabulary=VOCABULARY)
    theirs.save_pretrained(tmp_path / "theirs")
    with ShardWriter(tmp_path / "clips", "part") as writer:
        for number in range(24):
            members = {"txt": f"red apple {number % 2}".encode()}
            if number % 3:
                members["mp4"] = encoded(2 + number % 3, height=28, width=28, seed=number % 2)
            writer.write(f"{number:03d}", members)
    write_manifest(tmp_path / "clips.manifest", writer.shards)
    limits = {"min_pixels": 28 * 28, "max_pixels": 28 * 28}
    dataset = {
        "name": "clips",
        "manifest": str(tmp_path / "clips.manifest"),
        "template": {"kind": "caption", "images": "optional"},
        "transforms": {"kind": "native", **limits},
        "video": limits,
    }
    again = loaded(train_and_export(tmp_path / "theirs", tmp_path, dataset, max_tokens=24), AUTO)
    weight = again.model.visual.patch_embed.proj.weight
    assert not torch.equal(weight[:, :, 0], weight[:, :, 1])
