"""Writes webdataset tars that are equal byte for byte whenever their samples are.

    write(key, members) ... --> PREFIX-00000.tar + .index, PREFIX-00001.tar + .index, ...

A shard gets its name when it is whole, and its index after that: a tar that has an index is finished. The bytes of a
sample do not depend on its place in the tar, so other processes may prepare them (``encode_sample``) and one process
string them together (``add``), which costs it hardly more than copying.
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
    """A sample as it will lie in a tar.

    Attributes:
        key: Its key.
        data: Headers and content of its members, whole blocks.
        members: What the index says of them; offsets count from the start of ``data``.
        text_bytes: Bytes of text that it shows.
    """

    key: str
    data: bytes
    members: tuple[Member, ...]
    text_bytes: int


def encode_sample(key: str, members: Mapping[str, bytes]) -> EncodedSample:
    """The tar blocks of a sample, members in the order of their extensions.

    Raises:
        ShardError: the key or an extension would not survive webdataset's naming rule, or there is no member.
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
    """Bytes that content takes in a tar: whole blocks."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def end_of_tar(num_bytes: int) -> bytes:
    """What ends a tar of so many bytes: the end mark, then zeros to a whole record, as Python's tarfile does."""
    return bytes(2 * BLOCK_BYTES + -(num_bytes + 2 * BLOCK_BYTES) % tarfile.RECORDSIZE)


class ShardWriter:
    """Cuts a stream of samples into shards.

    Args:
        folder: Where shards go; made if missing.
        prefix: Shards are named ``PREFIX-00000.tar`` and so on.
        max_bytes: A shard is closed before a sample would make it larger; a single larger sample gets its own.
        max_samples: The same for the number of samples.
        first_shard: Number of the first shard (a resumed ingest goes on behind the finished ones).

    Use it as a context manager: leaving it by an exception drops the unfinished shard, finished ones stay.
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
            raise DataConfigError(f"prefix {prefix!r}: must be a plain file name")
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
        """Adds a sample. Members are stored in the order of their extensions.

        Raises:
            ShardError: the key or an extension would not survive webdataset's naming rule, the key is already in this
                shard, or there is no member.
            OSError: the disk is full.
        """
        self.add(encode_sample(key, members))

    def add(self, sample: EncodedSample) -> bool:
        """Adds a sample that is encoded already.

        Returns:
            Whether a shard was finished before it.

        Raises:
            ShardError: the key is already in this shard.
            OSError: the disk is full.
        """
        finishes = self._file is not None and self.is_full_for(sample)
        if finishes:
            self._finish()
        if sample.key in self._keys:
            raise ShardError(
                f"{self._path()}: the key {sample.key!r} comes twice; when resharding, --keys origin makes them differ"
            )
        file = self._file or self._start()
        members = [member._replace(offset=self._bytes + member.offset) for member in sample.members]
        self._samples.append(IndexedSample(sample.key, members, sample.text_bytes))
        self._keys.add(sample.key)
        self._append(file, sample.data)
        return finishes

    def is_full_for(self, sample: EncodedSample) -> bool:
        """Whether the open shard, if any, would be finished before ``sample``."""
        too_large = self._bytes + len(sample.data) + _END_BYTES > self._max_bytes
        return bool(self._samples) and (too_large or len(self._samples) >= self._max_samples)

    def close(self) -> list[Path]:
        """Finishes the last shard; all finished shards."""
        if self._file is not None:
            self._finish()
        return self.shards

    def discard(self) -> None:
        """Drops the unfinished shard."""
        if self._file is not None:
            # Closing may try to flush to the very disk that is full.
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
            raise ShardError(f"{self._path()}: more than {_MAX_SHARDS} shards; use larger ones")
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
    """File name of a shard."""
    return f"{prefix}-{number:05d}.tar"


def check_sample(key: str, members: Mapping[str, bytes]) -> None:
    """Checks names by webdataset's rule.

    Raises:
        ShardError: the key or an extension would not survive it, or there is no member.
    """
    if not members:
        raise ShardError(f"sample {key!r} has no members")
    for ext in members:
        if _EXTENSION.fullmatch(ext) is None or split_name(f"{key}.{ext}") != (key, ext):
            raise ShardError(
                f"sample {key!r}, extension {ext!r}: no dot in the key's last part; extension in lower case, without "
                "spaces"
            )
    parts = key.split("/")
    if key.startswith("/") or "\\" in key or "\0" in key or ".." in parts or "." in parts or "" in parts:
        raise ShardError(f"sample {key!r}: the key leaves the shard")
    if not key.isascii():
        try:
            key.encode()
        except UnicodeEncodeError as error:
            raise ShardError(f"sample {key!a}: the key is no UTF-8") from error
