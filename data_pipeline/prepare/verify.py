"""Read whole shards and list every damage, with its position, its sample and its kind.

    tar --survey--> members, damages of the tar --index--> bytes as indexed? --contents--> bytes match the extension?

Use it before a training run. Reading continues after a damage: with an index every other sample is found; without one,
only the samples that can be recovered from the tar alone. Links in a tar are reported, not followed. Not for: repairs.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from zlib_ng.zlib_ng import crc32

from data_pipeline.errors import AbsentError, ManifestError, ShardError
from data_pipeline.io.json_member import text_bytes_of
from data_pipeline.io.ordered_pool import in_order
from data_pipeline.prepare.contents import check_member, check_sample
from data_pipeline.prepare.remote_index import local_copy
from data_pipeline.shards.damage import Damage, Problem, ShardReport
from data_pipeline.shards.index import Member, ShardIndex, describe_member, index_path
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.manifest_check import reject_non_manifest
from data_pipeline.shards.orphans import Orphans, is_medium
from data_pipeline.shards.sample_reader import MAX_TEXT_BYTES
from data_pipeline.shards.tar_members import (
    BLOCK_BYTES,
    TarError,
    TarFault,
    TarMember,
    open_tar,
    split_name,
    survey,
)
from data_pipeline.storage.location import Url, parse_location
from data_pipeline.storage.storage import Storage

DEFAULT_MAX_PIXELS = 89_478_485
"""Pillow's own limit, about 256 MiB of RGB."""
_CHUNK_BYTES = 1 << 24
_EXPLAINS_DIGEST = frozenset(Problem(fault.value) for fault in TarFault) | {
    Problem.MISSING,
    Problem.CHECKSUM,
    Problem.INDEX,
}
"""Damage that already explains why the tar's length or digest differs from the index."""


class VerifyJob(NamedTuple):
    """One shard to read, and its digest and number of samples in a manifest, if there is one."""

    tar_path: Path | Url
    manifest: Path | Url | None = None
    sha256: str | None = None
    num_samples: int | None = None


def jobs_of(path: str | Path) -> tuple[int, Iterator[VerifyJob]]:
    """Return the number of shards to verify and an iterator over them.

    Args:
        path: A manifest, all of whose shards are verified, or a tar; a file or a URL.

    Raises:
        ManifestError: the manifest itself cannot be read.
    """
    path = parse_location(path)
    if isinstance(path, Path) and (path.is_dir() or (path.is_file() and ".tar" not in path.suffixes)):
        reject_non_manifest(path, str(path), takes_tar=True)
    if path.suffix != ".manifest":
        return 1, iter([VerifyJob(path)])
    manifest = Manifest.open(path)
    cu_samples = manifest.cu_samples

    def jobs() -> Iterator[VerifyJob]:
        for number in range(manifest.num_shards):
            count = int(cu_samples[number + 1] - cu_samples[number])
            yield VerifyJob(manifest.shard_location(number), path, manifest.shard_sha256(number), count)

    return manifest.num_shards, jobs()


def verify(
    jobs: Iterable[VerifyJob], *, max_pixels: int = DEFAULT_MAX_PIXELS, workers: int = 0
) -> Iterator[ShardReport]:
    """Yield the reports of shards in order.

    Args:
        jobs: The shards.
        max_pixels: An image with more pixels is a damage and is not decoded.
        workers: Number of processes; 0 reads in this one.

    Raises:
        WorkerError: a process died.
    """
    return in_order(_Verify(max_pixels), jobs, workers)


def check_manifest(path: str | Path) -> list[Damage]:
    """Return a damage if a manifest's fingerprint does not match its content, else an empty list.

    Raises:
        ManifestError: the manifest cannot be read.
    """
    manifest = Manifest.open(path)
    if manifest.computed_fingerprint() == manifest.fingerprint:
        return []
    return [Damage(str(path), "", None, Problem.MANIFEST, "its fingerprint does not fit its content")]


