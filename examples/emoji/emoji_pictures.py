"""Encode an image of a style: on white, 64 pixels wide and high, in the format of its style.

Two of the packages have images of 64 pixels. The formats cover every decoder of the loader, and their settings were
chosen for size. The bytes depend on the pinned versions of Pillow and resvg-py (the extra ``emoji``).
"""

from __future__ import annotations

import io
from pathlib import Path

import resvg_py
from PIL import Image

SIDE = 64
EXTENSION = {"twitter": "webp", "google": "webp", "fluent-3d": "jpg", "fluent-flat": "png", "openmoji": "png"}
_PALETTE = 64  # Colours. Enough for antialiased edges of flat art; a file is two thirds of the size of lossless WebP.


def encode_picture(style: str, path: Path) -> bytes:
    """Return the encoded image with sides of ``SIDE`` pixels."""
    image = _flattened(path)
    buffer = io.BytesIO()
    match EXTENSION[style]:
        case "jpg":
            image.save(buffer, "JPEG", quality=75, optimize=True)
        case "png":
            image.quantize(_PALETTE, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
                buffer, "PNG", optimize=True
            )
        case _:
            image.save(buffer, "WEBP", quality=82, method=6)
    return buffer.getvalue()


def _flattened(path: Path) -> Image.Image:
    if path.suffix == ".svg":
        rendered = resvg_py.svg_to_bytes(svg_string=path.read_text(), width=SIDE, height=SIDE)
        image = Image.open(io.BytesIO(bytes(rendered)))
    else:
        image = Image.open(path)
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    flat = white.convert("RGB")
    return flat if flat.size == (SIDE, SIDE) else flat.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
