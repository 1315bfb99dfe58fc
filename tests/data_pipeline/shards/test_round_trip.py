"""Writer, index and manifest, compared with Python's tarfile, webdataset and brute force."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.errors import DataConfigError, ManifestError, ShardError
from data_pipeline.io.checksums import sha256_of
from data_pipeline.io.columns import Column, pack_strings, read_columns, write_columns
from data_pipeline.shards import index as index_module
from data_pipeline.shards import index as shard_index
from data_pipeline.shards.index import INDEX_FORMAT, IndexedSample, ShardIndex, build_index, extent, index_path
from data_pipeline.shards.manifest import MANIFEST_FORMAT, Manifest, write_manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.shards.writer import ShardWriter

KEYS = st.text("abcXYZ019_-é", min_size=1, max_size=12)
MEMBERS = st.dictionaries(st.sampled_from(["txt", "json", "0.png", "jpg", "bin"]), st.binary(max_size=1500), min_size=1)
SAMPLES = st.lists(st.tuples(KEYS, MEMBERS), max_size=12, unique_by=lambda sample: sample[0])


def write(folder: Path, samples: list[tuple[str, dict[str, bytes]]], **options: int) -> list[Path]:
    with ShardWriter(folder, "part", **options) as writer:
        for key, members in samples:
            writer.write(key, members)
    return writer.shards


def picture(width: int, height: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 90)).save(buffer, kind)
    return buffer.getvalue()


@settings(max_examples=60, deadline=None)
@given(samples=SAMPLES, max_samples=st.integers(1, 5), max_bytes=st.integers(1, 30_000))
def test_bytes_written_are_bytes_found(
    tmp_path_factory: pytest.TempPathFactory,
    samples: list[tuple[str, dict[str, bytes]]],
    max_samples: int,
    max_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    shards = write(folder, samples, max_samples=max_samples, max_bytes=max_bytes)
    manifest = write_manifest(folder / "all.manifest", shards)
    assert manifest.num_samples == len(samples)
    for number, (key, members) in enumerate(samples):
        shard, i = manifest.locate(number)
        index = manifest.open_index(shard)
        data = manifest.shard_path(shard).read_bytes()
        name, found, _ = index.row(i)
        first, end = extent(found)
        assert name == key
        assert {member.ext: data[member.offset : member.offset + member.size] for member in found} == members
        assert all(member.crc32 == zlib.crc32(members[member.ext]) for member in found)
        assert all(first <= member.offset and member.offset + member.size <= end for member in found)
    for shard in shards:
        assert len(ShardIndex.open(shard)) <= max_samples
        assert shard.stat().st_size <= max(max_bytes, 5 * 2048 + 10_240) or len(ShardIndex.open(shard)) == 1


@settings(max_examples=30, deadline=None)
@given(samples=SAMPLES)
def test_equal_samples_give_equal_files(
    tmp_path_factory: pytest.TempPathFactory, samples: list[tuple[str, dict[str, bytes]]]
) -> None:
    contents = []
    for reverse in (False, True):
        folder = tmp_path_factory.mktemp("shards")
        turned = [(key, dict(sorted(members.items(), reverse=reverse))) for key, members in samples]
        write_manifest(folder / "all.manifest", write(folder, turned, max_samples=3))
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]


def test_webdataset_and_tarfile_read_what_was_written(tmp_path: Path) -> None:
    samples = [(f"d/{i:03d}", {"jpg": picture(8, 8, "jpeg"), "json": b'{"caption": "x"}'}) for i in range(7)]
    (shard,) = write(tmp_path, samples)
    seen = [
        (s["__key__"], {"jpg": s["jpg"], "json": s["json"]})
        for s in webdataset.WebDataset(str(shard), shardshuffle=False)
    ]
    assert seen == samples
    with tarfile.open(shard) as tar:
        assert all((info.mtime, info.uid, info.gid, info.mode) == (0, 0, 0, 0o644) for info in tar)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_tools_are_indexed(tmp_path: Path, form: int) -> None:
    path, name = tmp_path / "other.tar", "deep/" * 30 + "x" * (20 if form == tarfile.USTAR_FORMAT else 120)
    name = name[-200:].lstrip("/") if form == tarfile.USTAR_FORMAT else name
    with tarfile.open(path, "w", format=form) as tar:
        folder = tarfile.TarInfo("deep")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for ext, content in (("PNG", picture(5, 9, "png")), ("txt", "grüße".encode()), ("README", b"")):
            info = tarfile.TarInfo(f"./{name}.{ext}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    index = build_index(path)
    assert [index.row(i).key for i in range(len(index))] == [name]
    assert [(m.ext, m.width, m.height) for m in index.row(0).members] == [
        ("png", 5, 9),
        ("txt", 0, 0),
        ("readme", 0, 0),
    ]
    assert index.row(0).text_bytes == len("grüße".encode())
    with tarfile.open(path) as tar:
        assert [m.offset for m in index.row(0).members] == [info.offset_data for info in tar if info.isfile()]


def test_text_bytes_count_what_the_sample_shows(tmp_path: Path) -> None:
    records: list[tuple[object, int]] = [
        ({"caption": "abc"}, 3),
        ({"captions": ["a", "ééé"]}, 6),
        ({"parts": [{"text": "ab"}, {"image": "0.png"}, {"text": "c"}]}, 3),
        ({"other": "abc"}, 0),
        (["no object"], 0),
    ]
    samples = [(f"{i}", {"json": json.dumps(record).encode()}) for i, (record, _) in enumerate(records)]
    samples += [("bad", {"json": b"{"}), ("deep", {"json": b"[" * 100_000}), ("txt", {"txt": b"four"})]
    (shard,) = write(tmp_path, samples)
    index = ShardIndex.open(shard)
    assert [index.row(i).text_bytes for i in range(len(index))] == [size for _, size in records] + [0, 0, 4]


def test_an_exception_leaves_finished_shards_only(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path, "part", max_samples=1) as writer:
            writer.write("a", {"txt": b"a"})
            writer.write("b", {"txt": b"b"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-00000.tar", "part-00000.tar.index"]


@pytest.mark.parametrize(
    ("key", "ext"),
    [("a.b", "txt"), ("/a", "txt"), ("../a", "txt"), ("a/../b", "txt"), ("", "txt"), ("a", "TXT"), ("a", "")],
)
def test_names_that_would_not_survive_are_refused(tmp_path: Path, key: str, ext: str) -> None:
    with pytest.raises(ShardError), ShardWriter(tmp_path, "part") as writer:
        writer.write(key, {ext: b""})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault
def test_a_tar_of_another_size_makes_the_index_stale(tmp_path: Path) -> None:
    (shard,) = write(tmp_path, [("a", {"txt": b"a"})])
    with shard.open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(ManifestError, match=r"part-00000\.tar.*stale.*mmscale data index"):
        ShardIndex.open(shard)


@pytest.mark.fault
def test_a_newer_tar_is_judged_by_its_content(tmp_path: Path) -> None:
    (shard,) = write(tmp_path, [("a", {"txt": b"a"})])
    made = index_path(shard).stat().st_mtime_ns
    os.utime(shard, ns=(made + 10**9, made + 10**9))
    ShardIndex.open(shard)
    assert index_path(shard).stat().st_mtime_ns > made
    data = bytearray(shard.read_bytes())
    data[512] ^= 1
    shard.write_bytes(data)
    newer = index_path(shard).stat().st_mtime_ns + 10**9
    os.utime(shard, ns=(newer, newer))
    with pytest.raises(ManifestError, match=r"part-00000\.tar.*content.*mmscale data index"):
        ShardIndex.open(shard)


@pytest.mark.fault
def test_a_missing_index_or_tar_is_named_with_the_remedy(tmp_path: Path) -> None:
    (shard,) = write(tmp_path, [("a", {"txt": b"a"})])
    index_path(shard).unlink()
    with pytest.raises(ManifestError, match=r"has no index; build it with: mmscale data index"):
        ShardIndex.open(shard)
    with pytest.raises(ManifestError, match=r"gone\.tar"):
        ShardIndex.open(tmp_path / "gone.tar")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (rb'"shape":\[2\]', rb'"shape":[1e999]'),
        (rb'"shape":\[2\]', rb'"shape":[-2]'),
        (rb'"data_offsets":\[0,', rb'"data_offsets":[-8,'),
        (rb'"dtype":"I64"', rb'"dtype":"F64"'),
        (rb'tar_bytes\\": \d+', rb'tar_bytes\\": 1e999'),
        (rb'tar_bytes\\": \d+', rb'tar_bytes\\": []'),
        (rb"^\{.*", rb"[]"),
        (rb"^\{.*", rb'{"__metadata__": {"record": "3"}}'),
        (rb"mmscale-shard-index-1", rb"another-format"),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, old: bytes, new: bytes) -> None:
    (shard,) = write(tmp_path, [("a", {"txt": b"a"})])
    whole = index_path(shard).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, times = re.subn(old, new, whole[8 : 8 + length].rstrip(), flags=re.DOTALL)
    assert times == 1 or b"shape" in old or b"dtype" in old or b"data_offsets" in old
    index_path(shard).write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
    with pytest.raises(ManifestError, match=r"part-00000\.tar"):
        ShardIndex.open(shard)


def all_rows(shard: Path) -> list[IndexedSample] | None:
    """Return all rows of an index; None if opening it or a row raises. ``check`` must then raise too."""
    try:
        index = ShardIndex.open(shard)
        return [index.row(i) for i in range(len(index))]
    except ManifestError:
        with pytest.raises(ManifestError):
            ShardIndex.open(shard).check()
        return None


@pytest.mark.fault
def test_a_damaged_index_is_refused_or_says_the_same(tmp_path: Path) -> None:
    """After a change of any byte of an index, no sample has a missing member, a wrong member or a wrong key."""
    (shard,) = write(tmp_path, [(f"k{i}", {"txt": b"a" * i, "png": picture(3, 4, "png")}) for i in range(4)])
    whole, sound = index_path(shard).read_bytes(), all_rows(shard)
    rng = np.random.default_rng(0)
    refused = 0
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= int(rng.integers(1, 256))
        index_path(shard).write_bytes(damaged)
        found = all_rows(shard)
        refused += found is None
        assert found in (None, sound), at
    assert refused > 200
    for length in range(0, len(whole), 7):
        index_path(shard).write_bytes(whole[:length])
        with pytest.raises(ManifestError):
            ShardIndex.open(shard)


@pytest.mark.fault
def test_one_flipped_bit_of_an_index_moves_no_image_to_another_text(tmp_path: Path) -> None:
    shards = write(tmp_path, [(f"k{i}", {"png": picture(3, 4, "png"), "txt": b"text %d" % i}) for i in range(8)])
    manifest = write_manifest(tmp_path / "all.manifest", shards)
    cu_members = np.cumsum([0] + [2] * 8).astype("<i8").tobytes()
    whole = index_path(shards[0]).read_bytes()
    at = whole.index(cu_members) + 8 * 3
    index_path(shards[0]).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    reader = SampleReader(manifest, "pairs")
    for sample in (2, 3):  # The boundary between the samples moved, so one would get the image of the other.
        with pytest.raises(ManifestError, match=rf"of sample {sample} does not match its checksum"):
            reader.read(sample)
    assert [type(part).__name__ for part in reader.read(4).parts] == ["ImagePart", "TextPart"]


def test_an_index_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (shard,) = write(tmp_path, [(f"k{i}", {"txt": b"a" * i}) for i in range(4)])
    path, sound = index_path(shard), all_rows(shard)
    columns = read_columns(path, shard_index._COLUMNS, INDEX_FORMAT, optional=shard_index._OF_CLIPS)
    arrays = {name: array.copy() for name, array in columns.arrays.items() if name != "row_crc32"}
    write_columns(path, arrays, columns.record)
    assert all_rows(shard) == sound
    with pytest.raises(ManifestError, match="an index of an earlier version, without num_frames of clips; build it"):
        ShardIndex.open(shard).column("num_frames")
    ShardIndex.open(shard).check()


def test_locate_agrees_with_counting(tmp_path: Path) -> None:
    shards = write(tmp_path, [(f"{i}", {"txt": b""}) for i in range(11)], max_samples=3)
    manifest = write_manifest(tmp_path / "all.manifest", shards)
    assert [manifest.locate(i) for i in range(11)] == [(i // 3, i % 3) for i in range(11)]
    for outside in (-1, 11):
        with pytest.raises(IndexError):
            manifest.locate(outside)
    assert manifest.fingerprint == manifest.computed_fingerprint()
    assert write_manifest(tmp_path / "some.manifest", shards[:2]).fingerprint != manifest.fingerprint


def test_opening_many_shards_makes_no_objects_of_them(tmp_path: Path) -> None:
    count = 100_000
    path_bytes, cu_path_bytes = pack_strings([f"shards/part-{i:06d}.tar" for i in range(count)])
    arrays = {
        "cu_samples": np.arange(count + 1, dtype=np.int64) * 10_000,
        "path_bytes": path_bytes,
        "cu_path_bytes": cu_path_bytes,
        "tar_bytes": np.zeros(count, np.int64),
        "tar_sha256": np.zeros((count, 32), np.uint8),
    }
    write_columns(tmp_path / "x.manifest", arrays, {"format": MANIFEST_FORMAT, "fingerprint": ""})
    tracemalloc.start()
    manifest = Manifest.open(tmp_path / "x.manifest")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * count
    assert manifest.locate(999_999_999) == (count - 1, 9_999)
    assert manifest.shard_path(count - 1) == tmp_path / "shards" / "part-099999.tar"


def test_a_manifest_is_written_and_read_with_one_index_open_at_a_time(tmp_path: Path) -> None:
    """There are more shards than a process may open files, and each mapped index uses a descriptor."""
    shards = write(tmp_path, [(f"{i}", {"txt": b"some text"}) for i in range(300)], max_samples=1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, limits[1]))
    try:
        manifest = write_manifest(tmp_path / "all.manifest", iter(shards))
        reader = SampleReader(manifest, "x", max_open=8)
        for i in [*range(300), *range(299, -1, -1)]:
            reader.read(i)
            if i == 8:
                few = len(os.listdir("/proc/self/fd")), maps(tmp_path)
        assert (len(os.listdir("/proc/self/fd")), maps(tmp_path)) == few
        reader.close()
        assert maps(tmp_path) <= 1  # Only the manifest is mapped.
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def maps(folder: Path) -> int:
    """Return the number of files in a folder that this process has mapped."""
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.fault
def test_offsets_that_fall_are_found_when_a_manifest_is_opened(tmp_path: Path) -> None:
    """The decrease may be between two of the chunks that are checked."""
    count = (1 << 16) + 2
    arrays: dict[str, Column] = {
        "cu_samples": np.arange(count + 1, dtype=np.int64),
        "path_bytes": np.zeros(0, np.uint8),
        "cu_path_bytes": np.zeros(count + 1, np.int64),
        "tar_bytes": np.zeros(count, np.int64),
        "tar_sha256": np.zeros((count, 32), np.uint8),
    }
    for at in (1, 1 << 16, (1 << 16) + 1, count - 1):
        damaged = arrays["cu_samples"].copy()
        damaged[at] += 2
        record = {"format": MANIFEST_FORMAT, "fingerprint": ""}
        write_columns(tmp_path / "x.manifest", {**arrays, "cu_samples": damaged}, record)
        with pytest.raises(ManifestError, match="do not rise"):
            Manifest.open(tmp_path / "x.manifest")


def test_the_digest_of_a_newer_tar_is_computed_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a read-only data set with tars newer than their indexes, an order opens each shard many times."""
    (shard,) = write(tmp_path, [("a", {"txt": b"a"})])
    digests: list[Path] = []

    def counted_sha256(path: Path) -> str:
        digests.append(path)
        return sha256_of(path)

    monkeypatch.setattr(index_module, "sha256_of", counted_sha256)
    monkeypatch.setattr(index_module, "_renew", lambda path: None)
    os.utime(shard, (2e9, 2e9))
    for _ in range(3):
        ShardIndex.open(shard)
    assert digests == [shard]
    shard.write_bytes(shard.read_bytes().replace(b"a", b"b"))
    os.utime(shard, (3e9, 3e9))
    with pytest.raises(ManifestError, match="content of the tar changed"):
        ShardIndex.open(shard)


