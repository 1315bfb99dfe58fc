"""Imported SmolVLM and Aria read a video as images of its frames, with the texts of their processors or examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.config import DatasetConfig
from data_pipeline.images.crops import TORCH_HAS_LANCZOS
from data_pipeline.images.frame_choice import TrimmedChoice
from data_pipeline.images.video_layout import in_words
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.sample import Provenance, Sample, TextPart, VideoPart, VideoSize
from mmscale.hf.image_input import ImageInput, ImageSource
from mmscale.hf.layouts import layout_of
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.build import media_spec
from tests.hf import test_aria, test_idefics3
from tests.hf.pages import BOS, EOS, PAD, Seen, compare, load, normalised, save_tokenizer
from tests.hf.reference_models import imported
from tests.models.reference_models import distance
from tests.parity_table import Recorder
from tests.videos import decoded, encoded

pytestmark = pytest.mark.parity
BOUND, GRADIENT_BOUND = 2e-6, 8e-6
SMOLVLM = test_idefics3.SECOND
SIDE = test_idefics3.CASES[SMOLVLM]["side"]
NUMBERS = {3: "three"}


def read_videos(model: Any, family: str, processor: dict[str, Any], values: dict[str, Any]) -> ImageInput:
    images = layout_of(family).images
    assert images is not None
    return images(ImageSource(model.config, {PREPROCESSOR: values}, processor, "config.json"))


def seen_as(path: Path, ours: Any, images: ImageInput, clip: bytes, inputs: Any) -> Seen:
    """Return both inputs of a text, a video and a text."""
    block = {
        "name": "x",
        "manifest": "x",
        "template": {"kind": "interleaved"},
        "transforms": images.transforms,
        "video": images.video,
    }
    spec = media_spec(ours.config)
    build = DocumentBuilder(DatasetConfig.model_validate(block), load(path, images.tokens[0]), spec)
    parts = (TextPart("see "), VideoPart(clip, "mp4"), TextPart(" it moves"))
    document = build(Sample(parts, {}, Provenance("x", "shard", "key", 0)))
    assert document.token_ids.tolist() == inputs["input_ids"][0].tolist()
    return Seen([document], [dict(inputs)], spec)


@pytest.fixture
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give their processor the numbers in words, for which it needs a package."""
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", NUMBERS.__getitem__)


