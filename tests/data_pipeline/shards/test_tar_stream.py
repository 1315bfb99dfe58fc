"""Sequential reading of tars: tars of webdataset are read completely, and damage is the last item."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.servers import Fault, Request, file_server
from data_pipeline.errors import SampleError, ShardError
from data_pipeline.shards.tar_stream import samples_of, stream_members, stream_samples
from data_pipeline.storage.config import StorageConfig
from data_pipeline.storage.storage import Storage

SAMPLES = {f"a/{number:03d}": {"0.png": os.urandom(700 + number), "txt": b"text %d" % number} for number in range(9)}


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = tmp_path / "part.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for key, members in SAMPLES.items():
            writer.write({"__key__": key, **members})
    return path


def _read(source: str) -> list:
    with Storage() as storage:
        return list(samples_of(source, storage))


def test_a_file_a_command_a_named_pipe_and_a_compressed_tar_give_the_same(tar: Path, tmp_path: Path) -> None:
    expected = list(SAMPLES.items())
    assert _read(str(tar)) == expected
    assert _read(f"pipe:cat {tar}") == expected
    packed = tmp_path / "part.tar.gz"
    packed.write_bytes(gzip.compress(tar.read_bytes()))
    assert _read(str(packed)) == expected
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    feeder = threading.Thread(target=lambda: fifo.write_bytes(tar.read_bytes()))
    feeder.start()
    assert _read(str(fifo)) == expected
    feeder.join()


@pytest.mark.fault
def test_a_tar_of_a_flaky_server_comes_whole(tar: Path, tmp_path: Path) -> None:
    def every_second(number: int, request: Request) -> Fault | None:
        return [Fault.ERROR_500, Fault.TRUNCATE, Fault.RESET][number // 2 % 3] if number % 2 == 0 else None

    settings = StorageConfig(timeout_seconds=2.0, retry_seconds=20)
    with file_server(tmp_path, every_second).running() as server, Storage(settings) as storage:
        assert list(samples_of(f"{server.url}/part.tar", storage)) == list(SAMPLES.items())
        ((_, error),) = samples_of(f"{server.url}/absent.tar", storage)
    assert isinstance(error, ShardError)


@given(cut=st.integers(0, 20_000))
def test_a_tar_cut_anywhere_gives_whole_samples_and_then_says_so(cut: int) -> None:
    whole = io.BytesIO()
    with webdataset.TarWriter(whole) as writer:
        for key, members in SAMPLES.items():
            writer.write({"__key__": key, **members})
    data = whole.getvalue()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        end = max(info.offset_data + info.size for info in archive)
    cut = min(cut, end)
    found = list(stream_samples(stream_members(io.BytesIO(data[:cut]), "part.tar"), "part.tar"))
    *good, (_, error) = found
    assert isinstance(error, ShardError)
    assert good == list(SAMPLES.items())[: len(good)]


def test_a_damaged_header_is_no_end(tar: Path) -> None:
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as archive:
        header = archive.getmembers()[5].offset
    data[header + 3] ^= 0xFF
    tar.write_bytes(data)
    *good, (key, error) = _read(str(tar))
    assert good == list(SAMPLES.items())[: len(good)]
    assert isinstance(error, ShardError)
    assert key == list(SAMPLES)[len(good)]


def _parts(data: bytes) -> list:
    return list(stream_samples(stream_members(io.BytesIO(data), "part.tar"), "part.tar"))


def _header(kind: bytes, content: bytes, name: str = "a.txt") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


@pytest.mark.fault
def test_hostile_extended_headers_are_a_fault_of_the_shard() -> None:
    end, plain = bytes(1024), _header(tarfile.REGTYPE, b"hi")
    sparse = _header(tarfile.XHDTYPE, b"22 GNU.sparse.map=1,x\n25 GNU.sparse.major=junk\n")
    long_names = _header(tarfile.GNUTYPE_LONGNAME, b"b.txt\0") * 3000
    negative = bytearray(plain)
    negative[124:136] = b"\xff" * 12  # Base 256 of GNU tar.
    negative[148:156] = b"%06o\0 " % (sum(negative[:148]) + sum(negative[156:512]) + 8 * 32)
    for hostile in (sparse, long_names, bytes(negative), _header(tarfile.XHDTYPE, b"99 path")):
        ((key, error),) = _parts(plain + hostile + plain + end)  # The current sample may lack its last members.
        assert isinstance(error, ShardError)
        assert key == "a"
    assert _parts(_header(tarfile.GNUTYPE_LONGNAME, b"b.txt\0") + plain + end) == [("b", {"txt": b"hi"})]


@pytest.mark.fault
@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_packed_tar_that_was_damaged_anywhere_says_so(tar: Path, pack: Callable[[bytes], bytes]) -> None:
    data, whole = pack(tar.read_bytes()), list(SAMPLES.items())
    assert _parts(data) == whole
    draw = random.Random(1)
    places = [*range(len(data) - 8, len(data)), *(draw.randrange(10, len(data)) for _ in range(60))]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        found = _parts(bytes(damaged))
        # Some bits of each format are padding. The last eight bytes of gzip are its checksum and its length.
        is_checked = pack is gzip.compress and place >= len(data) - 8
        assert isinstance(found[-1][1], ShardError) or (found == whole and not is_checked), place
        *_, (_, error) = _parts(data[:place])
        assert isinstance(error, ShardError), place


@pytest.mark.fault
def test_random_damage_of_a_plain_tar_ends_in_a_fault_or_in_samples(tar: Path) -> None:
    data, draw = tar.read_bytes(), random.Random(2)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            header = draw.randrange(0, len(data) // 512) * 512
            damaged[header + draw.choice([0, 124, 148, 156, 257, draw.randrange(512)])] = draw.randrange(256)
        for _, found in _parts(bytes(damaged)):
            assert isinstance(found, dict | SampleError | ShardError)


def test_a_command_that_fails_is_reported_behind_what_it_gave(tar: Path) -> None:
    *good, (_, error) = _read(f"pipe:cat {tar}; exit 3")
    assert good == list(SAMPLES.items())
    assert "failed with exit code 3" in str(error)


def test_a_command_is_stopped_when_nobody_reads_on(tar: Path, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with Storage() as storage:
        samples = samples_of(f"pipe:echo $$ > {pid}; cat {tar}; exec sleep 600", storage)
        next(samples)
        samples.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_links_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "link.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    ((_, error),) = _read(str(path))
    assert "a symbolic link; shards hold plain files only" in str(error)
    ((_, missing),) = _read(str(tmp_path / "none.tar"))
    assert isinstance(missing, ShardError)


def test_two_members_of_one_name_are_one_bad_sample(tmp_path: Path) -> None:
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a.txt", "a.txt", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 2
            archive.addfile(info, io.BytesIO(b"hi"))
    (first, error), second = _read(str(path))
    assert first == "a"
    assert isinstance(error, SampleError)
    assert second == ("b", {"txt": b"hi"})
