"""What samples are compared by: a few bytes for each sample, kept in a file for each shard and criterion.

    shard --read, decode (any process)--> FOLDER/ab/abcdef....perceptual   key uint64 (N, words) | state | pixels

This is the long part of finding duplicates, so it is never done twice: a file carries the sha256 of its tar in its
name, is whole or absent, and serves every later search, at another distance or beside other data sets. Not for: the
search (``search``).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import ManifestError, SampleError
from data_pipeline.images.decode import DecodeMode, decode_image
from data_pipeline.io.columns import Column, read_columns, write_columns
from data_pipeline.prepare.dedup.phash import perceptual_hash
from data_pipeline.sample import ImagePart, Sample
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.storage.config import CacheConfig, Keep
from data_pipeline.storage.location import Url
from data_pipeline.storage.storage import Storage

SIGNATURE_FORMAT = "mmscale-signatures-1"
_COLUMNS = {"key": ("<u8", 2), "state": ("u1", 1), "pixels": ("<i8", 1)}
_AHEAD = 64
_DECODED_SIDE = 128
"""JPEGs are decoded no larger than needed for this side: four times what the hash looks at."""


class Criterion(str, Enum):
    """When two samples are duplicates."""

    EXACT = "exact"
    """The bytes of all their images are equal."""
    TEXT = "text"
    """All their texts are equal."""
    PAIR = "pair"
    """Images and texts are equal."""
    PERCEPTUAL = "perceptual"
    """Each shows one image, and the perceptual hashes of the two differ in few bits."""

    @property
    def num_words(self) -> int:
        """64-bit words of a key: 128 bits, at which no two unequal contents of any data set will ever meet."""
        return 1 if self is Criterion.PERCEPTUAL else 2


class State(IntEnum):
    """Whether a sample can be compared."""

    COMPARED = 0
    ABSENT = 1
    """It lacks what is compared: it has no image, or no text."""
    SEVERAL = 2
    """It shows several images, and a perceptual hash is of one."""
    FLAT = 3
    """Its image is nearly of one colour."""
    DAMAGED = 4
    """It cannot be read or decoded."""


@dataclass(frozen=True)
class Signatures:
    """Of the samples of one shard, in its order. ``pixels`` is the largest image's size from the index."""

    key: npt.NDArray[np.uint64]
    state: npt.NDArray[np.uint8]
    pixels: npt.NDArray[np.int64]


def signature_path(folder: Path, tar_sha256: str, criterion: Criterion) -> Path:
    """Where the signatures of a shard lie."""
    return folder / tar_sha256[:2] / f"{tar_sha256}.{criterion.value}"


def read_signatures(folder: Path, tar_sha256: str, criterion: Criterion, num_samples: int) -> Signatures | None:
    """What an earlier run left; None if it is absent, damaged or of another shard."""
    path = signature_path(folder, tar_sha256, criterion)
    if not path.exists():
        return None
    try:
        arrays = read_columns(path, _COLUMNS, SIGNATURE_FORMAT).arrays
    except ManifestError:
        return None
    found = Signatures(arrays["key"], arrays["state"], arrays["pixels"])
    whole = found.key.shape == (num_samples, criterion.num_words) and len(found.state) == len(found.pixels)
    return found if whole and len(found.state) == num_samples else None


@dataclass(frozen=True)
class ShardTask:
    """One shard to read, for the criteria whose signatures are not there yet."""

    manifest: Path | Url
    number: int
    criteria: tuple[Criterion, ...]


@dataclass(frozen=True)
class SignatureWork:
    """Reads shards and writes their signatures: the work of a process (``in_order``). Yields sample counts."""

    folder: Path
    max_pixels: int

    def __call__(self, task: ShardTask) -> Iterator[int]:
        manifest = _manifest(task.manifest)
        first, end = (int(count) for count in manifest.cu_samples[task.number : task.number + 2])
        pixels = _pixels(manifest, task.number)
        keys = {criterion: np.zeros((end - first, criterion.num_words), np.uint64) for criterion in task.criteria}
        states = {criterion: np.zeros(end - first, np.uint8) for criterion in task.criteria}
        reader = SampleReader(manifest, "dedup", max_open=1)
        try:
            for row in range(end - first):
                if row % _AHEAD == 0:  # Of a remote shard: this stretch, and the next one while this one is hashed.
                    starts = (first + row, first + row + _AHEAD)
                    reader.expect(0, [range(start, min(start + _AHEAD, end)) for start in starts if start < end])
                for criterion, (state, key) in self._signatures(reader, first + row, task.criteria).items():
                    keys[criterion][row], states[criterion][row] = key, state
        finally:
            reader.close()
        for criterion in task.criteria:
            path = signature_path(self.folder, manifest.shard_sha256(task.number), criterion)
            path.parent.mkdir(parents=True, exist_ok=True)
            arrays: dict[str, Column] = {"key": keys[criterion], "state": states[criterion], "pixels": pixels}
            write_columns(path, arrays, {"format": SIGNATURE_FORMAT})
        yield end - first

    def _signatures(
        self, reader: SampleReader, index: int, criteria: tuple[Criterion, ...]
    ) -> dict[Criterion, tuple[State, tuple[int, ...]]]:
        try:
            sample = reader.read(index, lane=0)
        except SampleError:
            return {criterion: (State.DAMAGED, (0,) * criterion.num_words) for criterion in criteria}
        return {criterion: signature(sample, criterion, self.max_pixels) for criterion in criteria}


def signature(sample: Sample, criterion: Criterion, max_pixels: int) -> tuple[State, tuple[int, ...]]:
    """State and key of one sample. ``max_pixels``: larger images are not decoded and count as damaged."""
    images = [part.data for part in sample.parts if isinstance(part, ImagePart)]
    if criterion is Criterion.PERCEPTUAL:
        state, value = _perceptual(images, max_pixels)
        return state, (value,)
    texts = [text.encode(errors="surrogatepass") for text in sample.texts]
    compared = {Criterion.EXACT: (images,), Criterion.TEXT: (texts,), Criterion.PAIR: (images, texts)}[criterion]
    if not all(any(pieces) for pieces in compared):
        return State.ABSENT, (0, 0)
    digest = hashlib.blake2b(digest_size=16)
    for pieces in compared:
        digest.update(struct.pack("<Q", len(pieces)))
        for piece in pieces:
            digest.update(struct.pack("<Q", len(piece)))
            digest.update(piece)
    return State.COMPARED, struct.unpack("<QQ", digest.digest())


def _perceptual(images: list[bytes], max_pixels: int) -> tuple[State, int]:
    if len(images) != 1:
        return (State.SEVERAL if images else State.ABSENT), 0
    side = (_DECODED_SIDE, _DECODED_SIDE)
    try:
        pixels = decode_image(images[0], mode=DecodeMode.FAST, max_pixels=max_pixels, min_side=side)
    except SampleError:
        return State.DAMAGED, 0
    value = perceptual_hash(pixels)
    return (State.FLAT, 0) if value is None else (State.COMPARED, value)


def _pixels(manifest: Manifest, number: int) -> npt.NDArray[np.int64]:
    index = manifest.open_index(number)
    each = index.column("width").astype(np.int64) * index.column("height").astype(np.int64)
    return np.maximum.reduceat(each, index.column("cu_members")[:-1]) if len(index) else np.zeros(0, np.int64)


@lru_cache(maxsize=64)
def _manifest(path: Path | Url) -> Manifest:
    if not isinstance(path, Url):
        return Manifest.open(path)
    return Manifest.open(path, Storage(cache=CacheConfig(keep=Keep.INDEXES)))  # Every image is read once.
