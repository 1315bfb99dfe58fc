"""The disk cache: its size limit, its use by several processes, and its state after a process is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from multiprocessing import get_context
from pathlib import Path

import pytest

from data_pipeline.errors import StorageError
from data_pipeline.storage.cache import Cache
from data_pipeline.storage.config import CacheConfig

KIB = 1024


def cache(folder: Path, max_bytes: int = 10**9) -> Cache:
    return Cache(CacheConfig(folder=folder, max_bytes=max_bytes))


def size_of(folder: Path) -> int:
    """Return the bytes of all entries and leftovers."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and len(path.name) > 8)


def test_entries_outlive_the_process_that_wrote_them(tmp_path: Path) -> None:
    first = cache(tmp_path)
    assert first.get("a") is None
    assert first.put("a", b"x" * 5000)
    assert first.put("empty", b"")
    again = cache(tmp_path)
    assert again.get("a") == b"x" * 5000
    assert again.get("empty") == b""
    whole = again.check("a")
    assert whole is not None
    assert whole.read_bytes()[:5000] == b"x" * 5000
    assert first.usage() == size_of(tmp_path)


@pytest.mark.parametrize("at", [0, 2500, -1, -16, -5])
def test_a_flipped_bit_is_noticed_and_the_entry_dropped(tmp_path: Path, at: int) -> None:
    store = cache(tmp_path)
    for read in (store.get, store.check):
        store.put("a", b"x" * 5000)
        path = store.path("a")
        damaged = bytearray(path.read_bytes())
        damaged[at] ^= 4
        path.write_bytes(damaged)
        assert read("a") is None
        assert not path.exists()
    assert store.usage() == size_of(tmp_path) == 0


@pytest.mark.parametrize("length", [0, 7, 16, 3000])
def test_a_cut_entry_is_noticed(tmp_path: Path, length: int) -> None:
    store = cache(tmp_path)
    store.put("a", b"x" * 5000)
    path = store.path("a")
    path.write_bytes(path.read_bytes()[:length])
    assert store.get("a") is None


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    store = cache(tmp_path, 100 * KIB)
    for i in range(9):
        store.put(str(i), bytes(10 * KIB))
        os.utime(store.path(str(i)), (i, i))
    assert store.get("0") is not None  # The read makes it the most recently used entry.
    store.put("9", bytes(15 * KIB))
    assert size_of(tmp_path) <= 100 * KIB
    left = [i for i in range(10) if store.path(str(i)).exists()]
    assert left == [0, 3, 4, 5, 6, 7, 8, 9]
    assert store.usage() == size_of(tmp_path)


def test_an_entry_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    store = cache(tmp_path, 10 * KIB)
    store.put("small", b"s")
    assert not store.put("large", bytes(11 * KIB))
    assert store.get("large") is None
    assert store.get("small") == b"s"


def test_a_folder_that_cannot_be_written_is_said_once_and_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = cache(tmp_path)
    store.put("before", b"1")

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert not store.put("a", b"2")
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not store.put("b", b"3")
    assert store.get("before") == b"1"
    assert list((tmp_path / "v1" / "tmp").iterdir()) == []


_WRITER = """
import os, sys
from pathlib import Path
from data_pipeline.errors import StorageError
from data_pipeline.storage.cache import Cache
from data_pipeline.storage.config import CacheConfig

cache = Cache(CacheConfig(folder=Path(sys.argv[1]), max_bytes=10**9))
cache.put("whole", b"w" * 100_000)
with cache.entry("half") as entry:
    entry.write(b"h" * 100_000)
    print("in the middle", flush=True)
    sys.stdin.read()
"""


