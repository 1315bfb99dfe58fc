"""Writes to a file system that is lost for a moment: repeated, bounded, and without lost or doubled bytes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.io import retry
from data_pipeline.io.atomic import append_whole, write_whole
from mmscale.io import writer_process
from mmscale.io.files import finalize, write_share

LOST = 3
"""Number of calls that fail."""


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock by the sum of the delays, so that no test waits."""
    slept: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", slept.append)
    monkeypatch.setattr(retry.time, "monotonic", lambda: sum(slept))
    return slept


def failing(real: Callable[..., Any], code: int, *, times: int = LOST, after: bool = False) -> Callable[..., Any]:
    """Return ``real``, whose first calls raise an error; with ``after`` they do their work before."""
    left = [times]

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        raise OSError(code, os.strerror(code), str(args[0]))

    return call


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_file_is_written_when_the_file_system_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], naps: list[float], code: int
) -> None:
    monkeypatch.setattr(os, "fsync", failing(os.fsync, code))
    write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
    assert naps == [0.5, 1.0, 2.0]
    assert capsys.readouterr().err.count("trying again") == 1


def test_the_wait_has_a_bound_and_a_full_disk_is_reported_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float]
) -> None:
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.ENOSPC))
    with pytest.raises(OSError, match="No space left") as full:
        write_whole(tmp_path / "a", b"new")
    assert naps == []
    assert retry.explain_io(full.value) == "No space left on device; free space, then start the same command again"
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.EIO, times=10**6))
    with pytest.raises(OSError, match="Input/output error"):
        write_whole(tmp_path / "a", b"new")
    assert retry.WAIT_SECONDS <= sum(naps) <= retry.WAIT_SECONDS + retry.LONGEST_DELAY_SECONDS


class _HalfWriter:
    """A file whose first writes store half of their bytes and fail."""

    def __init__(self, file: Any, code: int, left: list[int]) -> None:
        self._file, self._code, self._left = file, code, left

    def write(self, data: bytes) -> None:
        self._left[0] -= 1
        if self._left[0] < 0:
            self._file.write(data)
            return
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        raise OSError(self._code, os.strerror(self._code))

    def __enter__(self) -> _HalfWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize(("code", "kept"), [(errno.ESTALE, b"one\ntwo\n"), (errno.ENOSPC, b"one\n")])
def test_a_line_is_appended_once_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kept: bytes
) -> None:
    from data_pipeline.io import untrusted

    path, left, real = tmp_path / "log", [LOST], untrusted.append_regular
    append_whole(path, b"one\n")
    monkeypatch.setattr(untrusted, "append_regular", lambda path: _HalfWriter(real(path), code, left))
    if code == errno.ENOSPC:
        with pytest.raises(OSError, match="No space left"):
            append_whole(path, b"two\n")
    else:
        append_whole(path, b"two\n")
    assert path.read_bytes() == kept


def test_the_writer_of_a_checkpoint_repeats_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, values = ("a", "b"), b"headvalues"
    (tmp_path / "expected").mkdir()
    (tmp_path / "found").mkdir()
    metadata: dict[str, Any] = {"tensors": {"x": {"crc32": 0}, "y": {"crc32": 0}}}
    pieces = [memoryview(values)[4:7], memoryview(values)[7:]]
    expected = write_share(tmp_path / "expected", names, b"head", metadata, pieces)
    # The second file is synced second: three failures hit both files.
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.EIO))
    command = {"do": "share", "folder": str(tmp_path / "found"), "names": names, "header_bytes": 4}
    found = writer_process._execute(memoryview(values), {**command, "lengths": [3, 3], "metadata": metadata})
    assert found == expected
    for name in names:
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


@pytest.mark.parametrize("call", ["replace", "rename", "fsync", "unlink"])
@pytest.mark.parametrize("after", [False, True])
def test_a_checkpoint_is_published_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: bool
) -> None:
    """With ``after``, the server does the work, and its answer is lost."""
    partial, final, stale = tmp_path / "new.partial", tmp_path / "new", tmp_path / "old"
    for folder in (partial, stale):
        folder.mkdir()
        (folder / "data").write_bytes(b"x")
    if not (call == "unlink" and after):  # ``shutil.rmtree`` needs a path that is still there.
        monkeypatch.setattr(os, call, failing(getattr(os, call), errno.EIO, times=1, after=after))
    finalize(partial, final, ("manifest", "text"), [stale])
    assert [each.name for each in tmp_path.iterdir()] == ["new"]
    assert {each.name: each.read_bytes() for each in final.iterdir()} == {"data": b"x", "manifest": b"text"}
