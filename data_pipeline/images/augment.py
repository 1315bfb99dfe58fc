"""Random changes of an image in training: one crop (shift and scale at once), a flip, one colour matrix.

Cheap on purpose: the crop is a slice, scaling falls together with the resize that follows, and brightness, contrast and
saturation are one 3 x 3 matrix applied at the final size. Every draw comes from the caller's generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from data_pipeline.images.decode import Pixels
from data_pipeline.io.strict import StrictConfig
from data_pipeline.order.randomness import Draws

Box = tuple[int, int, int, int]
"""Top, left, height, width in pixels of the source; may reach beyond it."""

_IDENTITY = np.eye(3, dtype=np.float32)
# Maps a row of (red, green, blue) to its gray in all three places. Weights: ITU-R BT.601.
_TO_GRAY = np.repeat(np.array([[0.299], [0.587], [0.114]], dtype=np.float32), 3, axis=1)


class AugmentConfig(StrictConfig):
    """Strength of each change; 0 (or 1 for ``scale``) switches it off."""

    shift: float = Field(default=0.0, ge=0, le=0.5)
    """Largest shift of the crop, as a share of the image's side."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Side of the crop as a share of the image's side, drawn between the two; above 1 zooms out on white."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a left-right mirror; leave 0 where text or direction matters."""
    brightness: float = Field(default=0.0, ge=0, lt=1)
    """Factor drawn from 1 - b to 1 + b."""
    contrast: float = Field(default=0.0, ge=0, lt=1)
    """Factor drawn from 1 - c to 1 + c, around mid gray."""
    saturation: float = Field(default=0.0, ge=0, lt=1)
    """Factor drawn from 1 - s to 1 + s, around the pixel's own gray."""

    @model_validator(mode="after")
    def _check_scale(self) -> AugmentConfig:
        low, high = self.scale
        if not 0.05 <= low <= high <= 4:
            raise ValueError(f"scale={list(self.scale)}: expected [low, high] with 0.05 <= low <= high <= 4")
        return self


def crop_box(size: tuple[int, ...], config: AugmentConfig, rng: Draws) -> Box:
    """A random box, centred up to the shift."""
    height, width = size[0], size[1]
    scale, down, right = rng.random(3).tolist()
    side = config.scale[0] + scale * (config.scale[1] - config.scale[0])
    box_height, box_width = max(1, round(height * side)), max(1, round(width * side))
    top = (height - box_height) / 2 + (2 * down - 1) * config.shift * height
    left = (width - box_width) / 2 + (2 * right - 1) * config.shift * width
    return round(top), round(left), box_height, box_width


def cut(pixels: Pixels, box: Box) -> Pixels:
    """The box of the image, white where it reaches beyond."""
    top, left, height, width = box
    inside = pixels[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)]
    if inside.shape[:2] == (height, width):
        return inside
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    y, x = max(0, -top), max(0, -left)
    canvas[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return canvas


@dataclass(frozen=True)
class ColorChange:
    """A matrix and an offset on the colours of each pixel."""

    matrix: npt.NDArray[np.float32]
    offset: np.float32

    def __call__(self, pixels: Pixels) -> Pixels:
        colors = pixels.reshape(-1, 3).astype(np.float32) @ self.matrix
        colors += self.offset
        return np.clip(colors, 0, 255, out=colors).astype(np.uint8).reshape(pixels.shape)


def jitter(config: AugmentConfig, rng: Draws) -> ColorChange | None:
    """A random colour change, the same for every view of an image; None if none is configured."""
    strengths = (config.brightness, config.contrast, config.saturation)
    if not any(strengths):
        return None
    brightness, contrast, saturation = (
        1 + (2 * draw - 1) * strength for draw, strength in zip(rng.random(3).tolist(), strengths, strict=True)
    )
    matrix = brightness * contrast * (saturation * _IDENTITY + (1 - saturation) * _TO_GRAY)
    return ColorChange(matrix, np.float32(127.5 * (1 - contrast) + 0.5))  # The half rounds.
