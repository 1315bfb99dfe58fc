"""Imported InternVL reads a video like transformers: a text, a tile and a line break for each frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.config import DatasetConfig
from data_pipeline.images.frame_choice import UniformChoice
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.sample import ImagePart, Provenance, Sample, TextPart, VideoPart, VideoSize
from mmscale.models.build import media_spec
from tests.hf.pages import BOS, EOS, Seen, compare, load, normalised, picture, save_tokenizer, stored
from tests.hf.reference_models import import_reference
from tests.hf.test_internvl import (
    BOUND,
    END,
    GRADIENT_BOUND,
    IMAGE,
    SIDE,
    SPECIAL,
    START,
    TRANSFORMS,
    VIDEO,
    processor,
    reference_model,
)
from tests.models.reference_models import distance
from tests.parity_table import Recorder
from tests.videos import decoded, encoded

pytestmark = pytest.mark.parity
VIDEO_CONFIG = {
    "start": START,
    "end": END,
    "frames": {"kind": "uniform", "num_frames": 3, "spread": "middles"},
    "timestamps": "Frame{n}: ",
    "frame_break": "\n",
}


def _seen(folder: Path, ours: Any) -> Seen:
    """Return both inputs of a page of an image, a text and a video of five frames, of which three are used."""
    path = save_tokenizer(folder / "tokenizer.json", SPECIAL)
    spec, theirs = media_spec(ours.config), processor(path)
    block = {
        "name": "x",
        "manifest": "x",
        "template": {"kind": "interleaved"},
        "transforms": TRANSFORMS,
        "video": VIDEO_CONFIG,
    }
    clip, image = encoded(5, height=40, width=56), picture((28, 28))
    build = DocumentBuilder(DatasetConfig.model_validate(block), load(path, IMAGE), spec)
    parts = (ImagePart(stored(image), "png"), TextPart("see "), VideoPart(clip, "mp4"), TextPart(" it moves"))
    document = build(Sample(parts, {}, Provenance("x", "shard", "key", 0)))
    theirs.video_processor.size = {"height": SIDE, "width": SIDE}
    theirs.video_processor.image_mean, theirs.video_processor.image_std = (
        ours.config.vision.mean,
        ours.config.vision.std,
    )
    inputs = theirs(
        text=[f"{BOS}{IMAGE}see {VIDEO} it moves{EOS}"],
        images=[image],
        videos=[decoded(clip).transpose(0, 3, 1, 2)],
        video_metadata=[{"total_num_frames": 5, "fps": 8}],
        do_sample_frames=True,
        num_frames=3,
        return_tensors="pt",
        add_special_tokens=False,
    )
    return Seen([document], [dict(inputs)], spec)


def test_the_same_tokens_pixels_logits_loss_and_gradients(tmp_path: Path, parity: Recorder) -> None:
    theirs = reference_model()
    ours = import_reference(theirs, tmp_path)
    seen = _seen(tmp_path, ours)
    (document,), (inputs,) = seen.documents, seen.inputs
    assert document.token_ids.tolist() == inputs["input_ids"][0].tolist()
    patches = torch.cat([torch.from_numpy(item.values) for item in document.items])
    side = SIDE // 7
    expected = inputs["pixel_values"].view(-1, 3, side, 7, side, 7).permute(0, 2, 4, 1, 3, 5).reshape(len(patches), -1)
    parity("internvl", "pixels of frames", distance(normalised(ours.config.vision, patches), expected), BOUND)
    compare(ours, theirs, seen, tmp_path, parity, (BOUND, GRADIENT_BOUND))


def test_middle_frames_are_theirs() -> None:
    from transformers import InternVLVideoProcessor
    from transformers.video_utils import VideoMetadata

    theirs = InternVLVideoProcessor()
    for total in range(1, 200):
        for count in {1, 3, 8, 16, total} - {each for each in (3, 8, 16) if each > total}:
            expected = theirs.sample_frames(VideoMetadata(total, 8.0), num_frames=count).tolist()
            found = UniformChoice(num_frames=count, spread="middles")
            size = VideoSize(total, total * 125_000, 32, 32)
            assert found.numbers(torch.arange(total).double().numpy(), size, count) == expected
