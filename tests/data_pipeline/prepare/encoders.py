"""Small encoders, in a module that a worker process imports quickly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from data_pipeline.images.transforms import TransformConfig
from data_pipeline.images.video import VideoConfig
from data_pipeline.prepare.encode import EncodedSource
from data_pipeline.prepare.reshard import NamedManifest, ReshardSource, Selection

DIGEST = "ab" * 32


@dataclass
class BatchEncoder:
    """Codes that depend on the whole batch, so that any other composition of batches shows in the bytes."""

    digest: str = DIGEST
    stride: int = 8
    frames_per_code: int = 2
    codebook_size: int = 500
    batch_pixels: int = 1 << 21

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.integer[Any]]:
        *_, height, width = images.shape
        count = len(images)
        squares = images.reshape(count, -1, height // 8, 8, width // 8, 8).astype(np.int64).sum(axis=(1, 3, 5))
        return (squares + 7 * count + int(images[0].sum())) % self.codebook_size


def transforms(**values: Any) -> TransformConfig:
    return TypeAdapter(TransformConfig).validate_python(values or {"kind": "native", "min_pixels": 64})


FOUR_FRAMES = VideoConfig.model_validate(
    {"frames": {"kind": "uniform", "num_frames": 4, "spread": "starts"}, "min_pixels": 1024, "max_pixels": 1024}
)


def encoded(
    manifest: Path,
    encoder: BatchEncoder,
    grids_only: bool = False,
    video: VideoConfig | None = FOUR_FRAMES,
    **values: Any,
) -> EncodedSource:
    source = ReshardSource([NamedManifest("a", manifest)], Selection())
    return EncodedSource(source, encoder, transforms(**values), video, grids_only=grids_only)
