"""Index tars in a bucket: read each tar once, and write its index next to it and a manifest of all.

Not for: local tars (``shards.index``, ``shards.manifest``), or HTTP servers, which are read-only here.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from data_pipeline.errors import AbsentError, DataConfigError
from data_pipeline.shards.index import ShardIndex, build_index, index_path, index_url
from data_pipeline.shards.manifest import Manifest, ShardEntry, write_entries
from data_pipeline.storage.location import Url
from data_pipeline.storage.storage import Storage


def tars_below(url: Url, storage: Storage) -> list[Url]:
    """Return ``[url]`` for a ``.tar``, or else all tars below the folder ``url``, sorted by name.

    Raises:
        DataConfigError: the folder contains no tars.
        StorageError: the server cannot list files, or failed.
    """
    if url.suffix == ".tar":
        return [url]
    found = [Url(str(name)) for name in storage.store(url).names(url) if str(name).endswith(".tar")]
    if not found:
        raise DataConfigError(f"{url}: contains no tars; name a folder of tars, or tars")
    return found


def index_remote(
    tars: Sequence[Url], manifest: Url | None, storage: Storage, indexed: Callable[[ShardIndex], None] | None = None
) -> tuple[int, Manifest | None]:
    """Index tars in a bucket, write each index next to its tar, and then write their manifest.

    Downloads one tar at a time to the folder for temporary files. Every write is atomic.

    Args:
        tars: The tars. Sample numbers follow their order.
        manifest: URL of the manifest to write; every tar must be in its folder or below. None writes no manifest.
        storage: Reads and writes the files.
        indexed: Called with each new index.

    Returns:
        Number of samples, and the manifest or None.

    Raises:
        DataConfigError: a tar is outside of the manifest's folder or twice in the manifest, or a URL is HTTP.
        ShardError: a tar is damaged; its index is not written.
        StorageError: reading or writing failed.
    """
    for url in (*tars, *([manifest] if manifest is not None else [])):
        if url.scheme in ("http", "https"):
            raise DataConfigError(
                f"{url}: cannot write an index to an HTTP server; index the tars on the machine that stores them"
            )
    names = _names(tars, manifest)
    entries = [_index(url, name, storage, indexed) for url, name in zip(tars, names, strict=True)]
    if manifest is None:
        return sum(entry.num_samples for entry in entries), None
    with tempfile.TemporaryDirectory(prefix="mmscale-") as folder:
        file = Path(folder) / "manifest"
        write_entries(file, entries)
        storage.store(manifest).write(manifest, file.read_bytes())
    return sum(entry.num_samples for entry in entries), Manifest.open(manifest, storage)


def _names(tars: Sequence[Url], manifest: Url | None) -> Iterable[str]:
    """Return the paths of the tars relative to the manifest's folder."""
    if manifest is None:
        return [tar.name for tar in tars]
    folder = f"{manifest.parent}/"
    outside = [tar for tar in tars if not tar.startswith(folder)]
    if outside:
        raise DataConfigError(f"{outside[0]}: is not below {folder}, the manifest's folder")
    return [tar[len(folder) :] for tar in tars]


def _index(url: Url, name: str, storage: Storage, indexed: Callable[[ShardIndex], None] | None) -> ShardEntry:
    with storage.downloaded(url) as file:
        index = build_index(file, display_name=str(url))
        storage.store(url).write(index_url(url), index_path(file).read_bytes())
        if indexed is not None:
            indexed(index)
    return ShardEntry(name, len(index), index.tar_bytes, index.tar_sha256)


@contextlib.contextmanager
def local_copy(tar: Url, storage: Storage) -> Iterator[Path]:
    """Download a tar, and its index if there is one, and yield the local path. The files are deleted on exit.

    Raises:
        AbsentError: there is no such tar.
        StorageError: the tar cannot be read, or the disk is full.
    """
    with storage.downloaded(tar) as file:
        with contextlib.suppress(AbsentError):
            index_path(file).write_bytes(b"".join(storage.store(tar).stream(index_url(tar))))
        yield file
