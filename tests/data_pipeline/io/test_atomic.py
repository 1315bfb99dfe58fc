"""Atomic writes, and digests of files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from data_pipeline.io import checksums
from data_pipeline.io.atomic import open_partial, partial_path, replacing, write_whole
from data_pipeline.io.checksums import sha256_of


@pytest.mark.parametrize("size", [0, 1, 6, 7, 8, 14, 23])
def test_the_digest_of_a_file_is_that_of_its_bytes(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_CHUNK_BYTES", 7)
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


@pytest.mark.parametrize("planted", ["fifo", "link", "older file"])
def test_nothing_that_has_the_hidden_name_is_written_to(tmp_path: Path, planted: str) -> None:
    path, outside = tmp_path / "a", tmp_path / "outside"
    outside.write_bytes(b"mine")
    if planted == "fifo":
        os.mkfifo(partial_path(path))
    elif planted == "link":
        partial_path(path).symlink_to(outside)
    else:
        os.link(outside, partial_path(path))
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert outside.read_bytes() == b"mine"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "outside"]
    assert path.is_file()
    assert not path.is_symlink()


def test_a_block_that_raises_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"old"


def test_folders_are_created_only_on_request(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_partial(tmp_path / "x" / "a")
    write_whole(tmp_path / "x" / "y" / "a", b"new", parents=True)
    assert (tmp_path / "x" / "y" / "a").read_bytes() == b"new"