def test_an_empty_manifest_opens(tmp_path: Path) -> None:
    assert write_manifest(tmp_path / "none.manifest", []).num_samples == 0


@pytest.mark.fault
def test_manifests_refuse_shards_elsewhere_and_changed_shards(tmp_path: Path) -> None:
    (shard,) = write(tmp_path / "a", [("a", {"txt": b"a"})])
    with pytest.raises(DataConfigError, match="manifest's folder"):
        write_manifest(tmp_path / "b" / "x.manifest", [shard])
    with pytest.raises(DataConfigError, match="twice"):
        write_manifest(tmp_path / "x.manifest", [shard, shard])
    manifest = write_manifest(tmp_path / "x.manifest", [shard])
    shard.unlink()
    write(tmp_path / "a", [("b", {"txt": b"a"})])
    with pytest.raises(ManifestError, match=r"changed since .*x\.manifest"):
        manifest.open_index(0)


@pytest.mark.fault
def test_a_hostile_path_in_a_manifest_is_refused(tmp_path: Path) -> None:
    (shard,) = write(tmp_path, [("a", {"txt": b"a"})])
    path = tmp_path / "x.manifest"
    write_manifest(path, [shard])
    for hostile in (b"/etc/shadow.ta", b"../../part.tar", b"a/../../../b.t"):
        assert len(hostile) == len(shard.name)
        path.write_bytes(path.read_bytes().replace(shard.name.encode(), hostile))
        with pytest.raises(ManifestError, match="outside the manifest's folder"):
            Manifest.open(path).shard_path(0)
        path.write_bytes(path.read_bytes().replace(hostile, shard.name.encode()))
