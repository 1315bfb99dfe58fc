"""One remote object, read through the cache: in pages, so that what one lane fetched serves every other.

Pages are aligned, so their names do not depend on order, lanes or world size. Each range of the network covers the
missing pages of a read and no more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from data_pipeline.errors import StaleError
from data_pipeline.storage.cache import Cache
from data_pipeline.storage.location import Url
from data_pipeline.storage.ranges import Range, coalesce, cut
from data_pipeline.storage.store import ObjectInfo

PAGE_BYTES = 1 << 20


class Fetches(Protocol):
    """The part of ``RemoteStore`` that is needed."""

    async def fetch(
        self, location: Url, ranges: Sequence[Range], expected: ObjectInfo | None = None
    ) -> tuple[list[bytes], ObjectInfo | None]:
        """Bytes and version."""
        ...


class RemoteObject:
    """Reads ranges of one object whose size and identity are known.

    Args:
        store: Where it lies.
        url: Its place.
        size: Bytes that it must have.
        identity: Digest of its content, or whatever else no other version of it has; names pages in the cache.
        cache: Keeps pages; None reads what is asked for and keeps nothing.
    """

    def __init__(self, store: Fetches, url: Url, size: int, identity: str, cache: Cache | None) -> None:
        self.url = url
        self.size = size
        self._store = store
        self._identity = identity
        self._cache = cache
        self._info: ObjectInfo | None = None

    async def read(self, ranges: Sequence[Range], *, fresh: bool = False) -> list[bytes]:
        """The bytes of each range, which lies inside the object.

        Args:
            ranges: Bytes of the object.
            fresh: Passes by the cache and renews what it holds there: for a caller who found the bytes wrong.

        Raises:
            StaleError: the object has another size, or was replaced since the first read.
            StorageError: it cannot be read.
        """
        if self._cache is None:
            return await self._fetch(ranges)
        numbers = sorted({n for a, b in ranges if b > a for n in range(a // PAGE_BYTES, -(-b // PAGE_BYTES))})
        # The disk, and the lock of a folder that many processes share, take a while: other requests go on meanwhile.
        pages = {} if fresh else await asyncio.to_thread(self._cached, numbers, self._cache)
        missing = coalesce([self._page(n) for n in numbers if n not in pages], 0, 2**62)
        for run, data in zip(missing, await self._fetch(missing), strict=True):
            for n in range(run.start // PAGE_BYTES, -(-run.end // PAGE_BYTES)):
                page = self._page(n)
                pages[n] = data[page.start - run.start : page.end - run.start]
                await asyncio.to_thread(self._cache.put, self._key(n), pages[n])
        return [_join(pages, Range(*wanted)) for wanted in ranges]

    def _cached(self, numbers: Sequence[int], cache: Cache) -> dict[int, bytes]:
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
                    "put the old object back, or renew index and manifest with `mmscale data index`"
                )
            self._info = info
        return answers


def _join(pages: dict[int, bytes], wanted: Range) -> bytes:
    if wanted.start == wanted.end:
        return b""
    first, last = wanted.start // PAGE_BYTES, (wanted.end - 1) // PAGE_BYTES
    if first == last:
        return cut([(Range(first * PAGE_BYTES, (first + 1) * PAGE_BYTES), pages[first])], wanted)
    joined = b"".join(pages[n] for n in range(first, last + 1))
    start = first * PAGE_BYTES
    return joined[wanted.start - start : wanted.end - start]
