"""Read byte ranges of one remote object through the disk cache.

The cache stores pages of 1 MiB at aligned offsets. Their keys do not depend on order, lanes or world size, so a page
that one lane fetched serves all others. A read fetches only the pages that the cache lacks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from data_pipeline.errors import StaleError
from data_pipeline.storage.cache import Cache
from data_pipeline.storage.location import Url
from data_pipeline.storage.ranges import Range, coalesce, extract
from data_pipeline.storage.store import ObjectInfo

PAGE_BYTES = 1 << 20


class Fetcher(Protocol):
    """The part of ``RemoteStore`` that ``RemoteObject`` uses."""

    async def fetch(
        self, location: Url, ranges: Sequence[Range], expected: ObjectInfo | None = None
    ) -> tuple[list[bytes], ObjectInfo | None]:
        """As ``RemoteStore.fetch``."""
        ...


class RemoteObject:
    """Reads ranges of one object whose size and identity are known.

    Args:
        store: The store that serves the object.
        url: URL of the object.
        size: Expected size in bytes.
        identity: Digest of the content, or another string that is unique to this version. Part of each cache key.
        cache: Stores pages. None reads the requested ranges without a cache.
    """

    def __init__(self, store: Fetcher, url: Url, size: int, identity: str, cache: Cache | None) -> None:
        self.url = url
        self.size = size
        self._store = store
        self._identity = identity
        self._cache = cache
        self._info: ObjectInfo | None = None

    async def read(self, ranges: Sequence[Range], *, fresh: bool = False) -> list[bytes]:
        """Return the bytes of each range, in order.

        Args:
            ranges: Ranges inside the object. Not checked.
            fresh: Ignore cached pages and overwrite them, for a caller whose checksum did not match.

        Raises:
            StaleError: the object does not have the expected size, or was replaced since the first read.
            StorageError: the object cannot be read.
        """
        if self._cache is None:
            return await self._fetch(ranges)
        numbers = sorted({n for a, b in ranges if b > a for n in range(a // PAGE_BYTES, -(-b // PAGE_BYTES))})
        # The disk and the lock of the shared folder can block, so use a thread: other requests continue meanwhile.
        pages = {} if fresh else await asyncio.to_thread(self._read_cached, numbers, self._cache)
        missing = coalesce([self._page(n) for n in numbers if n not in pages], 0, 2**62)
        for run, data in zip(missing, await self._fetch(missing), strict=True):
            for n in range(run.start // PAGE_BYTES, -(-run.end // PAGE_BYTES)):
                page = self._page(n)
                pages[n] = data[page.start - run.start : page.end - run.start]
                await asyncio.to_thread(self._cache.put, self._key(n), pages[n])
        return [_bytes_of(pages, Range(*wanted)) for wanted in ranges]

    def _read_cached(self, numbers: Sequence[int], cache: Cache) -> dict[int, bytes]:
        found = {n: cache.get(self._key(n)) for n in numbers}
        return {n: page for n, page in found.items() if page is not None and len(page) == self._page(n).size}

    def _page(self, number: int) -> Range:
        return Range(number * PAGE_BYTES, min(self.size, (number + 1) * PAGE_BYTES))

    def _key(self, number: int) -> str:
        return f"{self.url} {self._identity} {PAGE_BYTES} {number}"

    async def _fetch(self, ranges: Sequence[Range]) -> list[bytes]:
        if not ranges:
            return []
        answers, info = await self._store.fetch(self.url, ranges, self._info)
        if info is not None and self._info is None:
            if info.size != self.size:
                raise StaleError(
                    f"{self.url}: has {info.size} bytes, {self.size} when it was indexed: it was replaced or cut; "
                    "put the old object back, or update index and manifest with `mmscale data index`"
                )
            self._info = info
        return answers


def _bytes_of(pages: dict[int, bytes], wanted: Range) -> bytes:
    if wanted.start == wanted.end:
        return b""
    first, last = wanted.start // PAGE_BYTES, (wanted.end - 1) // PAGE_BYTES
    if first == last:
        return extract([(Range(first * PAGE_BYTES, (first + 1) * PAGE_BYTES), pages[first])], wanted)
    joined = b"".join(pages[n] for n in range(first, last + 1))
    start = first * PAGE_BYTES
    return joined[wanted.start - start : wanted.end - start]
