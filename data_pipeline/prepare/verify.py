"""Reads shards whole and lists every damage: where, which sample, what.

    tar --survey--> members, damages of the tar --index--> bytes as indexed? --contents--> what the extension says?

For: finding out before a training run, not in its middle. Goes on behind a damage: with an index every other sample is
still found, without one all that the tar itself tells. Follows no link, writes nothing. Not for: repairing.
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
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.index import Member, ShardIndex, describe_member, index_path, open_tar
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.mistaken import refuse_no_manifest
from data_pipeline.shards.orphans import Orphans
from data_pipeline.shards.sample_reader import MAX_TEXT_BYTES
from data_pipeline.shards.tar_members import BLOCK_BYTES, TarError, TarFault, TarMember, split_name, survey
from data_pipeline.storage.location import Url, parse_location
from data_pipeline.storage.storage import Storage

DEFAULT_MAX_PIXELS = 89_478_485
"""Pillow's own limit: a quarter gibibyte of RGB."""
_CHUNK_BYTES = 1 << 24
_PLACED = frozenset(Problem(fault.value) for fault in TarFault) | {Problem.MISSING, Problem.CHECKSUM, Problem.INDEX}
"""Damage that explains why a tar is not the one that was indexed."""


class Job(NamedTuple):
    """One shard to read, and what a manifest says of it."""

    tar_path: Path | Url
    manifest: Path | Url | None = None
    sha256: str | None = None
    num_samples: int | None = None


def jobs_of(path: str | Path) -> tuple[int, Iterator[Job]]:
    """The shards of a manifest, or a single tar: how many, and each.

    Raises:
        ManifestError: the manifest itself cannot be read.
    """
    path = parse_location(path)
    if isinstance(path, Path) and (path.is_dir() or (path.is_file() and ".tar" not in path.suffixes)):
        refuse_no_manifest(path, str(path), takes_tar=True)
    if path.suffix != ".manifest":
        return 1, iter([Job(path)])
    manifest = Manifest.open(path)
    cu_samples = manifest.cu_samples

    def jobs() -> Iterator[Job]:
        for number in range(manifest.num_shards):
            count = int(cu_samples[number + 1] - cu_samples[number])
            yield Job(manifest.shard_location(number), path, manifest.shard_sha256(number), count)

    return manifest.num_shards, jobs()


def verify(jobs: Iterable[Job], *, max_pixels: int = DEFAULT_MAX_PIXELS, workers: int = 0) -> Iterator[ShardReport]:
    """Reports of shards in their order, read by ``workers`` processes; 0 reads in this one.

    Raises:
        WorkerError: a process died.
    """
    return in_order(_Verify(max_pixels), jobs, workers)


def check_manifest(path: str | Path) -> list[Damage]:
    """Whether the content of a manifest is what its fingerprint was computed of.

    Raises:
        ManifestError: it cannot be read.
    """
    manifest = Manifest.open(path)
    if manifest.computed_fingerprint() == manifest.fingerprint:
        return []
    return [Damage(str(path), "", None, Problem.MANIFEST, "its fingerprint does not fit its content")]


@dataclass(frozen=True)
class _Verify:
    """The work of a process."""

    max_pixels: int

    def __call__(self, job: Job) -> Iterator[ShardReport]:
        report = self._report(job)
        if job.num_samples not in (None, report.num_samples):
            report.add(Problem.MANIFEST, f"{report.num_samples} samples, {job.manifest} says {job.num_samples}")
        yield report

    def _report(self, job: Job) -> ShardReport:
        tar = job.tar_path
        if not isinstance(tar, Url):
            return verify_shard(tar, max_pixels=self.max_pixels, sha256=job.sha256)
        try:
            with local_copy(tar, Storage.of_process()) as file:
                return verify_shard(file, max_pixels=self.max_pixels, sha256=job.sha256, shown=str(tar))
        except AbsentError as error:
            report = ShardReport(str(tar))
            report.add(Problem.SHARD, str(error))
            return report


