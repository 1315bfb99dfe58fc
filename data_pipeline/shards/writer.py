"""Write webdataset tars and their indexes; equal samples give byte-identical tars.

    write(key, members) ... --> PREFIX-00000.tar + .index, PREFIX-00001.tar + .index, ...

A shard is renamed to its final name when it is complete, and its index is written after that. A tar with an index is
therefore finished. The bytes of a sample do not depend on its position in the tar. Several processes can encode samples
(``encode_sample``), while one process appends them (``add``) at little more than the cost of a copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from data_pipeline.errors import DataConfigError, ShardError
from data_pipeline.io.atomic import open_partial, partial_path, publish
from data_pipeline.io.json_member import text_bytes_of
from data_pipeline.shards.index import IndexedSample, Member, describe_member, write_index
from data_pipeline.shards.tar_members import BLOCK_BYTES, split_name

_EXTENSION = re.compile(r"[^./\\\0\s]+(\.[^./\\\0\s]+)*")
_MAX_SHARDS = 100_000
_END_BYTES = tarfile.RECORDSIZE


@dataclass(frozen=True)
class EncodedSample:
    """The tar blocks of a sample and its index entry.

    Attributes:
        key: Its key.
        data: Headers and content of its members, padded to whole blocks.
        members: Index entries of the members; offsets count from the start of ``data``.
        text_bytes: As in ``IndexedSample``.
    """

    key: str
    data: bytes
    members: tuple[Member, ...]
    text_bytes: int


def encode_sample(key: str, members: Mapping[str, bytes]) -> EncodedSample:
    """Encode a sample as tar blocks, with its members sorted by extension.

    Raises:
        ShardError: as ``check_sample``.
    """
    check_sample(key, members)
    blocks, described, at = list[bytes](), list[Member](), 0
    for ext in sorted(members):
        content = members[ext]
        info = tarfile.TarInfo(f"{key}.{ext}")
        info.size, info.mode, info.mtime = len(content), 0o644, 0
        header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")
        blocks += (header, content, bytes(-len(content) % BLOCK_BYTES))
        described.append(describe_member(ext, at + len(header), content))
        at += len(header) + padded(len(content))
    texts = {ext: members[ext] for ext in ("txt", "json") if ext in members}
    return EncodedSample(key, b"".join(blocks), tuple(described), text_bytes_of(texts))


def padded(num_bytes: int) -> int:
    """Return the size of a content of ``num_bytes`` in a tar, which is rounded up to whole blocks."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def end_of_tar(num_bytes: int) -> bytes:
    """Return the end of a tar whose members take ``num_bytes``: the end mark, then zeros up to a whole record."""
    return bytes(2 * BLOCK_BYTES + -(num_bytes + 2 * BLOCK_BYTES) % tarfile.RECORDSIZE)


