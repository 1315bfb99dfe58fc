"""A synthetic data set: one sample in twenty has a damaged image, text, document or checksum."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg

from data_pipeline.shards.manifest import Manifest, write_manifest
from data_pipeline.shards.writer import ShardWriter

Members = dict[str, bytes]

SIDE = 64
SHARD_SAMPLES = 250
EVERY = 20


def sound_sample(number: int) -> Members:
    """Return a noisy JPEG and a caption of varying length."""
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    caption = " ".join(["a picture of nothing in particular"] * (1 + number % 5))
    return {"jpg": simplejpeg.encode_jpeg(pixels, quality=90), "json": json.dumps({"captions": [caption]}).encode()}


def _captions(text: object) -> bytes:
    return json.dumps({"captions": [text]}).encode()


def _bomb(members: Members) -> Members:
    """Return a PNG whose header has 65,535 x 65,535 pixels. A JPEG file this short would fail for another reason."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 65_535, 65_535, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")]
    return {"jpg": b"\x89PNG\r\n\x1a\n" + b"".join(chunks)}


DAMAGES: tuple[Callable[[Members], Members], ...] = (
    lambda members: {"jpg": members["jpg"][: len(members["jpg"]) // 2]},
    lambda members: {"jpg": b"no image at all"},
    lambda members: {"jpg": b""},
    _bomb,
    lambda members: {"json": members["json"][:10]},
    lambda members: {"json": b'{"captions": ["\xff"]}'},
    lambda members: {"json": b"[" * 50_000},
    lambda members: {"json": _captions("")},
    lambda members: {"json": _captions("far too long for any pack " * 500)},
    lambda members: {"json": b'{"captions": ["\\ud800"]}'},
    lambda members: {},  # Written undamaged; its bytes change after the index was written.
    lambda members: {},
)
_ROTTING = (len(DAMAGES) - 2, len(DAMAGES) - 1)


@dataclass(frozen=True)
class DamagedSet:
    """A data set; ``bad`` is True for each damaged sample."""

    manifest: Path
    bad: npt.NDArray[np.bool_]


def write_damaged_set(folder: Path, num_samples: int, seed: int) -> DamagedSet:
    """Write shards, indexes and ``set.manifest``. ``seed`` determines the damaged samples."""
    rng = np.random.default_rng(seed)
    bad = np.zeros(num_samples, np.bool_)
    bad[rng.choice(num_samples, num_samples // EVERY, replace=False)] = True
    rotting: list[int] = []
    with ShardWriter(folder, "set", max_samples=SHARD_SAMPLES) as writer:
        for number in range(num_samples):
            members = sound_sample(number)
            if bad[number]:
                which = int(bad[:number].sum()) % len(DAMAGES)
                members |= DAMAGES[which](members)
                if which in _ROTTING:
                    rotting.append(number)
            writer.write(f"{number:08d}", members)
    manifest = write_manifest(folder / "set.manifest", writer.shards)
    for number in rotting:
        _flip_a_bit(manifest, number, rng)
    return DamagedSet(folder / "set.manifest", bad)


def _flip_a_bit(manifest: Manifest, sample: int, rng: np.random.Generator) -> None:
    shard, row = manifest.locate(sample)
    index = manifest.open_index(shard)
    member = index.row(row).members[0]
    tar = Path(index.tar_path)
    times = tar.stat()
    with tar.open("r+b") as file:
        file.seek(member.offset + int(rng.integers(member.size)))
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << int(rng.integers(8))]))
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))  # Bit rot does not change the modification time.
