"""Documents equal those of Llama 3.2 Vision's processor: tiles, padding, grids, pixels, ids and masks.

Both sides resize with torchvision and get the same bytes. The order of scaling and normalising leaves a difference of
at most 5e-7 of a value's range.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tokenizers
import torch
from PIL import Image
from tokenizers import models, pre_tokenizers

from data_pipeline.batch import MediaBlock, MultimodalBatch
from data_pipeline.config import DatasetConfig
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.sample import ImagePart, Provenance, Sample, TextPart
from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, load_tokenizer
from mmscale.hf.layouts.pixels import CLIP
from mmscale.nn.patch_embed import normalise_pixels
from mmscale.nn.tile_embed import tile_grids
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
SPECIALS = ["<|image|>", "<|begin_of_text|>", "<|end_of_text|>", "<|python_tag|>"]
SIDE, PATCH, MAX_TILES = 56, 14, 4
SIZES = [(int(h), int(w)) for h, w in np.random.default_rng(3).integers(4, 300, (98, 2))] + [(1, 200), (56, 112)]
SPEC = MediaSpec(
    Placement.CROSS_ATTENTION, PATCH, fixed_grid=(4, 4), class_features=1, max_tiles=MAX_TILES, computes_absent=True
)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(alphabet + SPECIALS)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.add_special_tokens(SPECIALS)
    path = tmp_path_factory.mktemp("mllama") / "tokenizer.json"
    model.save(str(path))
    return path


def their_processor(tokenizer_file: Path, side: int) -> Any:
    from transformers import MllamaImageProcessor, MllamaProcessor, PreTrainedTokenizerFast

    images = MllamaImageProcessor(
        size={"height": side, "width": side}, max_image_tiles=MAX_TILES, image_mean=CLIP[0], image_std=CLIP[1]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), bos_token="<|begin_of_text|>")
    return MllamaProcessor(image_processor=images, tokenizer=tokenizer)


def our_builder(tokenizer_file: Path, spec: MediaSpec) -> DocumentBuilder:
    dataset = {
        "name": "x",
        "manifest": "x",
        "template": {"kind": "interleaved"},
        "transforms": {"kind": "tiles", "tiling": {"kind": "llama"}, "interpolation": "bilinear"},
    }
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|python_tag|>"}
    config = HuggingFaceTokenizerConfig(path=tokenizer_file, image_token="<|image|>", **names)
    return DocumentBuilder(DatasetConfig.model_validate(dataset), load_tokenizer(config), spec)


def picture(size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(size[0] * 1000 + size[1])
    coarse = Image.fromarray(rng.integers(0, 256, (7, 5, 3), dtype=np.uint8))
    return coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def encoded(image: Image.Image) -> ImagePart:
    out = io.BytesIO()
    image.save(out, "PNG")
    return ImagePart(out.getvalue(), "png")


def pages() -> Iterator[list[Image.Image | str]]:
    """Yield pages of one to three images: first, after text, in sequence, apart."""
    images = map(picture, SIZES)
    while len(group := [image for _, image in zip(range(4), images, strict=False)]) == 4:
        a, b, c, d = group
        yield [a, "what"]
        yield ["look ", b, c, "two in a row", d, "one"]


def tiles_of(media: MediaBlock, side: int) -> torch.Tensor:
    """Return normalised pixels ``(tiles, 3, side, side)``, computed as the tower does."""
    count = side // PATCH
    values = normalise_pixels(media.values, 3, *CLIP, torch.float32).view(-1, count, count, 3, PATCH, PATCH)
    return values.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, side, side)


def mask_of(batch: MultimodalBatch, rows: int) -> npt.NDArray[np.int64]:
    """Return ``(T, images, MAX_TILES)``: whether a token attends to the features of a tile (all of them or none)."""
    media = batch.media["image"]
    tiles = [(place.image, number) for place, number in zip(media.locations, _numbers(media), strict=True)]
    mask = np.zeros((batch.segments.total, media.locations[-1].image + 1, MAX_TILES), dtype=np.int64)
    spans, keys = media.span_tokens.bounds, media.span_keys.bounds
    for span in range(media.span_tokens.num):
        views, counts = np.unique(media.attended_index[keys[span] : keys[span + 1]].numpy() // rows, return_counts=True)
        assert (counts == rows).all()
        for view in views:
            mask[spans[span] : spans[span + 1], tiles[view][0], tiles[view][1]] = 1
    return mask


def _numbers(media: MediaBlock) -> Iterator[int]:
    for _, places in groupby(media.locations, key=lambda place: place.image):
        yield from range(len(list(places)))


def compare(page: list[Image.Image | str], processor: Any, build: DocumentBuilder, side: int) -> float:
    """Return the largest difference of normalised values; assert that everything else is equal."""
    text = "".join(part if isinstance(part, str) else "<|image|>" for part in page)
    theirs = processor(
        images=[part for part in page if isinstance(part, Image.Image)],
        text=f"<|begin_of_text|>{text}<|end_of_text|>",
        return_tensors="pt",
    )
    parts = tuple(TextPart(part) if isinstance(part, str) else encoded(part) for part in page)
    document = build(Sample(parts, {}, Provenance("x", "s", "k", 0)))
    batch = collate([Pack((document,), 0)], build.spec)
    media = batch.media["image"]
    assert batch.token_ids.tolist() == theirs["input_ids"][0].tolist()
    images = [list(places) for _, places in groupby(media.locations, key=lambda place: place.image)]
    ids = [tile_grids(MAX_TILES).index(places[0].tiles) + 1 for places in images]
    assert ids == theirs["aspect_ratio_ids"][0].tolist()
    assert [len(places) for places in images] == theirs["aspect_ratio_mask"][0].sum(-1).tolist()
    np.testing.assert_array_equal(mask_of(batch, (side // PATCH) ** 2 + 1), theirs["cross_attention_mask"][0].numpy())
    there = theirs["aspect_ratio_mask"][0].bool()
    assert not theirs["pixel_values"][0][~there].any()  # Absent tiles are zeros in both implementations.
    return float((tiles_of(media, side) - theirs["pixel_values"][0][there]).abs().max())


def test_a_hundred_sizes(tokenizer_file: Path, parity: Recorder) -> None:
    processor, build = their_processor(tokenizer_file, SIDE), our_builder(tokenizer_file, SPEC)
    for page in pages():
        parity("mllama", "pixels, normalised", compare(page, processor, build, SIDE), 2e-6)


def test_the_published_size(tokenizer_file: Path, parity: Recorder) -> None:
    spec = MediaSpec(Placement.CROSS_ATTENTION, PATCH, fixed_grid=(40, 40), class_features=1, max_tiles=MAX_TILES)
    build, page = our_builder(tokenizer_file, spec), [picture((800, 1700)), "wide"]
    error = compare(page, their_processor(tokenizer_file, 560), build, 560)
    parity("mllama", "pixels, normalised", error, 2e-6)