@pytest.mark.skipif(not TORCH_HAS_LANCZOS, reason="the processor resizes with another filter")
@pytest.mark.usefixtures("english")
def test_smolvlm_reads_the_same_tokens_and_pixels(tmp_path: Path, parity: Recorder) -> None:
    from transformers import PreTrainedTokenizerFast, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    model = test_idefics3.reference_model(SMOLVLM)
    model.save_pretrained(tmp_path / "theirs")
    ours, _ = imported(tmp_path / "theirs", tmp_path / "run")
    path = save_tokenizer(tmp_path / "tokenizer.json", test_idefics3.SPECIAL)
    words = PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[test_idefics3.IMAGE],
    )
    pixels = test_idefics3.pixels(SMOLVLM)
    sampling = {"fps": 4, "max_frames": 3, "video_size": {"longest_edge": 3 * SIDE}}
    videos = SmolVLMVideoProcessor(max_image_size=pixels["max_image_size"], video_sampling=sampling)
    one = test_idefics3.CASES[SMOLVLM]
    features = (SIDE // one["patch"] // one["scale_factor"]) ** 2
    theirs = SmolVLMProcessor(SmolVLMImageProcessor(**pixels), words, videos, features)
    clip = encoded(9, height=40, width=56)
    inputs = theirs(
        text=[f"{BOS}see <video> it moves{EOS}"],
        videos=[decoded(clip).transpose(0, 3, 1, 2)],
        video_metadata=[{"total_num_frames": 9, "fps": 8, "duration": 9 / 8}],
        do_sample_frames=True,
        num_frames=3,
        fps=4,
        return_tensors="pt",
        add_special_tokens=False,
    )
    values = json.loads(SmolVLMImageProcessor(**pixels).to_json_string())
    images = read_videos(ours, "smolvlm", {"video_processor": json.loads(videos.to_json_string())}, values)
    seen = seen_as(path, ours, images, clip, inputs)
    grid, patch = SIDE // one["patch"], one["patch"]
    patches = torch.cat([torch.from_numpy(item.values) for item in seen.documents[0].items])
    read = inputs["pixel_values"][0][..., : grid * patch, : grid * patch]
    expected = read.view(-1, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5).reshape(len(patches), -1)
    parity("smolvlm", "pixels of frames", distance(normalised(ours.config.vision, patches), expected), BOUND)
    compare(ours, model, seen, tmp_path, parity, (BOUND, GRADIENT_BOUND))


def test_smolvlm_reads_the_same_frames() -> None:
    from transformers import SmolVLMVideoProcessor
    from transformers.video_utils import VideoMetadata

    for per_second, most, skip in ((1, 64, 1), (4, 3, 1), (2, 5, 0), (0.5, 2, 2)):
        theirs = SmolVLMVideoProcessor(
            video_sampling={"fps": per_second, "max_frames": most, "video_size": {"longest_edge": 64}}
        )
        ours = TrimmedChoice(per_second=per_second, max_frames=most, skip_seconds=skip)
        for rate in (8.0, 25.0, 30.0, 24000 / 1001):
            for total in (*range(1, 40), 301, 1000, 4321):
                metadata = VideoMetadata(total, fps=rate, duration=total / rate)
                expected = theirs.sample_frames(metadata, num_frames=most, fps=per_second, skip_secs=skip).tolist()
                size = VideoSize(total, round(total / rate * 1e6), 8, 8)
                assert ours.count(size, 1) == len(expected)
                assert ours.numbers(np.arange(total) / rate, size, len(expected)) == expected
                assert ours.planned_times(size, len(expected)) == pytest.approx([number / rate for number in expected])


def test_aria_reads_the_same_tokens_and_pixels(tmp_path: Path, parity: Recorder) -> None:
    """Frames and times as in the authors' example: ``[00:01]``, the image and a line break for each frame."""
    model = test_aria.reference_model()
    model.save_pretrained(tmp_path / "theirs")
    ours, _ = imported(tmp_path / "theirs", tmp_path / "run")
    path = save_tokenizer(tmp_path / "tokenizer.json", test_aria.SPECIAL)
    theirs = test_aria.processor(path, 980, split=False)
    clip, total, count = encoded(13, height=40, width=56, per_second=4), 13, 3
    numbers = [int(total / count * (i + 0.5)) for i in range(count)]
    frame = f"{test_aria.START}{test_aria.IMAGE}{test_aria.END}"
    shown = "".join(f"[{number // 4 // 60:02d}:{number // 4 % 60:02d}]{frame}\n" for number in numbers)
    inputs = theirs(
        text=[f"{BOS}see {shown} it moves{EOS}"],
        images=[Image.fromarray(decoded(clip)[number]) for number in numbers],
        return_tensors="pt",
        add_special_tokens=False,
        max_image_size=490,
    )
    for name in ("num_crops", "token_type_ids"):
        inputs.pop(name, None)
    images = read_videos(ours, "aria", {}, json.loads(theirs.image_processor.to_json_string()))
    assert images.video is not None
    assert images.video["frames"] == {"kind": "uniform", "num_frames": 128, "spread": "middles"}
    images.video["frames"]["num_frames"] = count
    compare(ours, model, seen_as(path, ours, images, clip, inputs), tmp_path, parity, (BOUND, GRADIENT_BOUND))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (12, "twelve"),
        (15, "fifteen"),
        (18, "eighteen"),
        (20, "twenty"),
        (64, "sixty-four"),
        (100, "one hundred"),
        (101, "one hundred and one"),
        (999, "nine hundred and ninety-nine"),
        (1001, "one thousand and one"),
        (1100, "one thousand, one hundred"),
        (65536, "sixty-five thousand, five hundred and thirty-six"),
    ],
)
def test_numbers_in_words(number: int, words: str) -> None:
    """Compared with the package num2words 0.5.14 once."""
    assert in_words(number) == words
