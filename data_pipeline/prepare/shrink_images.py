"""Scale down images with a long side and encode them again before they are stored.

A scaled image has the pixels that training decodes: EXIF rotation applied, transparency on white, gray as RGB. JPEG
and WebP become JPEG, PNG stays PNG. Images that are small enough keep their bytes. Imports torch.
"""

from __future__ import annotations

import torch
from torchvision.io import encode_jpeg, encode_png
from torchvision.transforms.v2 import functional as transforms

from data_pipeline.errors import SampleError
from data_pipeline.images.decode import DecodeMode, decode_image
from data_pipeline.io.json_member import parse_member
from data_pipeline.prepare.media_files import EXTENSION_OF_FORMAT
from data_pipeline.prepare.records import dump_json, rename_images
from data_pipeline.prepare.rows import Members
from data_pipeline.shards.image_header import ImageFormat, image_size, is_image

_MAX_PIXELS = 1 << 28
"""Limit for decoding: 768 MiB of RGB. A larger image raises ``SampleError``."""
_JPEG_QUALITY = 92


def shrink(members: Members, max_side: int) -> Members:
    """Return members whose images have no side longer than ``max_side`` pixels. ``parts`` get the new image names.

    Raises:
        SampleError: an image to scale cannot be decoded or has more than 2^28 pixels, or two members would have one
            name.
    """
    renamed: dict[str, str] = {}
    result: Members = {}
    for ext, content in members.items():
        if is_image(ext):
            kind, data = shrink_image(content, max_side)
            stem, dot, _ = ext.rpartition(".")
            renamed[ext] = ext if data is content else f"{stem}{dot}{EXTENSION_OF_FORMAT[kind]}"
            if renamed[ext] in result or (renamed[ext] != ext and renamed[ext] in members):
                raise SampleError(f"after scaling, two of the members {sorted(members)} would be .{renamed[ext]}")
            result[renamed[ext]] = data
        else:
            result[ext] = content
    if "json" in result and any(old != new for old, new in renamed.items()):
        fields = parse_member(result["json"])
        result["json"] = dump_json(fields) if rename_images(fields, renamed) else result["json"]
    return result


def shrink_image(content: bytes, max_side: int) -> tuple[ImageFormat, bytes]:
    """Return (format, bytes) of an image scaled to at most ``max_side``; a small image returns ``content`` itself."""
    size = image_size(content)
    longer = max(size.width, size.height)
    if longer <= max_side:
        return size.format, content
    torch.set_num_threads(1)  # Several worker processes scale images at the same time.
    pixels = torch.from_numpy(decode_image(content, mode=DecodeMode.EXACT, max_pixels=_MAX_PIXELS)).permute(2, 0, 1)
    height, width = pixels.shape[1:]
    target = [max(1, round(side * max_side / longer)) for side in (height, width)]
    scaled = transforms.resize(pixels, target, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True)
    scaled = scaled.contiguous()
    if size.format is ImageFormat.PNG:
        return ImageFormat.PNG, bytes(encode_png(scaled).numpy())
    return ImageFormat.JPEG, bytes(encode_jpeg(scaled, quality=_JPEG_QUALITY).numpy())