class ShardWriter:
    """Writes samples into consecutive shards of bounded size.

    Use it as a context manager: it finishes the last shard at the end. After an exception it deletes the unfinished
    shard and keeps the finished ones.

    Args:
        folder: Output folder; created if missing.
        prefix: Shards are named ``PREFIX-00000.tar`` and so on.
        max_bytes: Largest size of a shard; a sample that would exceed it starts a new shard. A larger sample gets a
            shard of its own. At least 1.
        max_samples: Largest number of samples in a shard, at least 1.
        first_shard: Number of the first shard. A resumed ingest continues after the finished shards.

    Raises:
        DataConfigError: a limit is below 1, or the prefix is not a plain file name.
        OSError: the folder cannot be created.
    """

    def __init__(
        self,
        folder: str | Path,
        prefix: str,
        *,
        max_bytes: int = 256 << 20,
        max_samples: int = 10_000,
        first_shard: int = 0,
    ) -> None:
        if max_bytes < 1 or max_samples < 1:
            raise DataConfigError(f"max_bytes={max_bytes} and max_samples={max_samples} must be at least 1")
        if not prefix or "/" in prefix or prefix.startswith("."):
            raise DataConfigError(f"prefix {prefix!r}: expected a plain file name, without a folder or a leading dot")
        self._folder, self._prefix = Path(folder), prefix
        self._max_bytes, self._max_samples = max_bytes, max_samples
        self._next_shard = first_shard
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self._bytes, self._samples, self._keys = 0, list[IndexedSample](), set[str]()
        self.shards: list[Path] = []
        """Finished shards of this writer, in order."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample, with its members sorted by extension.

        Raises:
            ShardError: as ``check_sample`` and ``add``.
            OSError: the disk is full.
        """
        self.add(encode_sample(key, members))

    def add(self, sample: EncodedSample) -> bool:
        """Append an encoded sample.

        Returns:
            Whether the open shard was finished first, because the sample did not fit.

        Raises:
            ShardError: the key is already in the open shard, or the prefix has no shard numbers left.
            OSError: the disk is full.
        """
        finishes = self._file is not None and self.is_full_for(sample)
        if finishes:
            self._finish()
        if sample.key in self._keys:
            raise ShardError(
                f"{self._path()}: the key {sample.key!r} occurs twice; when resharding, --keys origin makes keys unique"
            )
        file = self._file or self._start()
        members = [member._replace(offset=self._bytes + member.offset) for member in sample.members]
        self._samples.append(IndexedSample(sample.key, members, sample.text_bytes))
        self._keys.add(sample.key)
        self._append(file, sample.data)
        return finishes

    def is_full_for(self, sample: EncodedSample) -> bool:
        """Return whether ``add`` would finish the open shard before it adds ``sample``."""
        too_large = self._bytes + len(sample.data) + _END_BYTES > self._max_bytes
        return bool(self._samples) and (too_large or len(self._samples) >= self._max_samples)

    def close(self) -> list[Path]:
        """Finish the last shard; return all finished shards."""
        if self._file is not None:
            self._finish()
        return self.shards

    def discard(self) -> None:
        """Delete the unfinished shard, if there is one."""
        if self._file is not None:
            # Closing flushes, which fails if the disk is full.
            with contextlib.suppress(OSError):
                self._file.close()
            with contextlib.suppress(OSError):
                partial_path(self._path()).unlink(missing_ok=True)
        self._reset()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                self.close()
            except BaseException:
                self.discard()
                raise
        else:
            self.discard()

    def _path(self) -> Path:
        return self._folder / shard_name(self._prefix, self._next_shard)

    def _reset(self) -> None:
        self._file, self._digest = None, hashlib.sha256()
        self._bytes, self._samples, self._keys = 0, [], set()

    def _start(self) -> IO[bytes]:
        if self._next_shard >= _MAX_SHARDS:
            raise ShardError(f"{self._path()}: more than {_MAX_SHARDS} shards; raise the size of a shard")
        self._file = open_partial(self._path())
        return self._file

    def _append(self, file: IO[bytes], data: bytes) -> None:
        file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def _finish(self) -> None:
        assert self._file is not None
        self._append(self._file, end_of_tar(self._bytes))
        self._file.close()
        path = self._path()
        publish(partial_path(path), path)
        write_index(path, self._samples, self._bytes, self._digest.hexdigest())
        self.shards.append(path)
        self._reset()
        self._next_shard += 1


def shard_name(prefix: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{prefix}-{number:05d}.tar"


def check_sample(key: str, members: Mapping[str, bytes]) -> None:
    """Check that webdataset's naming rule would recover the key and the extensions of a sample.

    Raises:
        ShardError: it would not, the key points outside the shard or is not valid UTF-8, or there is no member.
    """
    if not members:
        raise ShardError(f"sample {key!r} has no members")
    for ext in members:
        if _EXTENSION.fullmatch(ext) is None or split_name(f"{key}.{ext}") != (key, ext):
            raise ShardError(
                f"sample {key!r}, extension {ext!r}: expected no dot in the key's last part, and an extension in lower "
                "case without spaces"
            )
    parts = key.split("/")
    if key.startswith("/") or "\\" in key or "\0" in key or ".." in parts or "." in parts or "" in parts:
        raise ShardError(f"sample {key!r}: the key points outside the shard")
    if not key.isascii():
        try:
            key.encode()
        except UnicodeEncodeError as error:
            raise ShardError(f"sample {key!a}: the key is not valid UTF-8") from error
