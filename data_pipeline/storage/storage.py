"""Remote access of one process: a store per bucket or host, one cache, and shared limits on requests and memory."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from data_pipeline.errors import DataPipelineError, StorageError
from data_pipeline.storage.background import Background
from data_pipeline.storage.cache import Cache
from data_pipeline.storage.config import CacheConfig, Keep, StorageConfig
from data_pipeline.storage.location import Url
from data_pipeline.storage.objects import RemoteObject
from data_pipeline.storage.read_ahead import ReadAhead
from data_pipeline.storage.remote import RemoteStore
from data_pipeline.storage.store import LocalStore, ObjectInfo, Store

R = TypeVar("R")

_CLAIM_SECONDS = 0.05
_MAP_ATTEMPTS = 8
_of_process: Storage | None = None


class Storage:
    """Opens objects by their location. Connections, thread and cache are created at the first remote access.

    Use one instance per process, and do not use it in a forked child. ``close`` is optional at the end of the process.

    Args:
        config: ``data.storage``.
        cache: ``data.cache``.
    """

    def __init__(self, config: StorageConfig | None = None, cache: CacheConfig | None = None) -> None:
        self.config = config if config is not None else StorageConfig()
        self._cache_config = cache if cache is not None else CacheConfig()
        self._cache: Cache | None = None
        self._background = Background()
        self._limit = asyncio.Semaphore(self.config.max_concurrency)
        self._stores: dict[str, RemoteStore] = {}
        self.read_ahead = ReadAhead(self._background, self.config.read_ahead_bytes)

    @classmethod
    def of_process(cls) -> Storage:
        """Return this process's shared instance with default settings, for tools without a configuration file."""
        global _of_process
        if _of_process is None:
            _of_process = cls()
        return _of_process

    @property
    def background(self) -> Background:
        """The event loop thread that runs this instance's requests."""
        return self._background

    @property
    def cache(self) -> Cache:
        """The disk cache; its folder is created at the first access.

        Raises:
            StorageError: the folder cannot be used.
        """
        if self._cache is None:
            self._cache = Cache(self._cache_config)
        return self._cache

    @property
    def num_requests(self) -> int:
        """Requests sent so far, including retries."""
        return sum(store.num_requests for store in self._stores.values())

    def store(self, location: Path | Url) -> Store:
        """Return the store that serves a location.

        Raises:
            DataConfigError: the extra ``remote`` is not installed.
            StorageError: ``obstore`` rejects the settings or the credentials.
        """
        return self._remote(location) if isinstance(location, Url) else LocalStore()

    def _remote(self, url: Url) -> RemoteStore:
        if url.root not in self._stores:
            self._stores[url.root] = RemoteStore(url.root, self.config, self._background, self._limit)
        return self._stores[url.root]

    def remote_object(self, url: Url, size: int, identity: str) -> RemoteObject:
        """Return an object for reading byte ranges. Pages are cached if ``data.cache.keep`` is ``all``.

        Args:
            url: URL of the object.
            size: Expected size in bytes.
            identity: Digest of its content.
        """
        cache = self.cache if self._cache_config.keep is Keep.ALL else None
        return RemoteObject(self._remote(url), url, size, identity, cache)

    async def cached_file(self, url: Url, identity: str | None = None) -> Path:
        """Return the path of a whole object in the cache, which is fetched first if it is absent.

        Args:
            url: The object.
            identity: A string that is unique to the expected version. None asks the server for the current version.

        Raises:
            StorageError: the object cannot be read, or does not fit into the cache.
        """
        store = self._remote(url)
        info: ObjectInfo | None = None
        if identity is None:
            info = await store.stat_async(url)
            identity = f"{info.etag} {info.size}"
        key = f"{url} {identity} whole"
        while (path := self.cache.check(key)) is None:
            claim = self.cache.try_claim(key)
            if claim is None:
                await asyncio.sleep(_CLAIM_SECONDS)  # Another process or task is fetching it.
                continue
            with claim:
                if (path := self.cache.check(key)) is not None:
                    break
                await self._fetch_whole(store, url, info, key)
        return path

    async def map_cached(self, url: Url, open_file: Callable[[Path], R], identity: str | None = None) -> R:
        """Return ``open_file(path)`` for the ``cached_file``. Retry if the file is evicted before it is opened.

        Args:
            url: The object.
            open_file: Opens and maps the file. A mapped file stays readable after its eviction.
            identity: As for ``cached_file``.

        Raises:
            StorageError: as ``cached_file``, or the cache is too small for the processes that share it.
            DataPipelineError: raised by ``open_file`` although the file exists.
        """
        for _ in range(_MAP_ATTEMPTS):
            path = await self.cached_file(url, identity)
            try:
                return open_file(path)
            except DataPipelineError:
                if path.exists():
                    raise
        raise StorageError(
            f"{url}: it was evicted from the cache {self.cache.folder} {_MAP_ATTEMPTS} times before it was opened; "
            f"raise data.cache.max_bytes ({self.cache.config.max_bytes})"
        )

    async def _fetch_whole(self, store: RemoteStore, url: Url, info: ObjectInfo | None, key: str) -> None:
        with self.cache.entry(key) as entry:
            async for chunk in store.chunks(url, info):
                entry.write(chunk)
        if not entry.is_stored:
            raise StorageError(
                f"{url}: its {entry.size} bytes do not fit into the cache {self.cache.folder} "
                f"(data.cache.max_bytes={self.cache.config.max_bytes}, or the disk is full)"
            )

    def forget(self, url: Url, identity: str) -> None:
        """Delete a whole object from the cache, because its content is unusable."""
        self.cache.drop(f"{url} {identity} whole")

    @contextlib.contextmanager
    def downloaded(self, url: Url) -> Iterator[Path]:
        """Download a whole object to a temporary file outside the cache, which is deleted at the end of the block.

        Raises:
            StorageError: the object cannot be read, or the disk is full.
        """
        with tempfile.TemporaryDirectory(prefix="mmscale-") as folder:
            path = Path(folder) / url.name
            try:
                with path.open("wb") as file:
                    for chunk in self._remote(url).stream(url):
                        file.write(chunk)
            except OSError as error:
                raise StorageError(
                    f"{url}: cannot be stored in {folder} ({error.strerror}); set TMPDIR to a folder on another disk"
                ) from error
            yield path

    def close(self) -> None:
        """Cancel running requests. Idempotent."""
        self._background.close()

    def __enter__(self) -> Storage:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