@dataclass(frozen=True)
class _Verify:
    """Verifies one shard; run by worker processes (``in_order``)."""

    max_pixels: int

    def __call__(self, job: VerifyJob) -> Iterator[ShardReport]:
        report = self._report(job)
        if job.num_samples not in (None, report.num_samples):
            report.add(Problem.MANIFEST, f"{report.num_samples} samples, {job.manifest} says {job.num_samples}")
        yield report

    def _report(self, job: VerifyJob) -> ShardReport:
        tar = job.tar_path
        if not isinstance(tar, Url):
            return verify_shard(tar, max_pixels=self.max_pixels, sha256=job.sha256)
        try:
            with local_copy(tar, Storage.of_process()) as file:
                return verify_shard(file, max_pixels=self.max_pixels, sha256=job.sha256, display_name=str(tar))
        except AbsentError as error:
            report = ShardReport(str(tar))
            report.add(Problem.SHARD, str(error))
            return report


def verify_shard(
    tar_path: str | Path, *, max_pixels: int = DEFAULT_MAX_PIXELS, sha256: str | None = None, display_name: str = ""
) -> ShardReport:
    """Read one whole shard and decode every image. Damage is reported, not raised.

    Args:
        tar_path: The tar. Its index is checked; a missing index is a damage.
        max_pixels: An image with more pixels is a damage and is not decoded.
        sha256: The tar's digest in a manifest, hexadecimal; None without a manifest.
        display_name: Name of the tar in the report, if the file is a downloaded copy.
    """
    tar_path = Path(tar_path)
    report = ShardReport(display_name or str(tar_path))
    try:
        with open_tar(tar_path) as data:
            report.num_bytes = len(data)
            index = _index(tar_path, report)
            digest = _sha256(data)
            is_indexed = index is not None and digest == index.tar_sha256
            _Walk(report, _Expected(index) if index is not None else None, is_indexed, max_pixels).run(data)
            _check_whole(report, index, digest, sha256)
    except ShardError as error:
        report.add(Problem.SHARD, str(error))
    return report


def _index(tar_path: Path, report: ShardReport) -> ShardIndex | None:
    try:
        index = ShardIndex.map(index_path(tar_path), tar_path, f"{report.shard}.index")
        index.check()
        return index
    except ManifestError as error:
        report.add(Problem.INDEX, str(error))
        return None


def _sha256(data: memoryview) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(data), _CHUNK_BYTES):
        digest.update(data[start : start + _CHUNK_BYTES])
    return digest.hexdigest()


def _check_whole(report: ShardReport, index: ShardIndex | None, digest: str, sha256: str | None) -> None:
    """Report a wrong length or digest, unless another damage already explains it."""
    found = {damage.problem for damage in report.damages}
    is_indexed = index is not None and index.tar_sha256 == digest
    if index is not None and not is_indexed and not found & _EXPLAINS_DIGEST:
        if report.num_bytes < index.tar_bytes:
            detail = f"ends at byte {report.num_bytes}, its index says {index.tar_bytes}"
            report.add(Problem.TRUNCATED, detail, offset=report.num_bytes)
        elif report.num_bytes > index.tar_bytes:
            detail = f"{report.num_bytes - index.tar_bytes} bytes more than its index says"
            report.add(Problem.TAIL, detail, offset=index.tar_bytes)
        else:
            report.add(
                Problem.CHECKSUM,
                "the sha256 of the tar is not the one in its index, though every member is as indexed: "
                "attributes or headers were rewritten, or the index is damaged",
            )
    if sha256 not in (None, digest) and (is_indexed or not found & (_EXPLAINS_DIGEST - {Problem.INDEX})):
        report.add(Problem.MANIFEST, "the tar is not the one that the manifest lists (sha256 differs)")


