"""Reads shards whole and lists every damage: where, which sample, what.

For: finding out before a training run, not in its middle. Goes on after a damaged sample; a damaged tar header ends the
walk of that shard, because what follows cannot be trusted. Not for: repairing.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from data_pipeline.decode.image import decode_image
from data_pipeline.errors import ManifestError, SampleError, ShardError
from data_pipeline.shards.image_header import FORMAT_OF_EXTENSION, image_size, is_image
from data_pipeline.shards.index import Member, ShardIndex, open_tar
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.tar_members import TarError, TarMember, split_name, walk
from data_pipeline.shards.texts import all_texts, parse_json

DEFAULT_MAX_PIXELS = 89_478_485
"""Pillow's own limit: a quarter gibibyte of RGB."""
_CHUNK_BYTES = 1 << 24


class Problem(str, Enum):
    """Kinds of damage."""

    MANIFEST = "manifest"
    """The manifest and the shard or its index disagree."""
    INDEX = "index"
    """The index is missing, damaged, or made for another tar."""
    TAR = "tar"
    """Truncated, a bad header, a link or device, a name that leaves the shard."""
    NAME = "name"
    """A member without an extension: webdataset passes over it."""
    DUPLICATE = "duplicate"
    """A key comes twice, or an extension twice in a sample."""
    CHECKSUM = "checksum"
    """Bytes differ from those that were indexed."""
    TEXT = "text"
    """No UTF-8, no JSON, or JSON of the wrong form."""
    PARTNER = "partner"
    """The JSON names a member that is absent."""
    EXTENSION = "extension"
    """The bytes are of another format than the extension says."""
    IMAGE = "image"
    """An image that cannot be decoded."""
    BOMB = "bomb"
    """An image with more pixels than the limit; refused by its header."""


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong. ``offset`` is in bytes inside the tar, None if it concerns the whole file."""

    shard: str
    key: str
    offset: int | None
    problem: Problem
    detail: str


@dataclass
class ShardReport:
    """What reading a shard found."""

    shard: str
    num_samples: int = 0
    num_members: int = 0
    num_bytes: int = 0
    damages: list[Damage] = field(default_factory=list)

    def add(self, problem: Problem, detail: str, key: str = "", offset: int | None = None) -> None:
        """Notes a damage of this shard."""
        self.damages.append(Damage(self.shard, key, offset, problem, detail))


def verify_manifest(path: str | Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Iterator[ShardReport]:
    """Reports shard after shard of a manifest.

    Raises:
        ManifestError: the manifest itself cannot be read.
    """
    manifest = Manifest.open(path)
    damaged = manifest.computed_fingerprint() != manifest.fingerprint
    for number in range(manifest.num_shards):
        report = verify_shard(manifest.shard_path(number), max_pixels=max_pixels, sha256=manifest.shard_sha256(number))
        expected = int(manifest.cu_samples[number + 1] - manifest.cu_samples[number])
        if damaged:
            report.add(Problem.MANIFEST, f"{path}: its fingerprint does not fit its content")
            damaged = False
        if report.num_samples != expected:
            report.add(Problem.MANIFEST, f"{report.num_samples} samples, {path} says {expected}")
        yield report


def verify_shard(
    tar_path: str | Path, *, max_pixels: int = DEFAULT_MAX_PIXELS, sha256: str | None = None
) -> ShardReport:
    """Reads one shard whole and decodes every image.

    Args:
        tar_path: The tar; its index is checked if there is one, and missed if not.
        max_pixels: Larger images count as damage and are not decoded.
        sha256: Digest that a manifest gives for this tar, hexadecimal.
    """
    tar_path = Path(tar_path)
    report = ShardReport(str(tar_path))
    index = _index(tar_path, report)
    try:
        with open_tar(tar_path) as data:
            report.num_bytes = len(data)
            _Walk(report, index, max_pixels).run(data)
            _check_digest(data, report, index, sha256)
    except TarError as error:
        report.add(Problem.TAR, str(error), offset=error.offset)
    except ShardError as error:
        report.add(Problem.TAR, str(error))
    return report


def _index(tar_path: Path, report: ShardReport) -> ShardIndex | None:
    try:
        index = ShardIndex.read(tar_path)
        index.check()
        return index
    except ManifestError as error:
        report.add(Problem.INDEX, str(error))
        return None


def _check_digest(data: memoryview, report: ShardReport, index: ShardIndex | None, sha256: str | None) -> None:
    digest = hashlib.sha256()
    for start in range(0, len(data), _CHUNK_BYTES):
        digest.update(data[start : start + _CHUNK_BYTES])
    found = digest.hexdigest()
    if index is not None and index.tar_sha256 != found:
        report.add(Problem.CHECKSUM, "the tar is not the one that was indexed (sha256 differs)")
    if sha256 is not None and sha256 != found:
        report.add(Problem.MANIFEST, "the tar is not the one that the manifest lists (sha256 differs)")


class _Walk:
    """The state of reading one tar: keys met so far and what the index expects."""

    def __init__(self, report: ShardReport, index: ShardIndex | None, max_pixels: int) -> None:
        self._report, self._max_pixels = report, max_pixels
        self._indexed: dict[int, tuple[str, Member]] | None = None
        if index is not None:
            self._indexed = {m.offset: (index.key(i), m) for i in range(len(index)) for m in index.members(i)}
        self._seen: set[str] = set()

    def run(self, data: memoryview) -> None:
        """Checks every sample; raises ``TarError`` where the tar itself is broken, after checking what came before."""
        key, members = "", dict[str, TarMember]()
        try:
            for member in walk(data, self._report.shard):
                self._report.num_members += 1
                name = split_name(member.name)
                if name is None:
                    self._report.add(Problem.NAME, f"{member.name!r} has no extension", offset=member.header_offset)
                    continue
                if name[0] != key or not members:
                    self._sample(data, key, members)
                    key, members = self._open(name[0], member), {}
                if name[1] in members:
                    self._report.add(Problem.DUPLICATE, f"a second member .{name[1]}", key, member.header_offset)
                    continue
                members[name[1]] = member
        finally:
            self._sample(data, key, members)
        for key, missing in (self._indexed or {}).values():
            self._report.add(Problem.INDEX, f"the index lists .{missing.ext}, not in the tar", key, missing.offset)

    def _open(self, key: str, member: TarMember) -> str:
        if key in self._seen:
            self._report.add(Problem.DUPLICATE, "the key comes a second time", key, member.header_offset)
        self._seen.add(key)
        return key

    def _sample(self, data: memoryview, key: str, members: dict[str, TarMember]) -> None:
        if not members:
            return
        self._report.num_samples += 1
        for ext, member in members.items():
            content = bytes(data[member.offset : member.offset + member.size])
            self._check_index(key, ext, member, content)
            if is_image(ext):
                self._check_image(key, ext, member, content)
            elif ext in ("txt", "json"):
                self._check_text(key, ext, member, content, members)

    def _check_index(self, key: str, ext: str, member: TarMember, content: bytes) -> None:
        if self._indexed is None:
            return
        old_key, old = self._indexed.pop(member.offset, ("", None))
        if old is None or (old_key, old.ext, old.size) != (key, ext, member.size):
            self._report.add(Problem.INDEX, f".{ext} is not in the index as it is here", key, member.offset)
        elif zlib.crc32(content) != old.crc32:
            self._report.add(Problem.CHECKSUM, f".{ext} differs from what was indexed (crc32)", key, member.offset)

    def _check_text(self, key: str, ext: str, member: TarMember, content: bytes, members: dict[str, TarMember]) -> None:
        try:
            text = content.decode()
            if ext == "txt":
                return
            fields = parse_json(text.encode())
            all_texts(fields)
        except (SampleError, UnicodeDecodeError) as error:
            reason = error.reason if isinstance(error, SampleError) else str(error)
            self._report.add(Problem.TEXT, f".{ext}: {reason}", key, member.offset)
            return
        for part in fields.get("parts") or ():
            name = part.get("image")
            if name is not None and (not isinstance(name, str) or name.lower() not in members):
                self._report.add(
                    Problem.PARTNER, f"the JSON names the image {name!r}, which is absent", key, member.offset
                )
            if name is None and "text" not in part:
                self._report.add(Problem.TEXT, f"a part with neither text nor image: {part!r:.80}", key, member.offset)

    def _check_image(self, key: str, ext: str, member: TarMember, content: bytes) -> None:
        try:
            size = image_size(content)
            expected = FORMAT_OF_EXTENSION[ext.rpartition(".")[2]]
            if size.format is not expected:
                detail = f".{ext} holds a {size.format.value}, not a {expected.value}"
                self._report.add(Problem.EXTENSION, detail, key, member.offset)
            if size.width * size.height > self._max_pixels:
                detail = f".{ext} claims {size.width}x{size.height} pixels, the limit is {self._max_pixels}"
                self._report.add(Problem.BOMB, detail, key, member.offset)
                return
            decode_image(content, max_pixels=self._max_pixels)
        except SampleError as error:
            self._report.add(Problem.IMAGE, f".{ext}: {error.reason}", key, member.offset)
