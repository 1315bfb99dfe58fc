"""Files that are whole or absent, and their digests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from data_pipeline.io import atomic as files
from data_pipeline.io.atomic import sha256_of, write_whole


@pytest.mark.parametrize("size", [0, 1, 6, 7, 8, 14, 23])
def test_the_digest_of_a_file_is_that_of_its_bytes(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK_BYTES", 7)
    data = bytes(range(100, 100 + size))
    (tmp_path / "a").write_bytes(data)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write_whole(path, b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_whole(path, b"new")
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"old"
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "no-folder" / "a", b"new")


def test_every_file_and_folder_is_closed_again(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/fd"))
    for number in range(3):
        write_whole(tmp_path / str(number), b"new")
    assert set(os.listdir("/dev/fd")) <= before
