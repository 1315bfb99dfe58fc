"""Indexes and a manifest for tars that lie in a bucket: each is read once, what was found is written beside it.

Not for: tars of this machine (``index``, ``manifest``), HTTP servers, which take no files.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from data_pipeline.errors import AbsentError, DataConfigError
from data_pipeline.shards.index import ShardIndex, build_index, index_path, index_url
from data_pipeline.shards.manifest import Entry, Manifest, write_entries
from data_pipeline.storage.location import Url
from data_pipeline.storage.storage import Storage


def tars_below(url: Url, storage: Storage) -> list[Url]:
    """A tar itself; of anything else, a folder, all tars below it in order of their names.

    Raises:
        DataConfigError: there are none.
        StorageError: the server lists nothing, or failed.
    """
    if url.suffix == ".tar":
        return [url]
    found = [Url(str(name)) for name in storage.store(url).names(url) if str(name).endswith(".tar")]
    if not found:
        raise DataConfigError(f"{url}: no tars below it; name a folder of tars, or tars")
    return found


def index_remote(
    tars: Sequence[Url], manifest: Url | None, storage: Storage, indexed: Callable[[ShardIndex], None] | None = None
) -> tuple[int, Manifest | None]:
    """Indexes tars of a bucket and writes the indexes beside them; then, if asked for, their manifest.

    One tar at a time lies on the disk for temporary files. Everything written is whole or absent.

    Args:
        tars: The tars, in the order that sample numbers follow.
        manifest: Where the manifest goes; the tars lie in its folder or below.
        storage: Reads and writes.
        indexed: Called with each new index.

    Returns:
        Number of samples, and the manifest.

    Raises:
        DataConfigError: a tar lies outside of the manifest's folder, or comes twice, or on a server without writing.
        ShardError: a tar is damaged; its index is not written.
        StorageError: reading or writing failed.
    """
    for url in (*tars, *([manifest] if manifest is not None else [])):
        if url.scheme in ("http", "https"):
            raise DataConfigError(f"{url}: an HTTP server takes no files; index the tars where they are written")
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
    """Names of the tars relative to the manifest's folder."""
    if manifest is None:
        return [tar.name for tar in tars]
    folder = f"{manifest.parent}/"
    outside = [tar for tar in tars if not tar.startswith(folder)]
    if outside:
        raise DataConfigError(f"{outside[0]} does not lie below {folder}, the manifest's folder")
    return [tar[len(folder) :] for tar in tars]


def _index(url: Url, name: str, storage: Storage, indexed: Callable[[ShardIndex], None] | None) -> Entry:
    with storage.downloaded(url) as file:
        index = build_index(file, shown=str(url))
        storage.store(url).write(index_url(url), index_path(file).read_bytes())
        if indexed is not None:
            indexed(index)
    return Entry(name, len(index), index.tar_bytes, index.tar_sha256)


@contextlib.contextmanager
def local_copy(tar: Url, storage: Storage) -> Iterator[Path]:
    """A tar as a file that lasts as long as the block, its index beside it if there is one.

    Raises:
        AbsentError: there is no such tar.
        StorageError: it cannot be read, or the disk is full.
    """
    with storage.downloaded(tar) as file:
        with contextlib.suppress(AbsentError):
            index_path(file).write_bytes(b"".join(storage.store(tar).stream(index_url(tar))))
        yield file
