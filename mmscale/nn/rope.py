"""Rotary positions: plain, scaled (linear, Llama 3, YaRN), partial, on three axes for text, on two axes for images.

Frequencies are cached per device. Angles are computed once per forward in float32 and passed to every block as a
``Rotation``. They are not module buffers: a mixed-precision engine would cast a buffer, and a model built on the meta
device would lose its values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from data_pipeline.io.strict import StrictConfig
from mmscale.nn.sizes import Side


class Llama3Scaling(StrictConfig):
    """Divides the low frequencies for a longer context.

    Source: Llama 3.1 reference code, ``apply_scaling``.
    """

    kind: Literal["llama3"] = "llama3"
    factor: float = Field(default=8.0, gt=0)
    """Divisor of the low frequencies: 8 in Llama 3.1, 32 in Llama 3.2."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """Frequencies with a wavelength above ``original_context / low_freq_factor`` tokens are divided by ``factor``."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """Frequencies with a wavelength below ``original_context / high_freq_factor`` tokens are unchanged. Between the two
    limits, the divided and the unchanged frequency are interpolated. Must be above ``low_freq_factor``."""
    original_context: int = Field(default=8192, gt=0)
    """Context length before the extension, tokens."""

    @model_validator(mode="after")
    def _ordered(self) -> Llama3Scaling:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor}: must be above low_freq_factor={self.low_freq_factor}"
            )
        return self


class LinearScaling(StrictConfig):
    """Divides every frequency by one factor.

    Source: Chen et al. 2023, "Position Interpolation" (arXiv 2306.15595).
    """

    kind: Literal["linear"]
    factor: float = Field(ge=1)
    """Divisor of the frequencies: extended context length / original context length."""


class YarnScaling(StrictConfig):
    """Divides the low frequencies, keeps the high ones, and scales the attention scores up.

    Source: YaRN (arXiv 2309.00071), section 3; defaults as in transformers.
    """

    kind: Literal["yarn"]
    factor: float = Field(ge=1)
    """Divisor of the low frequencies: extended context length / original context length."""
    original_context: int = Field(ge=1)
    """Context length before the extension, tokens."""
    attention_factor: float | None = Field(default=None, gt=0)
    """Factor of cosines and sines; null for ``0.1 * ln(factor) + 1``."""
    beta_fast: float = Field(default=32.0, gt=0)
    """Frequencies with at least this many turns within the original context are unchanged. Must be above
    ``beta_slow``."""
    beta_slow: float = Field(default=1.0, gt=0)
    """Frequencies with at most this many turns within the original context are divided by ``factor``. Between the two
    limits, the divided and the unchanged frequency are interpolated."""
    truncate: bool = True
    """Round the limits of the interpolation outwards to whole indices of frequencies."""

    @model_validator(mode="after")
    def _ordered(self) -> YarnScaling:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast}: must be above beta_slow={self.beta_slow}")
        return self


def _scaling_kind(value: Any) -> Any:
    """Return the kind of a scaling block; without ``kind`` it is ``llama3``."""
    return value.get("kind", "llama3") if isinstance(value, Mapping) else getattr(value, "kind", None)


ScalingConfig = Annotated[
    Annotated[Llama3Scaling, Tag("llama3")]
    | Annotated[LinearScaling, Tag("linear")]
    | Annotated[YarnScaling, Tag("yarn")],
    Discriminator(_scaling_kind),
]


class RopeConfig(StrictConfig):
    """Rotary positions of the decoder."""

    theta: float = Field(default=500_000.0, gt=1)
    """Base of the geometric series of frequencies."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of each head's channels that is rotated; 0.5 in Persimmon. The number of rotated channels must be even."""
    scaling: ScalingConfig | None = None
    """Context extension: ``kind: llama3`` (the default kind), ``linear`` or ``yarn``; null for none."""
    sections: tuple[int, int, int] | None = None
    """Number of frequencies for the time, height and width positions (``[16, 24, 24]`` in Qwen2-VL). The sum must be
    half the rotated channels. Null: one position per token."""
    tokens_per_second: float | None = Field(default=None, gt=0, le=1000)
    """Time positions for a second of a video, above 0, at most 1000 (Qwen2.5-VL: 2). Null: one position for each group
    of ``vision.temporal_patch`` frames (Qwen2-VL). Requires ``sections``."""
    text_after_video: Literal["all_axes", "space"] = "all_axes"
    """Position of what follows a video. ``all_axes``: after its largest position on any axis (the authors' code).
    ``space``: after its largest row or column, so that text overlaps a longer video in time. transformers 5.24 does
    this for Qwen2-VL and Qwen2.5-VL; choose it to compute the same. Generated text follows the largest position in
    both. Requires ``sections``."""

    @model_validator(mode="after")
    def _needs_sections(self) -> RopeConfig:
        if self.sections is None and (self.tokens_per_second is not None or self.text_after_video != "all_axes"):
            raise ValueError("tokens_per_second, text_after_video: only with positions on three axes; set sections")
        return self


