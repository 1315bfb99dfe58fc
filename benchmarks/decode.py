"""Decoding and resizing of one JPEG without a loader: ``python -m benchmarks.decode --json``.

Photographs of 512 px are resized to 224 px, antialiased bicubic, on one thread. The benchmark measures images per
core-second of both decode modes, of Pillow and of torchvision, and the difference from Pillow's result. Pillow's
``draft`` is its method of scaling while decoding. Reading, packing and workers: ``benchmarks.loader``.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode, functional

from benchmarks.peers.job import photo
from benchmarks.report import Case, main
from data_pipeline.images.crops import resize
from data_pipeline.images.decode import DecodeMode, decode_image

SOURCE, SIDE, PHOTOS, REPEATS = 512, 224, 8, 40
Pixels = npt.NDArray[np.uint8]
Decode = Callable[[bytes], Pixels]


def exact(data: bytes) -> Pixels:
    """Ours, every pixel."""
    return resize(decode_image(data, max_pixels=1 << 26), (SIDE, SIDE))


def fast(data: bytes) -> Pixels:
    """Ours, scaled while decoding."""
    small = decode_image(data, mode=DecodeMode.FAST, max_pixels=1 << 26, min_side=(SIDE, SIDE))
    return resize(small, (SIDE, SIDE))


def pillow(data: bytes, draft: bool = False) -> Pixels:
    """Pillow alone."""
    image = Image.open(io.BytesIO(data))
    if draft:
        image.draft("RGB", (SIDE, SIDE))
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def torchvision(data: bytes) -> Pixels:
    """torchvision alone."""
    planes = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    small = functional.resize(planes, [SIDE, SIDE], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return small.permute(1, 2, 0).numpy()


def decibels(ours: Pixels, reference: Pixels) -> float:
    """Return the peak signal-to-noise ratio."""
    error = float(((ours.astype(np.float64) - reference) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def _speeds(photos: list[bytes]) -> dict[str, float]:
    """Return images per second of CPU time; all take turns, and the fastest turn counts."""
    runners: dict[str, Decode] = {
        "exact": exact,
        "fast": fast,
        "pillow": pillow,
        "pillow draft": lambda data: pillow(data, draft=True),
        "torchvision": torchvision,
    }
    best = dict.fromkeys(runners, math.inf)
    for _ in range(REPEATS):
        for name, decode in runners.items():
            start = time.process_time()
            for data in photos:
                decode(data)
            best[name] = min(best[name], time.process_time() - start)
    return {name: len(photos) / seconds for name, seconds in best.items()}


def measure() -> list[Case]:
    """Return speed and difference from Pillow of both modes."""
    torch.set_num_threads(1)
    photos = [photo(number, SOURCE, SOURCE) for number in range(PHOTOS)]

    def distance(decode: Decode) -> float:
        return min(decibels(decode(data), pillow(data)) for data in photos)

    speeds = _speeds(photos)
    case = f"JPEG {SOURCE} to {SIDE} px"
    return [
        Case(
            f"{case}, exact",
            speeds["exact"],
            {name: speeds[name] for name in ("pillow", "torchvision")},
            "images/core-s",
            lower_is_better=False,
        ),
        Case(
            f"{case}, fast",
            speeds["fast"],
            {"pillow draft": speeds["pillow draft"]},
            "images/core-s",
            lower_is_better=False,
        ),
        Case(f"{case}, exact, from Pillow", distance(exact), {"limit": 70.0}, "dB", lower_is_better=False),
        Case(f"{case}, fast, from Pillow", distance(fast), {"limit": 40.0}, "dB", lower_is_better=False),
    ]


if __name__ == "__main__":
    main("decode", measure)
