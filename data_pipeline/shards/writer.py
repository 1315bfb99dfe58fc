"""Writes webdataset tars that are equal byte for byte whenever their samples are.

    write(key, members) ... --> PREFIX-00000.tar + .index, PREFIX-00001.tar + .index, ...

A shard gets its name when it is whole, and its index after that: a tar that has an index is finished.
"""

from __future__ import annotations

import contextlib
import io
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

from data_pipeline.errors import DataConfigError, ShardError
from data_pipeline.shards.files import partial_path, publish
from data_pipeline.shards.index import build_index
from data_pipeline.shards.tar_members import BLOCK_BYTES, split_name

_EXTENSION = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
_MAX_SHARDS = 100_000
_END_BYTES = tarfile.RECORDSIZE


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
        self._tar: tarfile.TarFile | None = None
        self._bytes, self._keys = 0, set[str]()
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
        _check_sample(key, members)
        growth = sum(BLOCK_BYTES + -(-len(data) // BLOCK_BYTES) * BLOCK_BYTES for data in members.values())
        full = self._bytes + growth + _END_BYTES > self._max_bytes or len(self._keys) >= self._max_samples
        if self._tar is not None and full:
            self._finish()
        if key in self._keys:
            raise ShardError(f"{self._path()}: the key {key!r} comes twice")
        tar = self._tar or self._start()
        for ext in sorted(members):
            info = tarfile.TarInfo(f"{key}.{ext}")
            info.size, info.mode, info.mtime = len(members[ext]), 0o644, 0
            tar.addfile(info, io.BytesIO(members[ext]))
        self._bytes += growth
        self._keys.add(key)

    def close(self) -> list[Path]:
        """Finishes the last shard; all finished shards."""
        if self._tar is not None:
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
        self._file, self._tar = None, None

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

    def _start(self) -> tarfile.TarFile:
        if self._next_shard >= _MAX_SHARDS:
            raise ShardError(f"{self._path()}: more than {_MAX_SHARDS} shards; use larger ones")
        self._file = partial_path(self._path()).open("wb")
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.GNU_FORMAT)
        self._bytes, self._keys = 0, set()
        return self._tar

    def _finish(self) -> None:
        assert self._tar is not None
        assert self._file is not None
        self._tar.close()
        self._file.close()
        path = self._path()
        publish(partial_path(path), path)
        build_index(path)
        self.shards.append(path)
        self._file, self._tar = None, None
        self._next_shard += 1


def shard_name(prefix: str, number: int) -> str:
    """File name of a shard."""
    return f"{prefix}-{number:05d}.tar"


def _check_sample(key: str, members: Mapping[str, bytes]) -> None:
    if not members:
        raise ShardError(f"sample {key!r} has no members")
    for ext in members:
        if _EXTENSION.fullmatch(ext) is None or split_name(f"{key}.{ext}") != (key, ext):
            raise ShardError(
                f"sample {key!r}, extension {ext!r}: no dot in the key's last part, extension in lower case"
            )
    parts = key.split("/")
    if key.startswith("/") or "\\" in key or "\0" in key or ".." in parts or "." in parts or "" in parts:
        raise ShardError(f"sample {key!r}: the key leaves the shard")
