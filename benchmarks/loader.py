"""Samples per second of the loader against a plain webdataset pipeline with the same decoder on the same shards.

    python -m benchmarks.loader --json

Both run in this process, one thread, no workers, shards in the page cache. Ours decodes, tokenises, packs to a token
budget and collates with resume state; the peer streams the tars, shuffles in a buffer of 1000, decodes and tokenises
with the same functions, and stacks batches of 16, without state. The two take turns; the best of the repeats counts.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset

from benchmarks.figures import Case, main
from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.decode.image import DecodeMode
from data_pipeline.loader import Loader
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.shards.manifest import Manifest, write_manifest
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.templates import CaptionTemplate
from data_pipeline.tokenizer import SentencePieceTokenizerConfig, load_tokenizer
from data_pipeline.transforms import FixedTransform, ImageTransform

EMOJI = Path("examples/emoji")
BATCH = 16
SHUFFLE_BUFFER = 1000
REPEATS = 3


def _photo_like(number: int, side: int = 512) -> bytes:
    """A JPEG about as compressible as a photograph: smooth colours with some noise."""
    rng = np.random.default_rng(number)
    coarse = torch.from_numpy(rng.integers(0, 256, (1, 3, 16, 16), dtype=np.uint8))
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")[0].permute(1, 2, 0).numpy()
    noisy = np.clip(smooth.astype(np.int16) + rng.normal(0, 8, smooth.shape).astype(np.int16), 0, 255)
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(noisy.astype(np.uint8)), quality=90))


def _write_photos(folder: Path, count: int = 400) -> Path:
    with ShardWriter(folder, "photos", max_samples=100) as writer:
        for number in range(count):
            writer.write(f"{number:06d}", {"jpg": _photo_like(number), "txt": b"a picture of nothing in particular"})
    write_manifest(folder / "photos.manifest", writer.shards)
    return folder / "photos.manifest"


def _config(manifest: Path, transforms: FixedTransform) -> DataConfig:
    dataset = DatasetConfig(name="bench", manifest=manifest, template=CaptionTemplate(), transforms=transforms)
    return DataConfig.model_validate(
        {
            "tokenizer": {"kind": "sentencepiece", "path": EMOJI / "tokenizer.model"},
            "datasets": [dataset],
            "lanes": 1,
            "packing": {"max_tokens": 4096, "max_documents": BATCH},
        }
    )


def _ours(manifest: Path, transforms: FixedTransform, spec: MediaSpec) -> Iterator[int]:
    """Samples of each step."""
    with Loader(_config(manifest, transforms), spec, seed=1) as loader:
        for step in loader:
            yield step.num_samples


def _webdataset(manifest: Path, transforms: FixedTransform, spec: MediaSpec) -> Iterator[int]:
    """Samples of each batch of a plain pipeline."""
    shards = Manifest.open(manifest)
    urls = [str(shards.shard_path(number)) for number in range(shards.num_shards)]
    tokenizer = load_tokenizer(SentencePieceTokenizerConfig(path=EMOJI / "tokenizer.model"))
    transform = ImageTransform(transforms, spec)
    rng = np.random.default_rng(1)

    def decode(sample: dict[str, Any]) -> tuple[np.ndarray, list[int]]:
        image = next(sample[ext] for ext in ("jpg", "png", "webp") if ext in sample)
        fields = json.loads(sample["json"]) if "json" in sample else {"captions": [sample["txt"].decode()]}
        return transform(image, rng)[0].values, tokenizer.encode(fields["captions"][0])

    def stack(samples: list[tuple[np.ndarray, list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(len(ids) for _, ids in samples)
        ids = [ids + [tokenizer.pad_id] * (longest - len(ids)) for _, ids in samples]
        return torch.from_numpy(np.stack([values for values, _ in samples])), torch.tensor(ids)

    stream = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).repeat()
    stream = stream.shuffle(SHUFFLE_BUFFER).map(decode).batched(BATCH, collation_fn=stack)
    for images, _ids in stream:
        yield len(images)


def _rate(stream: Iterator[int], batches: int) -> float:
    """Samples per CPU-second over the next batches: other processes of the machine disturb that least."""
    start = time.process_time()
    samples = sum(itertools.islice(stream, batches))
    return samples / (time.process_time() - start)


def _case(name: str, manifest: Path, transforms: FixedTransform, spec: MediaSpec) -> Case:
    makers: dict[str, Callable[..., Iterator[int]]] = {"ours": _ours, "webdataset": _webdataset}
    streams = {label: make(manifest, transforms, spec) for label, make in makers.items()}
    for stream in streams.values():
        next(stream)  # Opens shards, fills the peer's shuffle buffer, warms the page cache.
    batches = Manifest.open(manifest).num_samples // BATCH  # A whole epoch: shards may hold unlike images.
    best = dict.fromkeys(streams, 0.0)
    for _ in range(REPEATS):
        for label, stream in streams.items():
            best[label] = max(best[label], _rate(stream, batches))
    peers = {"webdataset": round(best["webdataset"], 1)}
    return Case(name, round(best["ours"], 1), peers, "samples per CPU-second", lower_is_better=False)


def measure() -> list[Case]:
    """All cases."""
    torch.set_num_threads(1)
    small = MediaSpec(Placement.CROSS_ATTENTION, patch_size=8, fixed_grid=(4, 4))
    large = MediaSpec(Placement.CROSS_ATTENTION, patch_size=14, fixed_grid=(16, 16))
    augment = {"shift": 0.1, "scale": (0.8, 1.1), "flip": 0.5, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2}
    augmented = FixedTransform.model_validate({"augment": augment})
    with tempfile.TemporaryDirectory() as folder:
        photos = _write_photos(Path(folder))
        return [
            _case("emoji, augmented, to 32 px", EMOJI / "shards" / "train.manifest", augmented, small),
            _case("JPEG 512 to 224 px, exact", photos, FixedTransform(), large),
            _case("JPEG 512 to 224 px, fast", photos, FixedTransform(decode=DecodeMode.FAST), large),
        ]


if __name__ == "__main__":
    main("loader", measure)
