"""Tools on a bucket: remote indexing, verification, and errors of commands that need local files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.errors import AbsentError, DataConfigError, ManifestError, ShardError
from data_pipeline.prepare.export import export
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.remote_index import index_remote, tars_below
from data_pipeline.prepare.sources import open_source
from data_pipeline.prepare.tokenizer_training import iterate_texts
from data_pipeline.prepare.verify import jobs_of, verify
from data_pipeline.shards.damage import Problem
from data_pipeline.shards.index import index_path
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.storage.config import CacheConfig, StorageConfig
from data_pipeline.storage.location import Url, parse_location
from data_pipeline.storage.storage import Storage
from tests.data_pipeline.conftest import WriteSet, captioned

pytestmark = pytest.mark.usefixtures("s3_account")


@pytest.fixture
def storage(s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """Replace the process's storage by one for the S3 server."""
    config = StorageConfig(endpoint=f"http://127.0.0.1:{s3_port}", allow_http=True)
    with Storage(config, CacheConfig(folder=tmp_path / "cache")) as opened:
        monkeypatch.setattr(Storage, "of_process", lambda: opened)
        yield opened


@pytest.fixture
def local(write_set: WriteSet) -> Path:
    """A local data set of four shards."""
    return write_set("set", [captioned(i) for i in range(45)])


@pytest.fixture
def folder(local: Path, storage: Storage, tmp_path: Path) -> Url:
    """Upload the tars of ``local`` to a bucket, without indexes and manifest."""
    url = Url(f"s3://tools/{tmp_path.name}/a folder")
    for tar in sorted(local.parent.glob("*.tar")):
        storage.store(url).write(url.child(tar.name), tar.read_bytes())
    return url


def content(storage: Storage, url: Url) -> bytes:
    return b"".join(storage.store(url).stream(url))


@pytest.mark.long
def test_indexing_in_a_bucket_writes_the_bytes_that_indexing_on_a_disk_writes(
    local: Path, folder: Url, storage: Storage
) -> None:
    tars = tars_below(folder, storage)
    assert [tar.name for tar in tars] == [f"part-{i:05d}.tar" for i in range(4)]
    num_samples, written = index_remote(tars, folder.child("set.manifest"), storage)
    assert num_samples == 45
    assert content(storage, folder.child("set.manifest")) == local.read_bytes()
    for tar in tars:
        assert content(storage, Url(f"{tar}.index")) == index_path(local.parent / tar.name).read_bytes()
    assert written is not None
    assert written.fingerprint == Manifest.open(local).fingerprint

    folded = Path(f"{folder}/set.manifest")  # As from a command line, which converts it to a ``Path``.
    plain = list(read_samples(local))
    assert [s.parts for s in read_samples(folded)] == [s.parts for s in plain]
    assert list(iterate_texts(Manifest.open(folded))) == list(iterate_texts(Manifest.open(local)))


def test_tars_without_an_index_are_named_with_the_command_that_makes_it(
    local: Path, folder: Url, storage: Storage
) -> None:
    manifest = folder.child("set.manifest")
    storage.store(manifest).write(manifest, local.read_bytes())
    with pytest.raises(
        ManifestError, match=rf"{folder}/part-00000.tar has no index; .*data index --manifest {manifest}"
    ):
        next(read_samples(manifest))
    index_remote([Manifest.open(manifest).shard_location(n) for n in range(4)], manifest, storage)
    assert sum(1 for _ in read_samples(manifest)) == 45


def test_verify_names_the_place_in_the_bucket(local: Path, folder: Url, storage: Storage) -> None:
    manifest = folder.child("set.manifest")
    index_remote(tars_below(folder, storage), manifest, storage)
    count, jobs = jobs_of(manifest)
    assert (count, [report.damages for report in verify(jobs)]) == (4, [[], [], [], []])

    tar = folder.child("part-00001.tar")
    data = bytearray(content(storage, tar))
    data[data.index(b"IDAT") + 6] ^= 1
    storage.store(tar).write(tar, bytes(data))
    reports = list(verify(jobs_of(manifest)[1]))
    assert [bool(report.damages) for report in reports] == [False, True, False, False]
    assert {(d.shard, d.key) for d in reports[1].damages if d.problem is Problem.CHECKSUM} == {(tar, "000013")}
    (missing,) = verify(jobs_of(folder.child("gone.tar"))[1])
    assert [(d.shard, d.problem) for d in missing.damages] == [(folder.child("gone.tar"), Problem.SHARD)]


def test_what_cannot_be_indexed_is_named_and_gets_no_index(folder: Url, storage: Storage) -> None:
    bad = folder.child("bad.tar")
    storage.store(bad).write(bad, b"no tar at all" * 100)
    with pytest.raises(ShardError, match=r"s3://tools/.*/bad.tar"):
        index_remote([bad], None, storage)
    with pytest.raises(AbsentError):
        content(storage, Url(f"{bad}.index"))
    with pytest.raises(DataConfigError, match="contains no tars"):
        tars_below(folder.child("nothing"), storage)
    with pytest.raises(DataConfigError, match="is not below"):
        index_remote([bad], Url("s3://tools/elsewhere/x.manifest"), storage)
    with pytest.raises(DataConfigError, match="cannot write an index to an HTTP server"):
        index_remote([Url("http://127.0.0.1/x.tar")], None, storage)


def test_what_works_on_files_says_so(folder: Url, storage: Storage, local: Path, tmp_path: Path) -> None:
    index_remote(tars_below(folder, storage), folder.child("set.manifest"), storage)
    remote = Path(folder.child("set.manifest"))
    with pytest.raises(DataConfigError, match=r"s3://tools/.*: ingest reads local files only"):
        open_source(remote)
    with pytest.raises(DataConfigError, match=r"s3://tools/out: ingest writes local files only"):
        ingest(local.parent, "s3://tools/out", "x")
    with pytest.raises(DataConfigError, match="export writes local files only"):
        export(local, Path("s3://tools/out"))
    with pytest.raises(DataConfigError, match=r"copy .* to a disk first"):
        export(remote, tmp_path / "out")
    assert parse_location(Path("s3://tools/x")) == Url("s3://tools/x")
