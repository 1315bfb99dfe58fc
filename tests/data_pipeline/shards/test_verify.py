"""Every damage that is put in is found and named, and nothing else is."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.shards.index import build_index, index_path
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.verify import Problem, verify_manifest, verify_shard
from data_pipeline.shards.writer import ShardWriter

pytestmark = pytest.mark.fault


def picture(kind: str, side: int = 24) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def interleaved(*names: str) -> bytes:
    return json.dumps({"parts": [{"text": "a"}, *({"image": name} for name in names)]}).encode()


def shard_of(folder: Path, **samples: dict[str, bytes]) -> Path:
    with ShardWriter(folder, "part") as writer:
        for key, members in samples.items():
            writer.write(key, members)
    return writer.shards[0]


def good(folder: Path) -> Path:
    return shard_of(
        folder,
        a={"jpg": picture("jpeg"), "txt": b"one"},
        b={"0.png": picture("png"), "1.webp": picture("webp"), "json": interleaved("0.png", "1.webp")},
        c={"json": b'{"captions": ["x", "y"], "score": 1}'},
    )


def raw_tar(path: Path, *members: tuple[str, bytes, bytes]) -> Path:
    """A tar with members of any name and type, and its index if it has a legal one."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "target" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def problems(path: Path, **options: int) -> list[tuple[str, Problem]]:
    return [(damage.key, damage.problem) for damage in verify_shard(path, **options).damages]


def test_a_good_shard_has_no_damage(tmp_path: Path) -> None:
    report = verify_shard(good(tmp_path))
    assert (report.damages, report.num_samples, report.num_members) == ([], 3, 6)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    shard = good(tmp_path)
    whole = shard.read_bytes()
    rng = np.random.default_rng(1)
    for bit in rng.integers(0, 8 * len(whole), 300):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << int(bit % 8)
        shard.write_bytes(damaged)
        assert verify_shard(shard).damages, f"bit {bit}"


def test_every_truncation_is_found_even_without_an_index(tmp_path: Path) -> None:
    shard = good(tmp_path)
    index_path(shard).unlink()
    whole = shard.read_bytes()
    content_end = len(whole.rstrip(b"\0"))
    for length in range(0, content_end, 97):
        shard.write_bytes(whole[:length])
        assert Problem.TAR in [problem for _, problem in problems(shard)], length


def test_a_flipped_pixel_names_sample_and_offset(tmp_path: Path) -> None:
    shard = good(tmp_path)
    whole = bytearray(shard.read_bytes())
    content = picture("jpeg")
    start = whole.index(content)
    whole[start + len(content) // 2] ^= 0x10
    shard.write_bytes(whole)
    first = verify_shard(shard).damages[0]
    assert (first.shard, first.key, first.offset, first.problem) == (str(shard), "a", start, Problem.CHECKSUM)


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil.txt", "a/../../evil.txt", "a\\..\\evil.txt"])
def test_names_that_leave_the_shard(tmp_path: Path, name: str) -> None:
    path = raw_tar(tmp_path / "x.tar", ("ok.txt", b"ok", tarfile.REGTYPE), (name, b"evil", tarfile.REGTYPE))
    (damage,) = [d for d in verify_shard(path).damages if d.problem is Problem.TAR]
    assert damage.offset == 1024
    assert "leaves the shard" in damage.detail


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(tmp_path: Path, kind: bytes) -> None:
    path = raw_tar(tmp_path / "x.tar", ("evil.jpg", b"", kind))
    assert Problem.TAR in [problem for _, problem in problems(path)]


def test_a_key_that_comes_back_and_an_extension_twice(tmp_path: Path) -> None:
    names = ["a.txt", "a.TXT", "b.txt", "a.json"]
    path = raw_tar(tmp_path / "x.tar", *((name, b"{}", tarfile.REGTYPE) for name in names))
    found = [item for item in problems(path) if item[1] is Problem.DUPLICATE]
    assert found == [("a", Problem.DUPLICATE)] * 2


def test_damage_inside_samples(tmp_path: Path) -> None:
    half = picture("jpeg", 200)
    shard = shard_of(
        tmp_path,
        absent={"0.png": picture("png"), "json": interleaved("0.png", "1.png")},
        wrong={"jpg": picture("png")},
        noise={"png": b"\x89PNG\r\n\x1a\n" + bytes(60)},
        half={"jpg": half[: len(half) // 2]},
        latin={"txt": "é".encode("latin-1")},
        broken={"json": b'{"caption": '},
        number={"json": b'{"caption": 3}'},
        empty={"json": b'{"parts": [{}]}'},
        fine={"jpg": picture("jpeg"), "txt": b""},
    )
    assert problems(shard) == [
        ("absent", Problem.PARTNER),
        ("wrong", Problem.EXTENSION),
        ("noise", Problem.IMAGE),
        ("half", Problem.IMAGE),
        ("latin", Problem.TEXT),
        ("broken", Problem.TEXT),
        ("number", Problem.TEXT),
        ("empty", Problem.TEXT),
    ]


def bomb(side: int) -> bytes:
    """A few hundred bytes of PNG whose header asks for ``side * side`` pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    assert problems(shard_of(tmp_path, a={"png": bomb(60_000)})) == [("a", Problem.BOMB)]
    assert problems(shard_of(tmp_path / "b", a={"jpg": picture("jpeg", 30)}), max_pixels=899) == [("a", Problem.BOMB)]


def test_an_index_of_another_tar(tmp_path: Path) -> None:
    shard, other = good(tmp_path / "a"), shard_of(tmp_path / "b", a={"txt": b"one"}, z={"txt": b"two"})
    index_path(shard).write_bytes(index_path(other).read_bytes())
    found = [problem for _, problem in problems(shard)]
    assert found.count(Problem.INDEX) >= 6
    assert Problem.CHECKSUM in found
    index_path(shard).unlink()
    assert problems(shard) == [("", Problem.INDEX)]


def test_a_manifest_that_lists_another_tar(tmp_path: Path) -> None:
    shard = good(tmp_path)
    manifest = write_manifest(tmp_path / "x.manifest", [shard])
    assert [report.damages for report in verify_manifest(manifest.path)] == [[]]
    shard.unlink()
    shard_of(tmp_path, a={"txt": b"other"})
    build_index(shard)
    (report,) = verify_manifest(manifest.path)
    assert {damage.problem for damage in report.damages} == {Problem.MANIFEST}


def test_a_member_without_extension(tmp_path: Path) -> None:
    path = raw_tar(tmp_path / "x.tar", ("README", b"hi", tarfile.REGTYPE), ("a.txt", b"x", tarfile.REGTYPE))
    build_index(path)
    assert problems(path) == [("", Problem.NAME)]
