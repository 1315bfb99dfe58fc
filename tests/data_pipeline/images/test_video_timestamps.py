"""Times of frames as text: the words, placeholders and positions of the reference processors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen3VLConfig, Qwen3VLModel
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from data_pipeline.config import DatasetConfig
from data_pipeline.document import Document
from data_pipeline.history.text_spans import decode_with_names
from data_pipeline.images.video import VideoConfig
from data_pipeline.images.video_layout import filled
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.sample import Sample, VideoPart
from data_pipeline.shards.video_file import VideoFile, video_size
from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, load_tokenizer
from tests.videos import encoded

START, END, PAD = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
TOKENS = {"start": START, "end": END, "placeholder": PAD}
PIXELS = {"min_pixels": 32 * 48, "max_pixels": 32 * 48}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    specials = ["<pad>", "</s>", "<image>", START, END, PAD]
    vocab = {token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(specials)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def _built(tokenizer: Path, spec: MediaSpec, data: bytes, **video: Any) -> tuple[Document, str]:
    """Return the document of a video and the text ``moves``, and its tokens as text."""
    keys = {"name": "clips", "manifest": "m", "template": {"kind": "caption"}, "video": {**PIXELS, **TOKENS, **video}}
    keys["transforms"] = {"kind": "fixed"} if spec.fixed_grid else {"kind": "native"}
    ours = load_tokenizer(HuggingFaceTokenizerConfig(path=tokenizer, bos_token=None))
    builder = DocumentBuilder(DatasetConfig.model_validate(keys), ours, spec)
    document = builder(Sample((VideoPart(data, "mp4"),), {"caption": "moves"}))
    planned = builder.dry_run(Sample((VideoPart(b"", "mp4", video_size(data)),), {"caption": "moves"}))
    for name in ("token_ids", "position_ids", "scatter_index", "labels", "images"):
        np.testing.assert_array_equal(getattr(document, name), getattr(planned, name))
    slots = np.flatnonzero(document.token_ids == ours.special_id(PAD, "test"))
    np.testing.assert_array_equal(document.scatter_index, slots)
    assert document.num_images == 1
    return document, decode_with_names(document.token_ids.tolist(), ours)


@pytest.mark.parametrize(("count", "per_second"), [(7, 10), (4, 3), (11, 24)])
def test_words_and_positions_of_qwen3_vl(tokenizer: Path, count: int, per_second: int) -> None:
    data = encoded(24, height=32, width=48, per_second=per_second)
    spec = MediaSpec(Placement.EMBEDDING, patch_size=8, merge=2, frames_per_patch=2, position_axes=3)
    frames = {"kind": "uniform", "num_frames": count}
    document, words = _built(tokenizer, spec, data, frames=frames, timestamps="<{seconds:.1f} seconds>")
    with VideoFile(data) as file:
        numbers = VideoConfig.model_validate({"frames": frames}).frames.numbers(file.times, video_size(data), count)
    metadata = VideoMetadata(total_num_frames=24, fps=float(per_second), frames_indices=numbers)
    grid = torch.tensor([[(count + 1) // 2, 4, 6]])
    processor = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        video_token=PAD,
        vision_start_token=START,
        vision_end_token=END,
    )
    processor._calculate_timestamps = lambda *args: Qwen3VLProcessor._calculate_timestamps(processor, *args)
    inputs = {"video_grid_thw": grid, "video_metadata": [metadata]}
    assert words == Qwen3VLProcessor.replace_video_token(processor, inputs, 0) + "moves</s>"
    ids = torch.from_numpy(document.token_ids.astype(np.int64))[None]
    kinds = torch.zeros_like(ids, dtype=torch.int32)
    kinds[0, document.scatter_index] = 2
    theirs = SimpleNamespace(config=Qwen3VLConfig(vision_config={"spatial_merge_size": 2}))
    theirs.get_vision_position_ids = lambda *a, **k: Qwen3VLModel.get_vision_position_ids(theirs, *a, **k)
    positions, _ = Qwen3VLModel.get_rope_index(theirs, ids, kinds, video_grid_thw=grid)
    assert document.position_ids.T.tolist() == positions[:, 0].tolist()


def test_words_of_internvl_and_the_clock_of_smolvlm(tokenizer: Path) -> None:
    spec = MediaSpec(Placement.EMBEDDING, patch_size=8, merge=2, fixed_grid=(4, 4))
    data = encoded(6, per_second=2)
    keys = {"timestamps": "Frame{n}: ", "frame_break": "\n", "frames": {"kind": "uniform", "num_frames": 3}}
    _, words = _built(tokenizer, spec, data, **keys)
    processor = SimpleNamespace(start_image_token=START, end_image_token=END, image_token=PAD, image_seq_length=4)
    expected = InternVLProcessor.replace_video_token(processor, {"pixel_values_videos": [torch.empty(3)]}, 0)
    assert words == expected + "moves</s>"
    assert filled("\nFrame from {clock}:", 3725.9, 1) == "\nFrame from 62:05:"
    assert filled("{seconds}s", 3.99, 1) == "3s"
    choice = {"kind": "times", "seconds": [0.3, 1.1, 2.9]}
    _, words = _built(tokenizer, spec, data, timestamps="{seconds:.1f};", frames=choice)
    assert words.replace(PAD, "") == f"0.0;{START}{END}1.0;{START}{END}2.5;{START}{END}moves</s>"


def test_bad_patterns_are_refused() -> None:
    for pattern in ("{time}", "{seconds.__class__}", "{seconds:.9f}", "{", "{n}}"):
        with pytest.raises(ValidationError, match="allowed in braces"):
            VideoConfig(timestamps=pattern)
    with pytest.raises(ValidationError, match="frame_break needs timestamps"):
        VideoConfig(frame_break="\n")
