"""Documents equal those of Fuyu's processor: sizes, padding, order of patches, newlines, ids.

The processor's order is image, ``<s>``, text, ``<0x04>``: no token starts the document, and ``<s>`` ends the image.
Both sides resize with torchvision, so no value differs.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from tokenizers import models, normalizers

from data_pipeline.config import DatasetConfig
from data_pipeline.document import Document
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.sample import ImagePart, Provenance, Sample, TextPart
from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, load_tokenizer
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
SPECIALS = ("|ENDOFTEXT|", "<s>", "|SPEAKER|", "|NEWLINE|", "<0x04>")
FRAME = (120, 210)
SIZES = [(int(h), int(w)) for h, w in np.random.default_rng(5).integers(8, 400, (98, 2))] + [(1, 70), (120, 210)]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tokenizer of letters and whole names that prefixes each text with SentencePiece's space mark."""
    pieces = [
        ("<unk>", 0.0),
        *((letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz.?"),
        *((n, 0.0) for n in SPECIALS),
    ]
    model = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    path = tmp_path_factory.mktemp("fuyu") / "tokenizer.json"
    model.save(str(path))
    return path


def their_processor(tokenizer_file: Path, frame: tuple[int, int]) -> Any:
    from transformers import FuyuImageProcessor, FuyuProcessor, PreTrainedTokenizerFast

    images = FuyuImageProcessor(size={"height": frame[0], "width": frame[1]})
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), bos_token="<s>", pad_token="|ENDOFTEXT|")
    return FuyuProcessor(image_processor=images, tokenizer=tokenizer)


def our_builder(tokenizer_file: Path, frame: tuple[int, int]) -> DocumentBuilder:
    dataset = {
        "name": "x",
        "manifest": "x",
        "template": {
            "kind": "dialogue",
            "roles": {"user": {"suffix": "<0x04>"}, "assistant": {"weight": 1.0}},
            "special_tokens": ["<0x04>"],
            "end": "none",
        },
        "transforms": {
            "kind": "padded",
            "max_height": frame[0],
            "max_width": frame[1],
            "interpolation": "bilinear",
            "layout": {"row_end": "|NEWLINE|", "end": "<s>"},
        },
    }
    names = {"bos_token": None, "eos_token": "|ENDOFTEXT|", "pad_token": "|ENDOFTEXT|", "image_token": "|SPEAKER|"}
    tokenizer = load_tokenizer(HuggingFaceTokenizerConfig(path=tokenizer_file, **names))
    return DocumentBuilder(DatasetConfig.model_validate(dataset), tokenizer, MediaSpec(Placement.EMBEDDING, 30))


def sample(size: tuple[int, int], words: str) -> tuple[Image.Image, Sample]:
    rng = np.random.default_rng(size[0] * 1000 + size[1])
    coarse = Image.fromarray(rng.integers(0, 256, (7, 5, 3), dtype=np.uint8))
    image = coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "PNG")
    turns = [{"role": "user", "content": words}, {"role": "assistant", "content": "yes"}]
    return image, Sample(
        (ImagePart(out.getvalue(), "png"), TextPart("")), {"messages": turns}, Provenance("x", "s", "k", 0)
    )


def steps_apart(document: Document, theirs: torch.Tensor) -> float:
    """Return the largest difference of a value, in steps of 1 / 255."""
    (item,) = document.items
    ours = torch.from_numpy(item.values.copy()).view(-1, 3, 30, 30).permute(0, 2, 3, 1).flatten(1)
    assert ours.shape == theirs.shape
    return float((ours - (theirs * 127.5 + 127.5)).abs().max())


def test_a_hundred_sizes(tokenizer_file: Path, parity: Recorder) -> None:
    processor, build = their_processor(tokenizer_file, FRAME), our_builder(tokenizer_file, FRAME)
    for number, size in enumerate(SIZES):
        words = "what is this?" * (number % 3 + 1)
        image, prompt = sample(size, words)
        theirs = processor(images=image, text=words, return_legacy_image_output=False)
        ours = build.build_prompt(prompt)
        assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist(), size
        assert ours.scatter_index.tolist() == np.flatnonzero(ours.token_ids == build.tokenizer.image_id).tolist()
        parity("fuyu", "pixels, in steps of 255", steps_apart(ours, theirs["pixel_values"]), 0.5)


def test_the_published_frame(tokenizer_file: Path, parity: Recorder) -> None:
    """Both sides shrink images larger than 1080 x 1920 in the same way."""
    frame = (1080, 1920)
    image, prompt = sample((1400, 1300), "what")
    theirs = their_processor(tokenizer_file, frame)(images=image, text="what", return_legacy_image_output=False)
    ours = our_builder(tokenizer_file, frame).build_prompt(prompt)
    assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist()
    parity("fuyu", "pixels, in steps of 255", steps_apart(ours, theirs["pixel_values"]), 0.5)