class FrequencyLayout(str, Enum):
    """How two image axes share the frequencies of a head."""

    SHARED = "shared"
    """Both axes use the same series of ``head_dim / 4`` frequencies (Qwen2-VL)."""
    ALTERNATING = "alternating"
    """One series of ``head_dim / 2`` frequencies: even indices for rows, odd ones for columns (Pixtral)."""


class Rotary2dConfig(StrictConfig):
    """Two-axis rotary positions of a vision tower, for any image size."""

    kind: Literal["rotary_2d"] = "rotary_2d"
    theta: float = Field(default=10_000.0, gt=1)
    """Base of the geometric series of frequencies."""
    layout: FrequencyLayout = FrequencyLayout.SHARED
    """How rows and columns share a head: ``shared`` (Qwen2-VL) or ``alternating`` (Pixtral)."""


class LearnedPositionsConfig(StrictConfig):
    """A learned vector for each position of a fixed grid; every crop has this size."""

    kind: Literal["learned"] = "learned"
    grid: tuple[Side, Side]
    """Patches (rows, columns) of every crop."""


class BucketedPositionsConfig(StrictConfig):
    """A learned vector for each bucket of a crop's height and width, for crops of any size (Idefics2, Aria, SmolVLM).

    Row r of a crop with h rows is in bucket ``floor(r / h * grid[0])``, so the rows of a smaller crop are spread evenly
    over the table; columns likewise.
    """

    kind: Literal["bucketed"] = "bucketed"
    grid: tuple[Side, Side]
    """Buckets (rows, columns) of the table. A crop of this size uses each vector once."""


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of every row's angles, ``(T, R / 2)`` for R rotated channels per head."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def from_angles(cls, angles: Float[Tensor, "T R2"], dtype: torch.dtype, factor: float = 1.0) -> Rotation:
        """Return cosines and sines of ``angles``, multiplied by ``factor``."""
        cos, sin = angles.cos(), angles.sin()
        return cls((cos * factor).to(dtype), (sin * factor).to(dtype))


def rotate(heads: Float[Tensor, "T H K"], rotation: Rotation) -> Float[Tensor, "T H K"]:
    """Rotate the channel pairs ``(i, i + R/2)`` of each head; channels from R on are unchanged.

    Source: Su et al. 2021, "RoFormer"; the half-split pairing is that of GPT-NeoX and Hugging Face.
    """
    cos, sin = rotation.cos.unsqueeze(1), rotation.sin.unsqueeze(1)
    if not torch.is_grad_enabled():
        return _rotated(heads, cos, sin, 1)
    rotated: Tensor = _Rotate.apply(heads, cos, sin)
    return rotated


