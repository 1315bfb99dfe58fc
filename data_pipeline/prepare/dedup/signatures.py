"""Compute and store signatures: a few bytes per sample by which samples are compared.

    shard --read, decode (any process)--> FOLDER/ab/abcdef....exact   key uint64 (N, words) | state | pixels

There is one file per shard and criterion. Computing signatures takes most of the time of a search, so later searches
reuse them, at any distance and with any other data sets. The file name contains the sha256 of the tar and, for
perceptual hashes, ``max_pixels``: a search with another limit computes them anew. Files are written atomically.

Not for: the search (``search``).
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
from data_pipeline.sample import ImagePart, Sample, StoredFrames
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.storage.config import CacheConfig, Keep
from data_pipeline.storage.location import Url
from data_pipeline.storage.storage import Storage
from data_pipeline.text.templates.base import media_of

SIGNATURE_FORMAT = "mmscale-signatures-1"
_COLUMNS = {"key": ("<u8", 2), "state": ("u1", 1), "pixels": ("<i8", 1)}
_AHEAD = 64
_DECODED_SIDE = 128
"""JPEGs are decoded at the smallest scale with this side, which is four times the side that the hash uses."""


class Criterion(str, Enum):
    """When two samples are duplicates."""

    EXACT = "exact"
    """The bytes of all their images, videos and sounds are equal."""
    TEXT = "text"
    """All their texts are equal."""
    PAIR = "pair"
    """The bytes of all their images, videos and sounds, and all their texts, are equal."""
    PERCEPTUAL = "perceptual"
    """Each has exactly one image, and the perceptual hashes of the two differ in few bits."""

    @property
    def num_words(self) -> int:
        """Number of 64-bit words of a key. A digest has 128 bits, which makes a collision practically impossible."""
        return 1 if self is Criterion.PERCEPTUAL else 2


class State(IntEnum):
    """Whether a sample can be compared."""

    COMPARED = 0
    ABSENT = 1
    """It has no image or no text to compare."""
    SEVERAL = 2
    """It has several images; a perceptual hash covers one."""
    FLAT = 3
    """Its image has nearly one colour."""
    DAMAGED = 4
    """It cannot be read or decoded."""


@dataclass(frozen=True)
class Signatures:
    """Signatures of one shard's samples, in order.

    Attributes:
        key: uint64 ``(N, words)``; valid where ``state`` is ``COMPARED``.
        state: ``State`` of each sample.
        pixels: Number of pixels of each sample's largest image, from the index.
    """

    key: npt.NDArray[np.uint64]
    state: npt.NDArray[np.uint8]
    pixels: npt.NDArray[np.int64]


def signature_path(folder: Path, tar_sha256: str, criterion: Criterion, max_pixels: int) -> Path:
    """Return the path of a shard's signatures."""
    limit = f".{max_pixels}" if criterion is Criterion.PERCEPTUAL else ""
    return folder / tar_sha256[:2] / f"{tar_sha256}{limit}.{criterion.value}"


def read_signatures(path: Path, criterion: Criterion, num_samples: int) -> Signatures | None:
    """Read the signatures that an earlier search wrote; None if they are absent, damaged or of another size."""
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
class SignatureTask:
    """One shard to read, and the criteria whose signatures are missing."""

    manifest: Path | Url
    number: int
    criteria: tuple[Criterion, ...]


@dataclass(frozen=True)
class SignatureWork:
    """Reads a shard, writes its signatures and yields its number of samples; run by worker processes (``in_order``)."""

    folder: Path
    max_pixels: int

    def __call__(self, task: SignatureTask) -> Iterator[int]:
        manifest = _manifest(task.manifest)
        first, end = (int(count) for count in manifest.cu_samples[task.number : task.number + 2])
        pixels = _pixels(manifest, task.number)
        keys = {criterion: np.zeros((end - first, criterion.num_words), np.uint64) for criterion in task.criteria}
        states = {criterion: np.zeros(end - first, np.uint8) for criterion in task.criteria}
        reader = SampleReader(manifest, "dedup", max_open=1)
        try:
            for row in range(end - first):
                if row % _AHEAD == 0:  # A remote shard: fetch these samples, and the next ones during their hashing.
                    starts = (first + row, first + row + _AHEAD)
                    reader.prefetch(0, [range(start, min(start + _AHEAD, end)) for start in starts if start < end])
                for criterion, (state, key) in self._signatures(reader, first + row, task.criteria).items():
                    keys[criterion][row], states[criterion][row] = key, state
        finally:
            reader.close()
        for criterion in task.criteria:
            path = signature_path(self.folder, manifest.shard_sha256(task.number), criterion, self.max_pixels)
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
    """Return state and key of one sample. An image with more than ``max_pixels`` is not decoded: state ``DAMAGED``."""
    images = [part.data for part in sample.parts if isinstance(part, ImagePart)]
    media = list[bytes]()
    for part in media_of(sample):
        media += part.data.images if isinstance(part.data, StoredFrames) else [part.data]
    if criterion is Criterion.PERCEPTUAL:
        state, value = _perceptual(images, max_pixels)
        return state, (value,)
    texts = [text.encode(errors="surrogatepass") for text in sample.texts]
    compared = {Criterion.EXACT: (media,), Criterion.TEXT: (texts,), Criterion.PAIR: (media, texts)}[criterion]
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
