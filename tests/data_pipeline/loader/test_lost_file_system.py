"""Reads of shards, indexes and manifests wait for a file system that is lost for a moment, and change no batch."""

from __future__ import annotations

import builtins
import errno
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import ManifestError, SampleError, ShardError, StaleError
from data_pipeline.history.digest import digest
from data_pipeline.io import retry
from data_pipeline.media_spec import MediaSpec
from data_pipeline.shards.index import index_path
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.storage import store
from data_pipeline.storage.store import LocalStore
from mmscale.engine.config import EngineConfig
from tests.data_pipeline.conftest import WriteSet, captioned

pytestmark = pytest.mark.fault


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock by the sum of the delays, so that no test waits."""
    slept: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", slept.append)
    monkeypatch.setattr(retry.time, "monotonic", lambda: sum(slept))
    return slept


def fails_sometimes(real: Callable[..., Any], folder: Path, code: int, every: int) -> Callable[..., Any]:
    """Return ``real``. Two successive calls of ``every`` calls for files of ``folder`` raise an error."""
    count = itertools.count(1)

    def call(target: Any, *args: Any, **kwargs: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
        if str(path).startswith(str(folder)) and next(count) % every < 2:
            raise OSError(code, os.strerror(code), str(path))
        return real(target, *args, **kwargs)

    return call


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT])
def test_no_batch_changes(
    mixture_config: DataConfig,
    hybrid_spec: MediaSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    naps: list[float],
    code: int,
) -> None:
    """The default treatment of a shard that cannot be read is to stop the run, so every error must be repeated."""
    expected = list(digest(mixture_config, hybrid_spec, 3, range(4)))
    assert naps == []
    for name, every in (("open", 7), ("stat", 5), ("pread", 9)):
        monkeypatch.setattr(os, name, fails_sometimes(getattr(os, name), tmp_path, code, every))
    assert list(digest(mixture_config, hybrid_spec, 3, range(4))) == expected
    assert len(naps) > 20


@pytest.fixture
def reader(write_set: WriteSet) -> Iterator[SampleReader]:
    """A reader of one shard, which is open."""
    opened = SampleReader(Manifest.open(write_set("a", [captioned(number) for number in range(4)])), "a")
    opened.read(0)
    yield opened
    opened.close()


def test_a_file_that_the_server_forgot_is_opened_again(
    reader: SampleReader, monkeypatch: pytest.MonkeyPatch, naps: list[float]
) -> None:
    """With ESTALE, an open file stays unusable after the server is back."""
    expected, pread, stale = reader.read(1), os.pread, [True]

    def read(*args: int) -> bytes:
        if stale[0]:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return pread(*args)

    real = os.dup2
    monkeypatch.setattr(os, "pread", read)
    monkeypatch.setattr(os, "dup2", lambda *args, **kwargs: (stale.clear(), stale.append(False), real(*args, **kwargs)))
    assert reader.read(1) == expected
    assert naps == [0.5]


def test_the_wait_ends(reader: SampleReader, monkeypatch: pytest.MonkeyPatch, naps: list[float]) -> None:
    def lost(*args: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", lost)
    with pytest.raises(ShardError, match="failed: Input/output error"):
        reader.read(1)
    assert retry.WAIT_SECONDS <= sum(naps) <= retry.WAIT_SECONDS + retry.LONGEST_DELAY_SECONDS


def test_damage_is_reported_at_once(reader: SampleReader, naps: list[float]) -> None:
    """Neither changed bytes, nor a shorter shard, nor a missing or locked file is a lost file system."""
    shard = next(reader.manifest.path.parent.glob("*.tar"))  # type: ignore[union-attr]
    offset = reader.offset(2)
    with shard.open("r+b") as file:
        file.seek(offset)
        file.write(b"\0\0\0\0")
    with pytest.raises(SampleError, match="crc32"):
        reader.read(2)
    os.truncate(shard, offset)
    with pytest.raises(ShardError, match="truncated"):
        reader.read(2)
    reader.forget(0)
    index_path(shard).unlink()
    with pytest.raises(ManifestError, match="has no index"):
        reader.read(1)
    shard.unlink()
    with pytest.raises(ManifestError, match="No such file"):
        reader.read(1)
    assert naps == []


class _Failing:
    """An unbuffered file whose second read fails once."""

    def __init__(self, file: Any, left: list[int]) -> None:
        self._file, self._left = file, left

    def read(self, size: int) -> bytes:
        self._left[0] -= 1
        if self._left[0] == 0:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        content: bytes = self._file.read(size)
        return content

    def __enter__(self) -> _Failing:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_plain_tar_is_read_on_from_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float], is_replaced: bool
) -> None:
    path, content = tmp_path / "a.tar", bytes(range(250))
    path.write_bytes(content)
    monkeypatch.setattr(store, "STREAM_CHUNK_BYTES", 100)
    left, real = [2], Path.open
    monkeypatch.setattr(Path, "open", lambda *args, **kwargs: _Failing(real(*args, **kwargs), left))
    chunks = LocalStore().stream(path)
    first = next(chunks)
    if is_replaced:
        with builtins.open(path, "ab") as file:
            file.write(b"more")
        with pytest.raises(StaleError, match="was replaced while it was read"):
            list(chunks)
    else:
        assert b"".join([first, *chunks]) == content
    assert naps == [0.5]


def test_the_watchdog_waits_longer() -> None:
    """With the default limits, a rank whose read waits for a lost file system is no rank that hangs."""
    engine = EngineConfig()
    limit = engine.watchdog.limits(engine.timeout_seconds).step
    assert limit is not None
    assert limit > retry.WAIT_SECONDS + retry.LONGEST_DELAY_SECONDS
