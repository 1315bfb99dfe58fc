"""Sizes from headers, compared with those of decoded images, including rotated ones."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_pipeline.errors import SampleError
from data_pipeline.images.decode import decode_image
from data_pipeline.shards.image_header import exif_orientation, image_size

ORIENTATION = 0x0112


def _exif(value: int, order: str) -> bytes:
    """Return a TIFF block of two entries; the second is the orientation."""
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    entries = [(0x010F, 2, 1, 0), (ORIENTATION, 3, 1, value if order == "<" else value << 16)]
    return (
        start
        + struct.pack(order + "H", 2)
        + b"".join(struct.pack(order + "HHII", *entry) for entry in entries)
        + b"\0" * 4
    )


def _image(encoding: str, exif: bytes, **options: Any) -> bytes:
    out = io.BytesIO()
    pixels = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    Image.fromarray(pixels).save(out, encoding, exif=exif, **options)
    return out.getvalue()


def _upright(data: bytes) -> np.ndarray:
    """Return the size according to Pillow, with the EXIF orientation applied."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("encoding", "options"),
    [("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("WEBP", {"quality": 80})],
)
def test_orientation_equals_pillow_in_header_and_pixels(encoding: str, options: dict[str, Any], order: str) -> None:
    for value in range(10):
        prefix = b"Exif\0\0" if encoding != "PNG" else b""
        data = _image(encoding, prefix + _exif(value, order), **options)
        expected, size = _upright(data), image_size(data)
        assert (size.height, size.width) == expected.shape[:2], value
        pixels = decode_image(data, max_pixels=10_000)
        assert np.abs(pixels.astype(int) - expected).max() <= (2 if options.get("quality") else 0), value


def test_exif_is_found_wherever_pillow_finds_it() -> None:
    plain, xmp = _image("JPEG", b""), b"\xff\xe1" + struct.pack(">H", 2 + 4) + b"http"
    exif = b"Exif\0\0" + _exif(6, "<")
    turned = b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif
    scan = plain.index(b"\xff\xda")
    late_chunk = struct.pack(">I", len(exif) - 6) + b"eXIf" + exif[6:]
    png = _image("PNG", b"")
    behind = png[:-12] + late_chunk + struct.pack(">I", zlib.crc32(late_chunk[4:])) + png[-12:]
    webp = _image("WEBP", _exif(6, ">"), lossless=True)  # Without the prefix.
    for data in (
        plain[:2] + xmp + turned + plain[2:],
        plain[:2] + turned + xmp + plain[2:],
        plain[:scan] + turned + plain[scan:],
        behind,
        webp,
    ):
        assert image_size(data)[1:] == (20, 30, 6)
        np.testing.assert_array_equal(decode_image(data, max_pixels=10_000), _upright(data))


def _frame_of(data: bytes, height: int, width: int) -> bytes:
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.fault
def test_a_jpeg_whose_bytes_hide_a_second_frame_is_refused_before_memory_is_spent() -> None:
    small = _image("JPEG", b"")
    big = _frame_of(small, 20_000, 20_000)
    hidden = (
        b"\xff\xd8\xff\x00" + struct.pack(">H", len(big)) + big[2:] + small[2:],
        big[:2] + b"\xff\xf0" + struct.pack(">H", len(big)) + big[2:] + small[2:],
        small[: small.index(b"\xff\xda")] + big[2:],
    )
    for data in hidden:
        with pytest.raises(SampleError, match=r"no marker at byte|second frame"):
            image_size(data)
        tracemalloc.start()  # tracemalloc also counts numpy's memory.
        with pytest.raises(SampleError):
            decode_image(data, max_pixels=10_000, header=image_size(small))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


@pytest.mark.fault
def test_a_jpeg_of_too_few_bytes_for_its_pixels_is_refused_by_its_header() -> None:
    for options in ({}, {"progressive": True}, {"subsampling": 0}):
        out = io.BytesIO()
        Image.new("RGB", (1600, 1200), "gray").save(
            out, "JPEG", optimize=True, **options
        )  # The smallest possible file.
        assert image_size(out.getvalue()).width == 1600
    data = _frame_of(_image("JPEG", b""), 9900, 9000)
    with pytest.raises(SampleError, match=r"9000x9900 pixels in \d+ bytes: they take 522436 bytes at least"):
        image_size(data)


@pytest.mark.fault
def test_a_progressive_jpeg_of_many_scans_is_refused_by_its_header() -> None:
    data = _image("JPEG", b"", progressive=True)
    last = data.rindex(b"\xff\xda")
    tail = data + b"\xff\xda" * 200  # Data after the end of the image, as some cameras append.
    assert image_size(tail) == image_size(data)
    with pytest.raises(SampleError, match=r"a progressive JPEG of 2\d\d scans, the limit is 100"):
        image_size(data[:last] + 200 * data[last:-2] + data[-2:])


@pytest.mark.fault
def test_header_and_decoder_agree_or_one_refuses() -> None:
    """For arbitrary bytes, a decoded image has the size in its header."""
    draw = random.Random(7)
    seeds = [_image(e, _exif(6, "<") if e == "PNG" else b"Exif\0\0" + _exif(6, "<")) for e in ("JPEG", "PNG", "WEBP")]
    num_decoded = 0
    for _ in range(1500):
        data = bytearray(draw.choice(seeds))
        at = draw.randrange(min(len(data), 700))
        kind = draw.randrange(3)
        if kind == 0:
            data[at] = draw.choice([0, 1, 8, 0xC0, 0xD8, 0xDA, 0xFF, draw.randrange(256)])
        elif kind == 1:
            data[at:at] = bytes(draw.choice([0, 0xFF, draw.randrange(256)]) for _ in range(draw.randint(1, 4)))
        else:
            del data[at : at + draw.randint(1, 4)]
        try:
            size = image_size(bytes(data))
        except SampleError:
            with pytest.raises(SampleError):
                decode_image(bytes(data), max_pixels=1 << 20)
            continue
        try:
            pixels = decode_image(bytes(data), max_pixels=1 << 20)
        except SampleError:
            continue
        num_decoded += 1
        assert pixels.shape == (size.height, size.width, 3)
    assert num_decoded > 200


@given(data=st.data(), order=st.sampled_from("<>"), value=st.integers(0, 9))
def test_damaged_exif_gives_a_valid_orientation(data: st.DataObject, order: str, value: int) -> None:
    exif = bytearray(_exif(value, order))
    for _ in range(data.draw(st.integers(1, 3))):
        exif[data.draw(st.integers(0, len(exif) - 1))] = data.draw(
            st.sampled_from([0, 1, 2, 6, 8, 0x2A, 0x49, 0x4D, 255])
        )
    assert 1 <= exif_orientation(bytes(exif[: data.draw(st.integers(0, len(exif)))])) <= 8


def test_an_exif_of_noise_means_as_stored() -> None:
    assert exif_orientation(b"") == 1
    assert exif_orientation(b"II*\0\xff\xff\xff\xff" + b"\xff" * 40) == 1
    assert exif_orientation(b"II*\0\x08\0\0\0\xff\xff" + b"\0" * 40) == 1


def test_a_png_that_ends_in_its_header_has_no_size() -> None:
    data = _image("PNG", b"")
    assert image_size(data[:40]).width == 30
    with pytest.raises(SampleError, match="without its header chunk"):
        image_size(data[:20])