class _Expected:
    """Content of an index, by name and by offset. ``_Walk`` removes the entries of ``members`` that it has found."""

    def __init__(self, index: ShardIndex) -> None:
        rows = [index.row(i) for i in range(len(index))]
        self.samples = {row.key: (len(row.members), row.text_bytes) for row in rows}
        self.members = {(row.key, member.ext): member for row in rows for member in row.members}
        self._names = list(self.members)
        self._extents = [(member.offset, member.size) for member in self.members.values()]

    def after(self, at: int) -> TarMember | None:
        """Return the first member whose content starts after a byte."""
        return self._member(self._num_until(at))

    def at(self, offset: int) -> TarMember | None:
        """Return the member whose content starts at a byte."""
        member = self._member(self._num_until(offset) - 1)
        return member if member is not None and member.offset == offset else None

    def _num_until(self, at: int) -> int:
        """Return the number of members whose content starts at or before a byte."""
        return bisect.bisect_right(self._extents, at, key=lambda extent: extent[0])

    def _member(self, number: int) -> TarMember | None:
        if not 0 <= number < len(self._names):
            return None
        (key, ext), (offset, size) = self._names[number], self._extents[number]
        return TarMember(f"{key}.{ext}", offset - BLOCK_BYTES, offset, size)


class _Walk:
    """The state of reading one tar: the keys read so far, the current sample, and the expected members."""

    def __init__(self, report: ShardReport, expected: _Expected | None, is_indexed: bool, max_pixels: int) -> None:
        self._report, self._expected, self._max_pixels = report, expected, max_pixels
        self._differs = Problem.INDEX if is_indexed else Problem.CHECKSUM
        self._seen: set[str] = set()
        self._key, self._members = "", dict[str, TarMember]()
        self._is_twice = False
        self._num_moved, self._moved = 0, ("", 0)
        self._header_lost = False
        self._lost_from: int | None = None

    def run(self, data: memoryview) -> None:
        """Check every sample and every byte between the samples."""
        after = self._expected.after if self._expected is not None else lambda at: None
        for found in survey(data, self._report.shard, after):
            if isinstance(found, TarError):
                self._damaged(found)
            else:
                self._member(data, found)
        self._sample(data)
        self._missing()
        if self._num_moved:
            key, offset = self._moved
            detail = f"{self._num_moved} members have another offset than in the index, this one first"
            self._report.add(Problem.INDEX, detail, key, offset)

    def _damaged(self, error: TarError) -> None:
        known: TarMember | None = None
        is_nameless = error.fault is TarFault.SLACK and not error.name  # The padding of a block of attributes.
        if self._expected is not None and (is_nameless or error.fault in (TarFault.HEADER, TarFault.TRUNCATED)):
            known = self._expected.after(error.offset)
        named = split_name(known.name if known is not None else error.name)
        if error.fault is TarFault.TRUNCATED:
            self._lost_from = error.offset
        self._header_lost = error.fault is TarFault.HEADER
        self._report.add(Problem(error.fault.value), str(error), named[0] if named else "", error.offset)

    def _member(self, data: memoryview, member: TarMember) -> None:
        self._report.num_members += 1
        named = self._named(member)
        self._header_lost = False
        if named is None:
            self._report.add(Problem.NAME, f"{member.name!r} has no extension", offset=member.header_offset)
            return
        key, ext = named
        if key != self._key or not self._members:
            self._sample(data)
            self._open(key, member)
        if ext in self._members:
            self._report.add(Problem.DUPLICATE, f"a second member .{ext}", key, member.header_offset)
            return
        self._members[ext] = member

    def _named(self, member: TarMember) -> tuple[str, str] | None:
        """Return key and extension of a member; those of the index at its offset if the name is damaged."""
        named = split_name(member.name)
        known = self._expected.at(member.offset) if self._expected is not None else None
        indexed = split_name(known.name) if known is not None else None
        if self._expected is None or indexed in (None, named):
            return named
        if self._header_lost:  # The lost header may have contained a part of the name.
            return indexed
        if named is not None and named[0] not in self._expected.samples and named[1] == indexed[1]:
            detail = f"its name is {member.name!r}, but its key in the index is {indexed[0]!r}"
            self._report.add(Problem.INDEX, detail, indexed[0], member.header_offset)
            return indexed
        return named

    def _open(self, key: str, member: TarMember) -> None:
        self._key, self._members, self._is_twice = key, {}, key in self._seen
        if self._is_twice:
            self._report.add(Problem.DUPLICATE, "the key occurs a second time", key, member.header_offset)
        self._seen.add(key)

    def _sample(self, data: memoryview) -> None:
        if not self._members:
            return
        self._report.num_samples += 1
        texts: dict[str, bytes] = {}
        as_indexed = is_readable = True
        for ext, member in self._members.items():
            content = data[member.offset : member.offset + member.size]
            if self._expected is not None and not self._is_twice:
                as_indexed &= self._check_index(self._expected, ext, member, content)
            if ext in ("txt", "json") and len(content) <= MAX_TEXT_BYTES:
                texts[ext] = bytes(content)
            for problem, detail in check_member(ext, content, self._members, self._max_pixels, self._key):
                is_readable &= ext not in ("txt", "json")
                self._report.add(problem, detail, self._key, member.offset)
        if is_readable and texts.keys() == {"txt", "json"} & self._members.keys():
            member = self._members.get("json") or next(iter(self._members.values()))
            for problem, detail in check_sample(texts, self._members, self._key):
                self._report.add(problem, detail, self._key, member.offset)
        self._count_orphan(texts)
        if self._expected is not None and as_indexed and not self._is_twice:
            num_members, length = self._expected.samples[self._key]
            is_whole = num_members == len(self._members) and set(texts) == {"txt", "json"} & self._members.keys()
            if is_whole and length != text_bytes_of(texts):
                detail = f"{text_bytes_of(texts)} bytes of text, the index says {length}"
                self._report.add(Problem.INDEX, detail, self._key, next(iter(self._members.values())).offset)

    def _count_orphan(self, texts: dict[str, bytes]) -> None:
        has_image, has_text = any(map(is_medium, self._members)), text_bytes_of(texts) > 0
        found = Orphans(1, int(has_text and not has_image), int(has_image and not has_text))
        self._report.orphans = self._report.orphans.plus(found)

    def _check_index(self, expected: _Expected, ext: str, member: TarMember, content: memoryview) -> bool:
        """Report differences between a member and its index entry; return False if its bytes may have changed."""
        old = expected.members.pop((self._key, ext), None)
        if old is None:
            self._report.add(Problem.INDEX, f".{ext} is not in the index", self._key, member.offset)
            return False
        if (member.size, crc32(content)) != (old.size, old.crc32):
            detail = f".{ext} differs from what was indexed ({member.size} bytes, {old.size} then)"
            self._report.add(self._differs, detail, self._key, member.offset)
            return False
        if member.offset != old.offset:
            self._moved = self._moved if self._num_moved else (self._key, member.offset)
            self._num_moved += 1
        new = describe_member(ext, old.offset, content)
        if new != old:
            detail = f".{ext}: the index says {old.width}x{old.height} pixels, its header {new.width}x{new.height}"
            self._report.add(Problem.INDEX, detail, self._key, member.offset)
        return True

    def _missing(self) -> None:
        """Report the members that are in the index but not in the tar; one damage for all that a truncation lost."""
        left = self._expected.members if self._expected is not None else {}
        cut: dict[tuple[str, str], Member] = {}
        for (key, ext), member in left.items():
            if self._lost_from is not None and member.offset > self._lost_from:
                cut[key, ext] = member
            else:
                detail = f"the index lists .{ext} of {member.size} bytes, which is not in the tar"
                self._report.add(Problem.MISSING, detail, key, member.offset)
        if cut:
            keys = list(dict.fromkeys(key for key, _ in cut))
            detail = f"{len(cut)} members of {len(keys)} samples are lost with it, {keys[0]} to {keys[-1]}"
            self._report.add(Problem.MISSING, detail, keys[0], next(iter(cut.values())).offset)