class _Rotate(Function):
    """Rotate in four passes, and rotate back in the backward pass. Autograd on the formula takes 1.6 times as long."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(heads, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = cos.shape[-1]
    rotated = torch.empty_like(heads)
    first, second = heads[..., :half], heads[..., half : 2 * half]
    torch.mul(first, cos, out=rotated[..., :half]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=rotated[..., half : 2 * half]).addcmul_(first, sin, value=direction)
    rotated[..., 2 * half :] = heads[..., 2 * half :]
    return rotated


@lru_cache
@torch.inference_mode(False)
def _series(num: int, width: int, theta: float, device: torch.device) -> Float[Tensor, " num"]:
    """Return ``theta ** (-2 i / width)`` for i in ``range(num)``.

    Cached. Inference mode is off, so that training can use a tensor that generation computed first.
    """
    exponents = torch.arange(num, device=device, dtype=torch.float32) * (2.0 / width)
    return 1.0 / (theta**exponents)


def _llama3_frequencies(frequencies: Float[Tensor, " R2"], scaling: Llama3Scaling) -> Float[Tensor, " R2"]:
    wavelengths = 2 * math.pi / frequencies
    blend = (scaling.original_context / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = blend.clamp(0.0, 1.0)  # 0: divided; 1: unchanged. Equal to the three cases of the reference.
    return frequencies * (blend + (1 - blend) / scaling.factor)


def _yarn_frequencies(theta: float, width: int, scaling: YarnScaling, device: torch.device) -> Float[Tensor, " R2"]:
    """Return the frequencies of a head with ``width`` rotated channels."""

    def index(turns: float) -> float:
        """Return the fractional index of the frequency with this many turns within the original context."""
        return width * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = (torch.arange(width // 2, device=device, dtype=torch.float32) - first) / ((last - first) or 0.001)
    kept = 1 - ramp.clamp(0.0, 1.0)  # 1: unchanged; 0: divided.
    frequencies = _series(width // 2, width, theta, device)
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept


@lru_cache
@torch.inference_mode(False)
def _text_frequencies(config: RopeConfig, head_dim: int, device: torch.device) -> tuple[Float[Tensor, " R2"], float]:
    """Return the scaled frequencies of a head and the factor of cosines and sines, which is 1 except for YaRN.

    Cached like ``_series``.
    """
    width, scaling = rotated_width(head_dim, config), config.scaling
    if isinstance(scaling, YarnScaling):
        factor = scaling.attention_factor
        frequencies = _yarn_frequencies(config.theta, width, scaling, device)
        return frequencies, 0.1 * math.log(scaling.factor) + 1.0 if factor is None else factor
    frequencies = _series(width // 2, width, config.theta, device)
    if isinstance(scaling, Llama3Scaling):
        return _llama3_frequencies(frequencies, scaling), 1.0
    return frequencies if scaling is None else frequencies / scaling.factor, 1.0


def text_rotation(
    position_ids: Int[Tensor, "T ..."], head_dim: int, config: RopeConfig, dtype: torch.dtype
) -> Rotation:
    """Return the rotation of decoder rows.

    Args:
        position_ids: ``(T,)``, or ``(T, 3)`` with ``config.sections``.
        head_dim: K.
        config: Frequencies and scaling.
        dtype: Dtype of the result; angles are computed in float32.

    Source: Su et al. 2021; Qwen2-VL (arXiv 2409.12191, section 2.1) for the sections.
    """
    frequencies, factor = _text_frequencies(config, head_dim, position_ids.device)
    if config.sections is None:
        positions = position_ids[:, None]
    else:
        axes = zip(position_ids.unbind(1), config.sections, strict=True)
        positions = torch.cat([axis[:, None].expand(-1, count) for axis, count in axes], dim=1)
    return Rotation.from_angles(positions.float() * frequencies, dtype, factor)


def rotated_width(head_dim: int, config: RopeConfig) -> int:
    """Return the number of rotated channels of a head."""
    return int(head_dim * config.fraction)


def image_rotation(
    rows: Int[Tensor, " P"], columns: Int[Tensor, " P"], head_dim: int, config: Rotary2dConfig, dtype: torch.dtype
) -> Rotation:
    """Return the rotation of patches by their row and column.

    Source: Qwen2-VL (arXiv 2409.12191, section 2.1) and Pixtral (arXiv 2410.07073, section 2.2).
    """
    if config.layout is FrequencyLayout.SHARED:
        by_row = by_column = _series(head_dim // 4, head_dim // 2, config.theta, rows.device)
    else:
        series = _series(head_dim // 2, head_dim, config.theta, rows.device)
        by_row, by_column = series[0::2], series[1::2]
    angles = torch.cat([rows[:, None].float() * by_row, columns[:, None].float() * by_column], dim=1)
    return Rotation.from_angles(angles, dtype)
