"""Perceptual hashes equal those of the ImageHash package in every bit."""

from __future__ import annotations

import io

import imagehash
import numpy as np
import pytest
from PIL import Image

from data_pipeline.images.decode import DecodeMode, decode_image
from data_pipeline.prepare.dedup.phash import perceptual_hash


def scene(number: int, width: int, height: int) -> Image.Image:
    """Return an image with structure: noise at a few scales."""
    draw = np.random.default_rng(number)
    layers = [
        np.asarray(Image.fromarray(draw.integers(0, 256, (side, side, 3), np.uint8)).resize((width, height)), float)
        for side in (3, 9, 40)
    ]
    return Image.fromarray((0.5 * layers[0] + 0.3 * layers[1] + 0.2 * layers[2]).astype(np.uint8))


@pytest.mark.parametrize("number", range(40))
def test_the_bits_are_those_of_imagehash(number: int) -> None:
    image = scene(number, 20 + 37 * number % 300, 17 + 53 * number % 400)
    assert perceptual_hash(np.asarray(image)) == int(str(imagehash.phash(image)), 16)


@pytest.mark.parametrize("number", range(10))
def test_a_jpeg_decoded_at_reduced_size_hardly_differs(number: int) -> None:
    out = io.BytesIO()
    scene(number, 700, 500).save(out, "JPEG", quality=85)
    pixels = decode_image(out.getvalue(), mode=DecodeMode.FAST, max_pixels=10**7, min_side=(128, 128))
    assert pixels.shape[0] < 500
    found = perceptual_hash(pixels)
    assert found is not None
    expected = int(str(imagehash.phash(Image.open(io.BytesIO(out.getvalue())))), 16)
    assert bin(found ^ expected).count("1") <= 2


def test_scaling_and_compressing_change_few_bits_and_another_image_many() -> None:
    image = scene(1, 400, 300)
    out = io.BytesIO()
    image.resize((133, 100)).save(out, "JPEG", quality=50)
    first, second, other = (
        perceptual_hash(np.asarray(picture))
        for picture in (image, Image.open(io.BytesIO(out.getvalue())), scene(2, 400, 300))
    )
    assert first is not None
    assert second is not None
    assert other is not None
    assert bin(first ^ second).count("1") <= 4
    assert bin(first ^ other).count("1") > 16


def test_an_image_of_nearly_one_colour_has_no_hash() -> None:
    flat = np.full((50, 60, 3), 130, np.uint8)
    flat[:25] += 5
    assert perceptual_hash(flat) is None
    flat[:25] += 20
    assert perceptual_hash(flat) is not None


def test_a_coefficient_that_is_zero_on_paper_gives_the_same_bit_whatever_the_level() -> None:
    """Most coefficients of stripes are 0; rounding noise of 1e-12 must not decide their bits."""
    stripes = np.repeat(np.arange(64, dtype=np.uint8)[:, None, None] % 2 * 100, 64, axis=1).repeat(3, axis=2)
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    for picture in (stripes, ramp):
        hashes = {perceptual_hash(picture + np.uint8(level)) for level in (0, 17, 60)}
        assert len(hashes) == 1
