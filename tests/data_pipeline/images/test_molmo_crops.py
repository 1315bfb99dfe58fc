"""Molmo's images, compared with a reference implementation: tiling, pixels, padding, tokens and their order."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import DatasetConfig
from data_pipeline.document import Document
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.sample import ImagePart, Provenance, Sample
from mmscale.models.connectors.padding import padding_of_patches
from tests.data_pipeline.images.molmo_reference import COLUMN, END, PATCH, START, Prepared, Sizes, prepare

pytestmark = pytest.mark.parity
FULL, SMALL = Sizes(), Sizes(crop=48, patch=4, margin=2, most=6)
EDGES = [(1, 1), (1, 70), (112, 112), (112, 500), (336, 336), (337, 335), (3000, 40), (560, 784), (4000, 4000)]
_RNG = np.random.default_rng(6)
SIZES = EDGES + [tuple(size) for size in np.exp(_RNG.uniform(np.log(20), np.log(3000), (100, 2))).astype(int).tolist()]
SMALL_SIZES = [tuple(size) for size in np.exp(_RNG.uniform(np.log(5), np.log(300), (100, 2))).astype(int).tolist()]


class LetterTokenizer:
    """A tokenizer of letters with the layout tokens of Molmo."""

    bos_id, eos_id, pad_id, image_id, vocab_size, fingerprint = 1, 2, 0, PATCH, 1100, "letters"

    def special_id(self, name: str, field: str) -> int:
        return {"<im_start>": START, "<im_end>": END, "<im_col>": COLUMN}[name]

    def encode(self, text: str) -> list[int]:
        return [4 + ord(letter) % 90 for letter in text]

    def decode(self, ids: Any) -> str:
        return str(ids)


LAYOUT = {"crop_start": "<im_start>", "crop_end": "<im_end>", "row_end": "<im_col>", "join_tiles": True}


def builder(sizes: Sizes, tokenizer: Any = None, **tiling: Any) -> tuple[DocumentBuilder, MediaSpec]:
    side = sizes.crop // sizes.patch
    spec = MediaSpec(Placement.EMBEDDING, sizes.patch, sizes.pool, fixed_grid=(side, side), padding=True)
    rule = {"kind": "molmo", "max_tiles": sizes.most, "margin": sizes.margin, "padding_of": "next_crop", **tiling}
    transforms = {"kind": "tiles", "tiling": rule, "interpolation": "bilinear_float", "layout": LAYOUT}
    template = {"kind": "caption"}
    config = {"name": "d", "manifest": "m", "template": template, "transforms": transforms}
    return DocumentBuilder(DatasetConfig.model_validate(config), tokenizer or LetterTokenizer(), spec), spec  # type: ignore[arg-type]


def sample(data: bytes, size: tuple[int, int]) -> Sample:
    return Sample((ImagePart(data, "png", size=size),), {"caption": "a cat"}, Provenance("d", "s", "k", 0))


def picture(height: int, width: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(height * 4001 + width)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()


def assert_laid_out(document: Document, spec: MediaSpec, expected: Prepared) -> None:
    """Compare the tokens, the token of each feature, and the padding of each patch."""
    count = len(expected.tokens)
    assert document.token_ids[1 : 1 + count].tolist() == expected.tokens.tolist()
    assert len(document.items) == len(expected.index)
    slots = iter(document.scatter_index.tolist())
    for item, index in zip(document.items, expected.index, strict=True):
        found = np.full(index.shape, -100)
        for first, number in item.kept_features(spec):
            found[first : first + number] = [next(slots) - 1 for _ in range(number)]
        np.testing.assert_array_equal(found, index)
    kinds = padding_of_patches(collate([Pack((document,), 0)], spec).media["image"]).view(expected.masks.shape)
    # In the original code, padding is "all" if the share of image pixels is 0, and "some" if it is otherwise below 1,
    # including -1.
    np.testing.assert_array_equal(kinds.numpy(), np.where(expected.masks == 0, 1, np.where(expected.masks < 1, 2, 0)))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crops_tokens_and_padding_at_full_size(size: tuple[int, int]) -> None:
    """Use a dry run, and black pixels for the reference."""
    build, spec = builder(FULL)
    expected = prepare(np.zeros((*size, 3), np.uint8), FULL, lambda image, to: np.zeros((*to, 3), np.float32))
    assert_laid_out(build.dry_run(sample(b"", size)), spec, expected)


def differences(size: tuple[int, int], sizes: Sizes) -> np.ndarray[Any, Any]:
    """Return the differences between our pixels and the reference, which is not rounded."""
    build, spec = builder(sizes)
    pixels = picture(*size)
    document, expected = build(sample(png(pixels), size)), prepare(pixels, sizes)
    assert_laid_out(document, spec, expected)
    patch = sizes.patch
    ours = np.stack([item.values for item in document.items]).reshape(*expected.masks.shape, 3, patch, patch)
    theirs = expected.crops.reshape(*expected.masks.shape, patch, patch, 3) * 255
    return np.abs(ours.transpose(0, 1, 3, 4, 2) - theirs)


NEAREST = 0.5 + 1e-4
"""Largest difference between a value and the nearest byte, plus the error of float32."""


def test_pixels_of_a_hundred_sizes() -> None:
    """Each byte is the nearest one to the value of the reference."""
    found = np.concatenate([differences(size, SMALL).reshape(-1) for size in SMALL_SIZES])
    assert found.max() <= NEAREST


@pytest.mark.parametrize("size", [(480, 640), (1023, 769), (90, 1500)], ids=str)
def test_pixels_at_full_size(size: tuple[int, int]) -> None:
    assert differences(size, FULL).max() <= NEAREST


def test_the_padding_of_a_crop_itself() -> None:
    """With ``crop``, each crop has its own padding: the reference's masks shifted by one, plus one for the overview."""
    build, spec = builder(FULL, padding_of="crop")
    size = (500, 1400)
    document = build.dry_run(sample(b"", size))
    expected = prepare(np.zeros((*size, 3), np.uint8), FULL, lambda image, to: np.zeros((*to, 3), np.float32))
    kinds = padding_of_patches(collate([Pack((document,), 0)], spec).media["image"]).view(expected.masks.shape)
    masks = expected.masks[:-1]
    np.testing.assert_array_equal(kinds[1:].numpy(), np.where(masks == 0, 1, np.where(masks < 1, 2, 0)))
    # 500 x 1400 becomes 120 x 336, in rows 108 to 228 of 336: 7 empty rows of patches, 1 partial, 8 full, 1 partial.
    rows = kinds[0].view(24, 24)
    assert (rows == rows[:, :1]).all()
    assert rows[:, 0].tolist() == [1] * 7 + [2] + [0] * 8 + [2] + [1] * 7