def verify_shard(
    tar_path: str | Path, *, max_pixels: int = DEFAULT_MAX_PIXELS, sha256: str | None = None, shown: str = ""
) -> ShardReport:
    """Reads one shard whole and decodes every image.

    Args:
        tar_path: The tar; its index is checked if there is one, and missed if not.
        max_pixels: Larger images count as damage and are not decoded.
        sha256: Digest that a manifest gives for this tar, hexadecimal.
        shown: What the report calls it, if it is a copy of another.
    """
    tar_path = Path(tar_path)
    report = ShardReport(shown or str(tar_path))
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
    """Length and digest, where no damage explains them already."""
    found = {damage.problem for damage in report.damages}
    is_indexed = index is not None and index.tar_sha256 == digest
    if index is not None and not is_indexed and not found & _PLACED:
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
    if sha256 not in (None, digest) and (is_indexed or not found & (_PLACED - {Problem.INDEX})):
        report.add(Problem.MANIFEST, "the tar is not the one that the manifest lists (sha256 differs)")


class _Expected:
    """What an index says, by name and by place; forgets what was found."""

    def __init__(self, index: ShardIndex) -> None:
        rows = [index.row(i) for i in range(len(index))]
        self.samples = {row.key: (len(row.members), row.text_bytes) for row in rows}
        self.members = {(row.key, member.ext): member for row in rows for member in row.members}
        self._names = list(self.members)
        self._spans = [(member.offset, member.size) for member in self.members.values()]

    def after(self, at: int) -> TarMember | None:
        """The first member whose content starts behind a byte."""
        return self._member(self._place(at))

    def at(self, offset: int) -> TarMember | None:
        """The member whose content starts at a byte."""
        member = self._member(self._place(offset) - 1)
        return member if member is not None and member.offset == offset else None

    def _place(self, at: int) -> int:
        return bisect.bisect_right(self._spans, at, key=lambda span: span[0])

    def _member(self, place: int) -> TarMember | None:
        if not 0 <= place < len(self._names):
            return None
        (key, ext), (offset, size) = self._names[place], self._spans[place]
        return TarMember(f"{key}.{ext}", offset - BLOCK_BYTES, offset, size)


class _Walk:
    """The state of reading one tar: keys met so far and what the index expects."""

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
        """Checks every sample and every byte between them."""
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
            detail = f"{self._num_moved} members lie elsewhere than the index says, this one first"
            self._report.add(Problem.INDEX, detail, key, offset)

    def _damaged(self, error: TarError) -> None:
        known: TarMember | None = None
        is_nameless = error.fault is TarFault.SLACK and not error.name  # In a block of attributes.
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
        """Key and extension; by its place in the index where the name is damaged."""
        named = split_name(member.name)
        known = self._expected.at(member.offset) if self._expected is not None else None
        indexed = split_name(known.name) if known is not None else None
        if self._expected is None or indexed in (None, named):
            return named
        if self._header_lost:  # It may have held a part of the name.
            return indexed
        if named is not None and named[0] not in self._expected.samples and named[1] == indexed[1]:
            detail = f"its name is {member.name!r}, its key in the index {indexed[0]!r}"
            self._report.add(Problem.INDEX, detail, indexed[0], member.header_offset)
            return indexed
        return named

    def _open(self, key: str, member: TarMember) -> None:
        self._key, self._members, self._is_twice = key, {}, key in self._seen
        if self._is_twice:
            self._report.add(Problem.DUPLICATE, "the key comes a second time", key, member.header_offset)
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
            place = self._members.get("json") or next(iter(self._members.values()))
            for problem, detail in check_sample(texts, self._members, self._key):
                self._report.add(problem, detail, self._key, place.offset)
        self._count_orphan(texts)
        if self._expected is not None and as_indexed and not self._is_twice:
            num_members, length = self._expected.samples[self._key]
            is_whole = num_members == len(self._members) and set(texts) == {"txt", "json"} & self._members.keys()
            if is_whole and length != text_bytes_of(texts):
                detail = f"the index says {length} bytes of text, there are {text_bytes_of(texts)}"
                self._report.add(Problem.INDEX, detail, self._key, next(iter(self._members.values())).offset)

    def _count_orphan(self, texts: dict[str, bytes]) -> None:
        has_image, has_text = any(map(is_image, self._members)), text_bytes_of(texts) > 0
        found = Orphans(1, int(has_text and not has_image), int(has_image and not has_text))
        self._report.orphans = self._report.orphans.plus(found)

    def _check_index(self, expected: _Expected, ext: str, member: TarMember, content: memoryview) -> bool:
        """Whether the index says the same of a member."""
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
        """What the index lists and the walk did not meet; one line for all that a truncation took."""
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
