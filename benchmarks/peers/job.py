"""Code shared by all runners: samples, decoder, and format of a batch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.images.crops import resize
from data_pipeline.images.decode import DecodeMode, decode_image
from data_pipeline.shards.image_header import image_size
from data_pipeline.shards.manifest import Manifest, write_manifest
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.text.tokenizer import SentencePieceTokenizerConfig, Tokenizer, load_tokenizer

TOKENIZER = SentencePieceTokenizerConfig(path=Path(__file__).resolve().parents[2] / "examples/emoji/tokenizer.model")
SIDE = 224
BATCH = 32
SHUFFLE_BUFFER = 1000
"""Size of the shuffle buffer of peers that have one, samples."""
_MAX_PIXELS = 1 << 26
_WORDS = ("a", "the", "red", "old", "tall", "house", "river", "dog", "child", "street", "light", "under", "with", "two")


class Scenario(str, Enum):
    """Measured scenarios."""

    RAW = "raw"
    """Encoded bytes and text."""
    EXACT = "exact"
    """Pixels of 224 x 224 from a full decode, and token ids."""
    FAST = "fast"
    """As ``exact``, with JPEGs scaled while they are decoded."""
    RESUME = "resume"
    """Time to the first raw sample (first batch for loaders of batches) after a resume at 90 % of an epoch."""


@dataclass(frozen=True)
class Job:
    """One measurement: folder of the samples, scenario, and number of worker processes."""

    folder: Path
    scenario: Scenario
    workers: int

    @classmethod
    def parse(cls, text: str) -> Job:
        """Return the job from the output of ``dump``."""
        record = json.loads(text)
        return cls(Path(record["folder"]), Scenario(record["scenario"]), record["workers"])

    def dump(self) -> str:
        """Return the job as one line of JSON."""
        return json.dumps({"folder": str(self.folder), "scenario": self.scenario.value, "workers": self.workers})

    @property
    def manifest(self) -> Path:
        """Manifest of the tars."""
        return manifest_path(self.folder)

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return Manifest.open(self.manifest).num_samples

    @property
    def is_decoded(self) -> bool:
        """Whether samples are pixels and token ids."""
        return self.scenario in (Scenario.EXACT, Scenario.FAST)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all runners."""
        return load_tokenizer(TOKENIZER)

    def pixels(self, data: bytes) -> np.ndarray:
        """Decode with the decoder of all runners: uint8 ``(3, 224, 224)``, antialiased bicubic."""
        if self.scenario is Scenario.FAST:
            header = image_size(data)
            wanted = (min(SIDE, header.height), min(SIDE, header.width))
            image = decode_image(data, mode=DecodeMode.FAST, max_pixels=_MAX_PIXELS, min_side=wanted)
        else:
            image = decode_image(data, max_pixels=_MAX_PIXELS)
        return np.ascontiguousarray(resize(image, (SIDE, SIDE)).transpose(2, 0, 1))  # Contiguous, as a batch needs it.

    def encode(self, image: bytes, text: str | bytes) -> tuple[Any, Any]:
        """Return a sample as a peer yields it: raw, or decoded with token ids."""
        text = text if isinstance(text, str) else text.decode()
        if not self.is_decoded:
            return image, text
        return self.pixels(image), self.tokenizer.encode(text)

    def stack(self, pairs: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        """Return a batch as a peer yields it: lists of bytes and texts, or tensors of pixels and padded ids."""
        images, texts = [image for image, _ in pairs], [text for _, text in pairs]
        if not self.is_decoded:
            return images, texts
        longest = max(len(ids) for ids in texts)
        padded = [ids + [self.tokenizer.pad_id] * (longest - len(ids)) for ids in texts]
        return torch.from_numpy(np.stack(images)), torch.tensor(padded)


def manifest_path(folder: Path) -> Path:
    """Manifest of the tars in the folder of the samples."""
    return folder / "photos.manifest"


def photo(number: int, height: int = 480, width: int = 640) -> bytes:
    """Return a JPEG of smooth colours with noise, about as compressible as a photograph."""
    import simplejpeg

    rng = np.random.default_rng(number)
    coarse = torch.from_numpy(rng.integers(0, 256, (1, 3, 12, 16), dtype=np.uint8))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].permute(1, 2, 0).numpy()
    noisy = np.clip(smooth.astype(np.int16) + rng.normal(0, 5, smooth.shape).astype(np.int16), 0, 255)
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(noisy.astype(np.uint8)), quality=90))


def caption(number: int) -> str:
    """Return a text of five to twenty words."""
    rng = np.random.default_rng((number, 1))
    return " ".join(rng.choice(_WORDS, rng.integers(5, 21)))


def write_photos(folder: Path, count: int) -> None:
    """Write tars of 100 samples, indexes and a manifest, the same on every machine; skip if they exist."""
    if manifest_path(folder).exists():
        return
    with ShardWriter(folder, "photos", max_samples=100) as writer:
        for number in range(count):
            writer.write(f"{number:06d}", {"jpg": photo(number), "txt": caption(number).encode()})
    write_manifest(manifest_path(folder), writer.shards)
