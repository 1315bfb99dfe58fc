"""Decoding: Pillow is the reference; hostile and damaged files are refused before or during the decode."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipeline.decode.image import DecodeMode, decode_image
from data_pipeline.errors import SampleError

LIMIT = 1 << 24


def _encode(image: Image.Image, encoding: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, encoding, **options)
    return out.getvalue()


def _smooth(height: int, width: int, mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x + y) % 256, 255 - x * 200 // width]
    pixels = np.stack(planes[: len(mode)], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode)


@pytest.mark.parametrize("encoding", ["PNG", "WEBP"])
def test_lossless_formats_equal_pillow(encoding: str) -> None:
    image = _smooth(13, 21)
    pixels = decode_image(_encode(image, encoding, lossless=True), max_pixels=LIMIT)
    np.testing.assert_array_equal(pixels, np.asarray(image))


def test_jpeg_is_within_two_steps_of_pillow() -> None:
    data = _encode(_smooth(40, 64), "JPEG", quality=90)
    reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_image(data, max_pixels=LIMIT).astype(int) - reference).max() <= 2


@pytest.mark.parametrize("encoding", ["PNG", "WEBP"])
def test_transparency_is_flattened_on_white(encoding: str) -> None:
    image = _smooth(9, 17, "RGBA")
    data = _encode(image, encoding, lossless=True, exact=True)
    white = Image.new("RGBA", image.size, "white")
    reference = np.asarray(Image.alpha_composite(white, image).convert("RGB")).astype(int)
    assert np.abs(decode_image(data, max_pixels=LIMIT).astype(int) - reference).max() <= 1


def test_gray_and_sixteen_bits_become_rgb() -> None:
    gray = decode_image(_encode(_smooth(5, 6, "L"), "PNG"), max_pixels=LIMIT)
    assert gray.shape == (5, 6, 3)
    assert (gray[..., 0] == gray[..., 2]).all()
    deep = Image.fromarray(np.array([[0, 65535], [256 * 7, 256 * 200]], dtype=np.uint16))
    assert decode_image(_encode(deep, "PNG"), max_pixels=LIMIT)[..., 1].tolist() == [[0, 255], [7, 200]]


@pytest.mark.parametrize("num_colors", [2, 16, 200])
def test_palettes_are_resolved(num_colors: int) -> None:
    image = _smooth(12, 12).quantize(num_colors)
    pixels = decode_image(_encode(image, "PNG"), max_pixels=LIMIT)
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def test_transparent_palette_colors_become_white() -> None:
    image = _smooth(12, 12).quantize(4)
    pixels = decode_image(_encode(image, "PNG", transparency=1), max_pixels=LIMIT)
    chosen = np.asarray(image) == 1
    assert (pixels[chosen] == 255).all()
    np.testing.assert_array_equal(pixels[~chosen], np.asarray(image.convert("RGB"))[~chosen])


@pytest.mark.parametrize("mode", list(DecodeMode))
def test_exif_rotation_is_applied_in_both_modes(mode: DecodeMode) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # Rotated by a quarter turn.
    data = _encode(_smooth(32, 64), "JPEG", exif=exif)
    assert decode_image(data, mode=mode, max_pixels=LIMIT, min_side=(8, 8)).shape == (64, 32, 3)


def test_fast_mode_scales_while_decoding_but_not_below_the_wanted_size() -> None:
    data = _encode(_smooth(256, 512), "JPEG")
    small = decode_image(data, mode=DecodeMode.FAST, max_pixels=LIMIT, min_side=(60, 60))
    assert 60 <= small.shape[0] < 128
    assert decode_image(data, mode=DecodeMode.EXACT, max_pixels=LIMIT, min_side=(60, 60)).shape == (256, 512, 3)
    assert decode_image(data, mode=DecodeMode.FAST, max_pixels=LIMIT, min_side=(256, 256)).shape == (256, 512, 3)


def _bomb(side: int) -> bytes:
    """A PNG header of side x side pixels, with a few bytes of data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.fault
def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(SampleError, match=r"60000x60000 pixels, the limit is 16777216.*bomb"):
        decode_image(_bomb(60_000), max_pixels=LIMIT)


@pytest.mark.fault
@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", list(DecodeMode))
def test_truncated_images_are_refused(encoding: str, mode: DecodeMode) -> None:
    data = _encode(_smooth(64, 64), encoding)
    with pytest.raises(SampleError):
        decode_image(data[: len(data) // 2], mode=mode, max_pixels=LIMIT, min_side=(16, 16))


@pytest.mark.fault
def test_bytes_that_are_no_image_are_refused() -> None:
    with pytest.raises(SampleError, match="no JPEG, PNG or WebP"):
        decode_image(b"GIF89a....................", max_pixels=LIMIT)
