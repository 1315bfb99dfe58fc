"""All remote access of one process: a store for each bucket or host, one cache, one budget of requests and memory."""

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
    """Opens objects by their location. Costs nothing before the first remote one.

    One per process, never shared through a fork. Close it, or leave that to the end of the process.

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
        """The one of this process that only the environment configures; for tools without a configuration file."""
        global _of_process
        if _of_process is None:
            _of_process = cls()
        return _of_process

    @property
    def background(self) -> Background:
        """Where this process's requests run."""
        return self._background

    @property
    def cache(self) -> Cache:
        """The cache folder, made at the first use.

        Raises:
            StorageError: it cannot be used.
        """
        if self._cache is None:
            self._cache = Cache(self._cache_config)
        return self._cache

    @property
    def num_requests(self) -> int:
        """Requests sent so far, repeated ones included."""
        return sum(store.num_requests for store in self._stores.values())

    def store(self, location: Path | Url) -> Store:
        """The store that serves a location.

        Raises:
            DataConfigError: the extra ``remote`` is not installed.
            StorageError: a setting or a credential of the environment cannot work.
        """
        return self._remote(location) if isinstance(location, Url) else LocalStore()

    def _remote(self, url: Url) -> RemoteStore:
        if url.root not in self._stores:
            self._stores[url.root] = RemoteStore(url.root, self.config, self._background, self._limit)
        return self._stores[url.root]

    def remote_object(self, url: Url, size: int, identity: str) -> RemoteObject:
        """An object to be read in parts.

        Args:
            url: Its place.
            size: Bytes that it must have.
            identity: Digest of its content.
        """
        cache = self.cache if self._cache_config.keep is Keep.ALL else None
        return RemoteObject(self._remote(url), url, size, identity, cache)

    async def whole(self, url: Url, identity: str | None = None) -> Path:
        """A whole object as a file of the cache, to be mapped.

        Args:
            url: The object.
            identity: What tells this version from others; None asks the server for its version.

        Raises:
            StorageError: it cannot be read, or the cache has no room for it.
        """
        store = self._remote(url)
        info: ObjectInfo | None = None
        if identity is None:
            info = await store.stat_async(url)
            identity = f"{info.etag} {info.size}"
        key = f"{url} {identity} whole"
        while (path := self.cache.check(key)) is None:
            claim = self.cache.try_single(key)
            if claim is None:
                await asyncio.sleep(_CLAIM_SECONDS)  # Another process fetches it.
                continue
            with claim:
                if (path := self.cache.check(key)) is not None:
                    break
                await self._fetch_whole(store, url, info, key)
        return path

    async def mapped(self, url: Url, use: Callable[[Path], R], identity: str | None = None) -> R:
        """What ``use`` makes of ``whole``, fetched again if it left the cache before ``use`` had opened it.

        Args:
            url: The object.
            use: Opens and maps the file; a file that is open stays readable whatever becomes of the cache.
            identity: As for ``whole``.

        Raises:
            StorageError: as ``whole``, or the cache is far too small for all that share it.
            DataPipelineError: what ``use`` raises of a file that is there.
        """
        for _ in range(_MAP_ATTEMPTS):
            path = await self.whole(url, identity)
            try:
                return use(path)
            except DataPipelineError:
                if path.exists():
                    raise
        raise StorageError(
            f"{url}: other processes pushed it out of the cache {self.cache.folder} {_MAP_ATTEMPTS} times before it "
            f"was opened; raise data.cache.max_bytes ({self.cache.config.max_bytes})"
        )

    async def _fetch_whole(self, store: RemoteStore, url: Url, info: ObjectInfo | None, key: str) -> None:
        with self.cache.entry(key) as entry:
            async for piece in store.chunks(url, info):
                entry.write(piece)
        if not entry.is_stored:
            raise StorageError(
                f"{url}: its {entry.size} bytes do not fit into the cache {self.cache.folder} "
                f"(data.cache.max_bytes={self.cache.config.max_bytes}, or the disk is full)"
            )

    def forget(self, url: Url, identity: str) -> None:
        """Drops a whole object from the cache, since its content is of no use."""
        self.cache.drop(f"{url} {identity} whole")

    @contextlib.contextmanager
    def downloaded(self, url: Url) -> Iterator[Path]:
        """A whole object as a file that lasts as long as the block, outside of the cache's budget.

        Raises:
            StorageError: it cannot be read, or the disk is full.
        """
        with tempfile.TemporaryDirectory(prefix="mmscale-") as folder:
            path = Path(folder) / url.name
            try:
                with path.open("wb") as file:
                    for chunk in self._remote(url).stream(url):
                        file.write(chunk)
            except OSError as error:
                raise StorageError(
                    f"{url}: cannot be stored in {folder} ({error.strerror}); TMPDIR names another disk"
                ) from error
            yield path

    def close(self) -> None:
        """Ends what is under way. Idempotent."""
        self._background.close()

    def __enter__(self) -> Storage:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
