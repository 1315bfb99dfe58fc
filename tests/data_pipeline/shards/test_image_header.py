"""Sizes from headers against what the decoder gives, rotated images included."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.decode.image import decode_image
from data_pipeline.errors import SampleError
from data_pipeline.shards.image_header import exif_orientation, image_size

ORIENTATION = 0x0112


def _exif(value: int, order: str) -> bytes:
    """A TIFF block of two entries, the second of which is the orientation."""
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    entries = [(0x010F, 2, 1, 0), (ORIENTATION, 3, 1, value if order == "<" else value << 16)]
    return (
        start
        + struct.pack(order + "H", 2)
        + b"".join(struct.pack(order + "HHII", *entry) for entry in entries)
        + b"\0" * 4
    )


def _image(encoding: str, exif: bytes) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)).save(out, encoding, exif=exif)
    return out.getvalue()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("value", range(10))
def test_the_header_tells_the_size_that_decoding_gives(encoding: str, order: str, value: int) -> None:
    prefix = b"Exif\0\0" if encoding != "PNG" else b""
    data = _image(encoding, prefix + _exif(value, order))
    size = image_size(data)
    assert decode_image(data, max_pixels=10_000).shape[:2] == (size.height, size.width)


def test_the_first_application_segment_counts_as_for_the_decoder() -> None:
    plain, xmp = _image("JPEG", b""), b"\xff\xe1" + struct.pack(">H", 2 + 4) + b"http"
    exif = b"Exif\0\0" + _exif(6, "<")
    turned = b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif
    for segments in (xmp + turned, turned + xmp):
        data = plain[:2] + segments + plain[2:]
        size = image_size(data)
        assert decode_image(data, max_pixels=10_000).shape[:2] == (size.height, size.width)


@given(data=st.data(), order=st.sampled_from("<>"), value=st.integers(0, 9))
def test_damaged_exif_is_read_as_the_decoder_reads_it(data: st.DataObject, order: str, value: int) -> None:
    exif = bytearray(_exif(value, order))
    for _ in range(data.draw(st.integers(1, 3))):
        exif[data.draw(st.integers(0, len(exif) - 1))] = data.draw(
            st.sampled_from([0, 1, 2, 6, 8, 0x2A, 0x49, 0x4D, 255])
        )
    encoded = _image("JPEG", b"Exif\0\0" + bytes(exif[: data.draw(st.integers(0, len(exif)))]))
    size = image_size(encoded)
    assert decode_image(encoded, max_pixels=10_000).shape[:2] == (size.height, size.width)


def test_an_exif_of_noise_means_as_stored() -> None:
    assert exif_orientation(b"") == 1
    assert exif_orientation(b"II*\0\xff\xff\xff\xff" + b"\xff" * 40) == 1
    assert exif_orientation(b"II*\0\x08\0\0\0\xff\xff" + b"\0" * 40) == 1


def test_a_png_that_ends_in_its_header_has_no_size() -> None:
    data = _image("PNG", b"")
    assert image_size(data[:40]).width == 30
    with pytest.raises(SampleError, match="without its header chunk"):
        image_size(data[:20])
