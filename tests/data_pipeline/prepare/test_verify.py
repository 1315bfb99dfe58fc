"""Verify finds and names every inserted damage, and reports no other."""

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

from data_pipeline.errors import ManifestError
from data_pipeline.prepare import contents
from data_pipeline.prepare.verify import check_manifest, jobs_of, verify, verify_shard
from data_pipeline.shards.damage import Problem
from data_pipeline.shards.index import ShardIndex, build_index, index_path
from data_pipeline.shards.manifest import write_manifest
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
    """Write a tar with members of any name and type, and its index if one can be built."""
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


def test_every_truncation_is_found_even_without_an_index(tmp_path: Path) -> None:
    shard = good(tmp_path)
    index_path(shard).unlink()
    whole = shard.read_bytes()
    content_end = len(whole.rstrip(b"\0"))
    for length in range(0, content_end, 97):
        shard.write_bytes(whole[:length])
        expected = Problem.TRUNCATED if length else Problem.SHARD
        assert expected in [problem for _, problem in problems(shard)], length


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil.txt", "a/../../evil.txt", "a\\..\\evil.txt"])
def test_names_that_leave_the_shard(tmp_path: Path, name: str) -> None:
    members = [("ok.txt", b"ok", tarfile.REGTYPE), (name, b"evil", tarfile.REGTYPE), ("z.txt", b"ok", tarfile.REGTYPE)]
    path = raw_tar(tmp_path / "x.tar", *members)
    (damage,) = [d for d in verify_shard(path).damages if d.problem is Problem.PATH]
    assert damage.offset == 1024
    assert damage.key
    assert name.startswith(damage.key)
    assert "points outside the shard" in damage.detail
    assert verify_shard(path).num_members == 2, "what follows is read all the same"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(tmp_path: Path, kind: bytes) -> None:
    path = raw_tar(tmp_path / "x.tar", ("evil.jpg", b"", kind), ("fine.txt", b"fine", tarfile.REGTYPE))
    assert problems(path) == [("", Problem.INDEX), ("evil", Problem.LINK)]
    assert verify_shard(path).num_members == 1


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
        surrogate={"json": b'{"caption": "\\ud800"}'},
        gif={"png": b"GIF89a" + bytes(30)},
        number={"json": b'{"caption": 3}'},
        empty={"json": b'{"parts": [{}]}'},
        film={"mp4": b"no video"},
        song={"wav": b"no sound"},
        codes={"jpg.tokens": b"no token grid"},
        fine={"jpg": picture("jpeg"), "cls": b""},
    )
    assert problems(shard) == [
        ("absent", Problem.PARTNER),
        ("wrong", Problem.RENAMED),
        ("noise", Problem.IMAGE),
        ("half", Problem.IMAGE),
        ("latin", Problem.TEXT),
        ("broken", Problem.TEXT),
        ("surrogate", Problem.TEXT),
        ("gif", Problem.EXTENSION),
        ("number", Problem.TEXT),
        ("empty", Problem.TEXT),
        ("film", Problem.VIDEO),
        ("song", Problem.AUDIO),
        ("codes", Problem.TOKENS),
    ]


def bomb(side: int) -> bytes:
    """Return a PNG of a few hundred bytes whose header declares ``side * side`` pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    assert problems(shard_of(tmp_path, a={"png": bomb(60_000)})) == [("a", Problem.BOMB)]
    assert problems(shard_of(tmp_path / "b", a={"jpg": picture("jpeg", 30)}), max_pixels=899) == [("a", Problem.BOMB)]


def test_members_that_would_need_too_much_memory_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "MAX_TEXT_BYTES", 1000)
    monkeypatch.setattr(contents, "_MOST_METADATA_BYTES", 1000)
    long = {"txt": b" " * 1001, "json": b"[" * 1001, "png": picture("png", 8) + bytes(2000)}
    assert problems(shard_of(tmp_path, a=long)) == [("a", Problem.BOMB)] * 3


def test_an_index_of_another_tar(tmp_path: Path) -> None:
    shard, other = good(tmp_path / "a"), shard_of(tmp_path / "b", a={"txt": b"one"}, z={"txt": b"two"})
    index_path(shard).write_bytes(index_path(other).read_bytes())
    found = problems(shard)
    strangers = [("a", ".jpg"), ("b", ".0.png"), ("b", ".1.webp"), ("b", ".json"), ("c", ".json")]
    assert [key for key, problem in found if problem is Problem.INDEX] == [*(key for key, _ in strangers), "a"]
    assert ("z", Problem.MISSING) in found
    index_path(shard).unlink()
    assert problems(shard) == [("", Problem.INDEX)]


def test_a_damaged_index_is_distinguished_from_a_damaged_tar(tmp_path: Path) -> None:
    shard = good(tmp_path)
    index = ShardIndex.read(shard)
    whole = index_path(shard).read_bytes()
    header_bytes = struct.unpack("<Q", whole[:8])[0] + 8
    rng = np.random.default_rng(3)
    for bit in rng.integers(8 * header_bytes, 8 * len(whole), 200):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << int(bit % 8)
        index_path(shard).write_bytes(damaged)
        found = {problem for _, problem in problems(shard)}
        assert found, f"bit {bit - 8 * header_bytes}"
        assert found <= {Problem.INDEX, Problem.MISSING}, f"bit {bit - 8 * header_bytes}: the tar is sound"
    assert index.tar_bytes == shard.stat().st_size


def test_a_manifest_that_lists_another_tar(tmp_path: Path) -> None:
    shard = good(tmp_path)
    manifest = write_manifest(tmp_path / "x.manifest", [shard])
    assert [report.damages for report in verify(jobs_of(manifest.path)[1])] == [[]]
    shard.unlink()
    shard_of(tmp_path, a={"txt": b"other"})
    build_index(shard)
    (report,) = verify(jobs_of(manifest.path)[1])
    assert {damage.problem for damage in report.damages} == {Problem.MANIFEST}
    shard.unlink()
    (report,) = verify(jobs_of(manifest.path)[1])
    assert {damage.problem for damage in report.damages} == {Problem.SHARD, Problem.MANIFEST}


def test_a_manifest_whose_content_changed(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "x.manifest", [good(tmp_path)]).path
    assert check_manifest(path) == []
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"part-00000.tar", b"part-00001.tar"))
    (damage,) = check_manifest(path)
    assert (damage.shard, damage.problem) == (str(path), Problem.MANIFEST)


def test_several_processes_report_the_same_in_the_same_order(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "part", max_samples=1) as writer:
        for number in range(5):
            writer.write(f"{number}", {"txt": b"fine" if number % 2 else b"\xff"})
    manifest = write_manifest(tmp_path / "x.manifest", writer.shards)
    alone = list(verify(jobs_of(manifest.path)[1]))
    assert [len(report.damages) for report in alone] == [1, 0, 1, 0, 1]
    assert list(verify(jobs_of(manifest.path)[1], workers=2)) == alone


def test_a_member_without_extension(tmp_path: Path) -> None:
    path = raw_tar(tmp_path / "x.tar", ("README", b"hi", tarfile.REGTYPE), ("a.txt", b"x", tarfile.REGTYPE))
    build_index(path)
    assert problems(path) == [("", Problem.NAME)]


def test_other_files_are_rejected_with_their_kind(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    with pytest.raises(ManifestError, match=r"x\.json: this is JSON, expected a manifest or a tar"):
        jobs_of(path)
    with tarfile.open(tmp_path / "shard", "w") as tar:
        tar.add(path, "0.json")
    assert jobs_of(tmp_path / "shard")[0] == 1