def test_a_writer_killed_in_the_middle_leaves_nothing_half(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"in the middle\n"
    (leftover,) = (tmp_path / "v1" / "tmp").iterdir()
    assert leftover.stat().st_size == 100_000

    beside = cache(tmp_path)  # The writer is alive, so its file is no leftover.
    assert leftover.exists()
    assert beside.get("half") is None
    process.send_signal(signal.SIGKILL)
    process.wait()

    after = cache(tmp_path)
    assert not leftover.exists()
    assert after.get("whole") == b"w" * 100_000
    assert after.get("half") is None
    assert after.usage() == size_of(tmp_path)
    assert after.put("half", b"h" * 100_000)
    assert after.get("half") == b"h" * 100_000


def test_a_count_that_a_crash_left_wrong_is_made_right_when_the_folder_is_full(tmp_path: Path) -> None:
    store = cache(tmp_path, 50 * KIB)
    store.put("a", bytes(10 * KIB))
    store._set_usage(48 * KIB)  # As if a process had died between the update of the count and the rename.
    store.put("b", bytes(10 * KIB))
    assert store.get("a") is not None  # There was room, so nothing was evicted.
    assert store.usage() == size_of(tmp_path)
    (tmp_path / "v1" / "usage").write_bytes(b"damaged")
    assert store.usage() == size_of(tmp_path)


def _churn(folder: Path, number: int) -> int:
    """Write and read in a folder that is too small; return the number of wrong contents."""
    store, wrong = cache(folder, 60 * KIB), 0
    for i in range(150):
        key = str((i * 7 + number) % 20)
        content = key.encode() * (2 * KIB)
        found = store.get(key)
        wrong += found is not None and found != content
        if found is None:
            store.put(key, content)
    return wrong


def test_processes_share_a_small_folder(tmp_path: Path) -> None:
    with get_context("fork").Pool(4) as pool:
        assert pool.starmap(_churn, [(tmp_path, i) for i in range(4)]) == [0, 0, 0, 0]
    assert size_of(tmp_path) <= 60 * KIB
    assert cache(tmp_path).usage() == size_of(tmp_path)


def test_one_process_at_a_time_has_a_claim(tmp_path: Path) -> None:
    one, two = cache(tmp_path), cache(tmp_path)
    claim = one.try_claim("a")
    assert claim is not None
    assert two.try_claim("a") is None
    claim.close()
    after = two.try_claim("a")
    assert after is not None
    after.close()


@pytest.mark.timeout(20)
def test_a_fifo_in_the_place_of_an_entry_is_an_absent_entry(tmp_path: Path) -> None:
    store = cache(tmp_path)
    os.mkfifo(tmp_path / "v1" / "tmp" / "leftover")
    cache(tmp_path)
    store.path("a").parent.mkdir()
    os.mkfifo(store.path("a"))
    assert store.get("a") is None
    assert store.check("a") is None
    assert store.put("a", b"content")  # Replaces the FIFO.
    assert store.get("a") == b"content"
    store.drop("a")
    os.mkfifo(store.path("a"))
    store.drop("a")
    assert not store.path("a").exists()
    assert store.usage() == size_of(tmp_path) == 0


@pytest.mark.timeout(20)
def test_a_fifo_in_the_place_of_a_claim_or_of_the_count_stops_nobody(tmp_path: Path) -> None:
    store = cache(tmp_path)
    os.mkfifo(tmp_path / "v1" / f"claim-{store.path('a').parent.name}")
    for _ in range(2):
        claim = store.try_claim("a")
        assert claim is not None
        claim.close()
    store.put("a", bytes(KIB))
    (tmp_path / "v1" / "usage").unlink()
    os.mkfifo(tmp_path / "v1" / "usage")
    assert store.usage() == size_of(tmp_path)
    with pytest.warns(UserWarning, match=r"v1/usage: not a regular file"):
        assert not store.put("b", b"content")
    assert store.get("a") == bytes(KIB)


@pytest.mark.timeout(20)
def test_a_fifo_in_the_place_of_the_lock_is_refused_at_the_start_and_passed_over_later(tmp_path: Path) -> None:
    store = cache(tmp_path)
    store.put("a", b"content")
    (tmp_path / "v1" / "lock").unlink()
    os.mkfifo(tmp_path / "v1" / "lock")
    with pytest.raises(StorageError, match=r"cannot be used as a cache: .*v1/lock: not a regular file"):
        cache(tmp_path)
    assert store.get("a") == b"content"
    store.drop("a")  # The folder must not change without the lock.
    with pytest.warns(UserWarning, match=r"v1/lock: not a regular file"):
        assert not store.put("b", b"content")
