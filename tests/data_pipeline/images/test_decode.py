"""Decoding, compared with Pillow; hostile and damaged files raise."""

from __future__ import annotations

import io
import math
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode, functional

from data_pipeline.errors import SampleError
from data_pipeline.images import crops
from data_pipeline.images.crops import resize
from data_pipeline.images.decode import DecodeMode, Pixels, decode_image

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


def _noisy(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return an image with detail at all scales, like a photograph."""
    rng = np.random.default_rng(seed)
    total = np.full((height, width, 3), 128.0)
    for size in (2, 4, 8, 16, 32, 64):
        coarse = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        total += (np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) - 128.0) / 4
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def _psnr(ours: Pixels, reference: Pixels) -> float:
    error = float(((ours.astype(float) - reference) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def _pillow(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(40, 64), (333, 217), (1, 1), (8, 700)])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_equals_pillow_and_torchvision(subsampling: int, size: tuple[int, int], progressive: bool) -> None:
    data = _encode(_noisy(*size), "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
    pixels = decode_image(data, max_pixels=LIMIT)
    np.testing.assert_array_equal(pixels, _pillow(data))
    raw = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    np.testing.assert_array_equal(pixels, decode_jpeg(raw, ImageReadMode.RGB).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("color", ["L", "CMYK"])
@pytest.mark.parametrize("mode", list(DecodeMode))
def test_gray_and_print_colors_equal_pillow(color: str, mode: DecodeMode) -> None:
    data = _encode(_noisy(60, 90).convert(color), "JPEG", quality=90)
    pixels = decode_image(data, mode=mode, max_pixels=LIMIT, min_side=(60, 90))
    np.testing.assert_array_equal(pixels, _pillow(data))


def test_print_colors_stored_as_ycck_equal_pillow() -> None:
    inks = np.random.default_rng(0).integers(0, 256, (32, 48, 4), dtype=np.uint8)
    data = simplejpeg.encode_jpeg(inks, quality=95, colorspace="CMYK")
    assert simplejpeg.decode_jpeg_header(data)[2] == "YCCK"
    np.testing.assert_array_equal(decode_image(data, max_pixels=LIMIT), _pillow(data))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize(
    ("size", "into"),
    [((512, 512), (224, 224)), ((700, 300), (224, 224)), ((300, 900), (224, 224)), ((640, 427), (448, 224))],
)
def test_exact_is_within_70_db_of_pillow(interpolation: str, size: tuple[int, int], into: tuple[int, int]) -> None:
    data = _encode(_noisy(*size), "JPEG", quality=90)
    ours = resize(decode_image(data, max_pixels=LIMIT), into, interpolation)
    # Resize the width first explicitly, because Pillow 13 changes the order for tall images.
    wide = Image.open(io.BytesIO(data)).resize((into[1], size[0]), Image.Resampling[interpolation.upper()])
    reference = np.asarray(wide.resize((into[1], into[0]), Image.Resampling[interpolation.upper()]))
    assert _psnr(ours, reference) >= (68 if interpolation == "lanczos" else 70)
    if interpolation == "lanczos" and not crops.TORCH_HAS_LANCZOS:
        return
    # The result must equal torchvision's exactly.
    raw = decode_jpeg(torch.from_numpy(np.frombuffer(data, np.uint8).copy()), ImageReadMode.RGB)
    mode = InterpolationMode(interpolation)
    theirs = functional.resize(raw, list(into), interpolation=mode, antialias=True)
    np.testing.assert_array_equal(ours, theirs.permute(1, 2, 0).numpy())


def test_older_versions_of_torch_use_pillows_lanczos(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.array(_noisy(61, 83))
    expected = resize(pixels, (90, 32), "lanczos") if crops.TORCH_HAS_LANCZOS else None
    monkeypatch.setattr(crops, "TORCH_HAS_LANCZOS", False)
    found = resize(pixels, (90, 32), "lanczos")
    assert found.shape == (90, 32, 3)
    assert expected is None or 60 < _psnr(found, expected) < 100


@pytest.mark.parametrize("size", [(512, 512), (700, 500), (1500, 1100), (300, 300)])
def test_fast_stays_within_40_db_of_exact(size: tuple[int, int]) -> None:
    data = _encode(_noisy(*size), "JPEG", quality=90)
    exact = resize(decode_image(data, max_pixels=LIMIT), (224, 224))
    fast = decode_image(data, mode=DecodeMode.FAST, max_pixels=LIMIT, min_side=(224, 224))
    assert fast.shape[0] < size[0] or size[0] < 448
    assert _psnr(resize(fast, (224, 224)), exact) >= 40


@pytest.mark.parametrize("mode", list(DecodeMode))
def test_both_modes_accept_what_libjpeg_merely_warns_of(mode: DecodeMode) -> None:
    clean = _encode(_noisy(64, 64), "JPEG")
    data = clean[:-2] + bytes(20) + clean[-2:]  # Stray bytes before the end marker.
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(data)
    pixels = decode_image(data, mode=mode, max_pixels=LIMIT, min_side=(64, 64))
    np.testing.assert_array_equal(pixels, _pillow(clean))


@pytest.mark.parametrize("encoding", ["PNG", "WEBP"])
def test_transparency_is_flattened_on_white(encoding: str) -> None:
    image = _smooth(9, 17, "RGBA")
    data = _encode(image, encoding, lossless=True, exact=True)
    white = Image.new("RGBA", image.size, "white")
    reference = np.asarray(Image.alpha_composite(white, image).convert("RGB")).astype(int)
    assert np.abs(decode_image(data, max_pixels=LIMIT).astype(int) - reference).max() <= 1


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(size: tuple[int, int], bits: int, kind: int, rows: list[bytes], *before: bytes) -> bytes:
    """Return a PNG with the given rows and colour type, and with chunks before its pixels."""
    header = struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = _chunk(b"IHDR", header) + b"".join(before) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _pillow_on_white(data: bytes) -> Pixels:
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def test_gray_and_sixteen_bits_become_rgb() -> None:
    gray = decode_image(_encode(_smooth(5, 6, "L"), "PNG"), max_pixels=LIMIT)
    assert gray.shape == (5, 6, 3)
    assert (gray[..., 0] == gray[..., 2]).all()
    # Use the upper byte of each value, because Pillow's conversion of 16-bit gray clips to 255.
    deep = Image.fromarray(np.array([[0, 65535], [256 * 7, 256 * 200]], dtype=np.uint16))
    assert decode_image(_encode(deep, "PNG"), max_pixels=LIMIT)[..., 1].tolist() == [[0, 255], [7, 200]]
    for kind, channels in ((2, 3), (4, 2), (6, 4)):  # RGB, gray with alpha, RGB with alpha.
        values = np.random.default_rng(kind).integers(0, 1 << 16, (5, 7, channels)).astype(">u2")
        data = _png((7, 5), 16, kind, [row.tobytes() for row in values])
        difference = decode_image(data, max_pixels=LIMIT).astype(int) - _pillow_on_white(data)
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_gray_and_palettes_of_any_depth_equal_pillow_with_and_without_transparency(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, (6, 8), dtype=np.uint8)
    packed = np.packbits(np.unpackbits(values[..., None], axis=2)[..., 8 - bits :].reshape(6, -1), axis=1)
    rows = [row.tobytes() for row in packed]
    palette = _chunk(b"PLTE", bytes(np.random.default_rng(9).integers(0, 256, 3 << bits, dtype=np.uint8)))
    alpha, key = _chunk(b"tRNS", bytes([0, 100])), _chunk(b"tRNS", struct.pack(">H", int(values[0, 0])))
    note = _chunk(b"tEXt", b"Comment\0no tRNS, no IDAT")  # Chunk names inside a text chunk.
    for data in (
        _png((8, 6), bits, 3, rows, palette),
        _png((8, 6), bits, 3, rows, note, palette),
        _png((8, 6), bits, 3, rows, palette, alpha),
        _png((8, 6), bits, 3, rows, note, palette, alpha),
        _png((8, 6), bits, 0, rows),
    ):
        pixels = decode_image(data, max_pixels=LIMIT)
        assert np.abs(pixels.astype(int) - _pillow_on_white(data)).max() <= 1
        np.testing.assert_array_equal(
            pixels, decode_image(data, max_pixels=LIMIT)
        )  # The alpha must not be uninitialised memory.
    # Pillow compares a key of fewer bits with 8-bit values, so the expected values follow the PNG standard.
    gray = decode_image(_png((8, 6), bits, 0, rows, key), max_pixels=LIMIT)[..., 0]
    expected = np.where(values == values[0, 0], 255, values.astype(int) * 255 // ((1 << bits) - 1))
    np.testing.assert_array_equal(gray, expected)


def test_numbers_outside_a_palette_are_black() -> None:
    data = _png((3, 1), 8, 3, [bytes([0, 1, 77])], _chunk(b"PLTE", b"abcdef"), _chunk(b"tRNS", b"\0"))
    assert decode_image(data, max_pixels=LIMIT).tolist() == [[[255, 255, 255], list(b"def"), [0, 0, 0]]]


@pytest.mark.parametrize("bits", [8, 16])
def test_pixels_of_the_color_key_become_white(bits: int) -> None:
    dtype, key = {8: ">u1", 16: ">u2"}[bits], (1 << (bits - 1)) + 5
    values = np.random.default_rng(bits).integers(0, 1 << bits, (4, 5, 3)).astype(dtype)
    values[1, 2], values[3, 3] = key, (key, key, key + (1 << (bits - 8)))  # The upper byte of 16 bits is compared.
    chunk = _chunk(b"tRNS", struct.pack(">HHH", key, key, key))
    pixels = decode_image(_png((5, 4), bits, 2, [row.tobytes() for row in values], chunk), max_pixels=LIMIT)
    expected = (values >> (bits - 8)).astype(np.uint8)
    expected[1, 2] = 255
    np.testing.assert_array_equal(pixels, expected)


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
    exif[0x0112] = 6  # Rotated by 90 degrees.
    data = _encode(_smooth(32, 64), "JPEG", exif=exif)
    assert decode_image(data, mode=mode, max_pixels=LIMIT, min_side=(8, 8)).shape == (64, 32, 3)


def test_fast_mode_scales_while_decoding_but_not_below_the_wanted_size() -> None:
    data = _encode(_smooth(256, 512), "JPEG")
    small = decode_image(data, mode=DecodeMode.FAST, max_pixels=LIMIT, min_side=(60, 60))
    assert 60 <= small.shape[0] < 128
    assert decode_image(data, mode=DecodeMode.EXACT, max_pixels=LIMIT, min_side=(60, 60)).shape == (256, 512, 3)
    assert decode_image(data, mode=DecodeMode.FAST, max_pixels=LIMIT, min_side=(256, 256)).shape == (256, 512, 3)
    # More than half of the size is not scaled, because it is slower than a full decode.
    assert decode_image(data, mode=DecodeMode.FAST, max_pixels=LIMIT, min_side=(129, 60)).shape == (256, 512, 3)
    odd = _encode(_smooth(255, 511), "JPEG")
    assert decode_image(odd, mode=DecodeMode.FAST, max_pixels=LIMIT, min_side=(128, 256)).shape == (128, 256, 3)
    assert decode_image(odd, mode=DecodeMode.FAST, max_pixels=LIMIT, min_side=(129, 256)).shape == (255, 511, 3)


def _bomb(side: int) -> bytes:
    """Return a PNG with a header of side x side pixels and a few bytes of data."""
    return _png((side, side), 8, 2, [bytes(98)])


@pytest.mark.fault
def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(SampleError, match=r"60000x60000 pixels, the limit is 16777216.*bomb"):
        decode_image(_bomb(60_000), max_pixels=LIMIT)


@pytest.mark.fault
def test_a_second_header_of_a_png_cannot_raise_its_size() -> None:
    second = _chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    with pytest.raises(SampleError, match="damaged png image: a second header says 60000x60000"):
        decode_image(_png((7, 5), 8, 2, [bytes(21)] * 5, second), max_pixels=LIMIT)


@pytest.mark.fault
@pytest.mark.parametrize("pixels", [b"no zlib stream", zlib.compress(bytes(30))[:-6], zlib.compress(b"\7" * 110)])
def test_pixels_of_a_png_that_no_decoder_can_read_are_refused(pixels: bytes) -> None:
    chunks = (
        _chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 8, 2, 0, 0, 0)) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")
    )
    with pytest.raises(SampleError, match="damaged png image"):
        decode_image(b"\x89PNG\r\n\x1a\n" + chunks, max_pixels=LIMIT)


@pytest.mark.fault
def test_large_metadata_and_bytes_after_a_png_are_ignored() -> None:
    rows = [bytes(range(21))] * 5
    text = _chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(1 << 22)))
    expected = decode_image(_png((7, 5), 8, 2, rows), max_pixels=LIMIT)
    np.testing.assert_array_equal(decode_image(_png((7, 5), 8, 2, rows, text) + b"tail", max_pixels=LIMIT), expected)


@pytest.mark.fault
@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", list(DecodeMode))
def test_truncated_images_are_refused(encoding: str, mode: DecodeMode) -> None:
    data = _encode(_smooth(64, 64), encoding)
    for length in (*range(64), len(data) // 2):
        with pytest.raises(SampleError):
            decode_image(data[:length], mode=mode, max_pixels=LIMIT, min_side=(16, 16))


@pytest.mark.fault
@pytest.mark.parametrize("mode", list(DecodeMode))
def test_a_jpeg_that_a_decoder_would_fill_with_gray_is_refused(mode: DecodeMode) -> None:
    for color in ("RGB", "CMYK"):
        data = _encode(_noisy(64, 64).convert(color), "JPEG")
        cut = data[: 3 * len(data) // 4] + b"\xff\xd9"  # Truncated, but with an end marker.
        assert _pillow(cut).shape == (64, 64, 3)  # Pillow does not raise.
        with pytest.raises(SampleError, match="premature end of data segment"):
            decode_image(cut, mode=mode, max_pixels=LIMIT, min_side=(16, 16))


@pytest.mark.fault
def test_bytes_that_are_no_image_are_refused() -> None:
    with pytest.raises(SampleError, match="no JPEG, PNG or WebP"):
        decode_image(b"GIF89a....................", max_pixels=LIMIT)
