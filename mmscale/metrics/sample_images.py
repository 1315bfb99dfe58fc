"""The images of a batch as pixels or pictures again, with their captions."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.batch import MediaBlock, MultimodalBatch
from data_pipeline.document import IGNORE
from data_pipeline.media_spec import MediaSpec

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.uint8]
"""uint8 ``(height, width, 3)``."""
_MOST_FRAMES = 8


@dataclass(frozen=True)
class CaptionedImage:
    """Pixels uint8 ``(height, width, 3)`` and the text that the model learns for them."""

    pixels: Pixels
    caption: str


def join_patches(
    values: npt.NDArray[np.uint8],
    grid: tuple[int, int, int],
    spec: MediaSpec,
    later_values: npt.NDArray[np.uint8] | None = None,
) -> Pixels:
    """Return the image that consists of these patches, or the frames of a video side by side.

    Args:
        values: ``(P, patch_dim)``, patches row-major, each in order (channel, row, column).
        grid: Patches along (time, height, width). At most eight frames are shown, evenly spread.
        spec: Patch size and channels. A single channel is repeated three times.
        later_values: ``(P, (frames_per_patch - 1) * patch_dim)``, the second and later frames of each patch of a video.
            None for a still image, and for a tower that reads single frames.
    """
    time, height, width = grid
    if later_values is not None:
        frames = np.concatenate([values, later_values], axis=1).reshape(time, height * width, -1, spec.patch_dim)
        # (group, patch, frame in its group, value) -> (frame, patch, value)
        values, time = frames.swapaxes(1, 2), time * frames.shape[2]
    side = spec.patch_size
    shown = sorted({round(i) for i in np.linspace(0, time - 1, min(time, _MOST_FRAMES))})
    patches = values.reshape(time, height, width, spec.channels, side, side)[shown]
    # The axes become (row of patches, row, frame, column of patches, column, channel).
    picture = patches.transpose(1, 4, 0, 2, 5, 3).reshape(height * side, len(shown) * width * side, spec.channels)
    if spec.channels == 1:
        picture = np.repeat(picture, 3, axis=2)
    return np.ascontiguousarray(picture[:, :, :3])


def pictures(batch: MultimodalBatch, spec: MediaSpec) -> list[Image.Image]:
    """Return every crop of a batch as a picture, in order, without those of dummy documents. A video is one picture.

    Args:
        batch: A batch on any device.
        spec: Patch size and channels (``RunConfig.media_spec``).
    """
    from PIL import Image

    block = batch.media.get("image")
    if block is None:
        return []
    found = []
    for item, location in enumerate(block.locations):
        if batch.provenance[location.segment] is not None:
            found.append(Image.fromarray(_pixels(block, item, spec)))
    return found


def batch_images(
    batch: MultimodalBatch, spec: MediaSpec, decode: Callable[[list[int]], str], limit: int
) -> list[CaptionedImage]:
    """Return up to ``limit`` images of documents with exactly one image, with the text that carries loss.

    Args:
        batch: A batch on any device. Only the chosen rows are copied.
        spec: Patch size and channels.
        decode: ``Tokenizer.decode``.
        limit: Largest number of images.
    """
    block = batch.media.get("image")
    if block is None:
        return []
    images = []
    for item, segment in batch.pairs[:limit].tolist():
        images.append(CaptionedImage(_pixels(block, item, spec), decode(_answer_ids(batch, segment))))
    return images


def _pixels(block: MediaBlock, item: int, spec: MediaSpec) -> Pixels:
    """Return the picture of one item. Only its rows are copied from the block's device."""
    bounds = block.items.bounds[item : item + 2]
    first, last = torch.searchsorted(block.later_index, block.later_index.new_tensor(bounds)).tolist()
    later = block.later_values[first:last].cpu().numpy() if first < last else None
    return join_patches(block.values[slice(*bounds)].cpu().numpy(), block.grids[item], spec, later)


def encode_png(pixels: Pixels) -> bytes:
    """Return the PNG bytes of an image."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _answer_ids(batch: MultimodalBatch, segment: int) -> list[int]:
    start, end = batch.segments.bounds[segment : segment + 2]
    labels: Tensor = batch.labels[start:end]
    return [int(label) for label in labels.tolist() if label != IGNORE]


def contact_sheet(images: Sequence[Pixels], caption: str, gap: int = 4) -> Pixels:
    """Return images of one size in rows and columns on white, about a square, with a caption below."""
    height, width = images[0].shape[:2]
    columns = math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for number, pixels in enumerate(images):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        sheet[top : top + height, left : left + width] = pixels
    return with_caption(CaptionedImage(sheet, caption))


def with_caption(image: CaptionedImage, min_side: int = 192) -> Pixels:
    """Return the image with its caption on a strip below.

    A small image is enlarged until its shorter side has at least ``min_side`` pixels.
    Pillow's built-in font contains Latin letters. Other letters become boxes; TensorBoard's text has the full caption.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = image.pixels.shape[:2]
    scale = max(1, -(-min_side // max(1, min(height, width))))
    picture = Image.fromarray(image.pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)
    font = ImageFont.load_default(14)
    lines = _wrap(image.caption, max(8, picture.width // 8))
    strip = 18 * len(lines) + 8
    canvas = Image.new("RGB", (picture.width, picture.height + strip), "white")
    canvas.paste(picture, (0, 0))
    ImageDraw.Draw(canvas).multiline_text((4, picture.height + 2), "\n".join(lines), fill="black", font=font)
    return np.asarray(canvas, dtype=np.uint8)


def _wrap(text: str, columns: int, max_lines: int = 4) -> list[str]:
    import textwrap

    return textwrap.wrap(text, columns, max_lines=max_lines, placeholder=" …") or [""]
