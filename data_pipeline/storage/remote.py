"""Objects on HTTP servers, S3, Google Cloud Storage and Azure, read through ``obstore``.

Every read is a range request of bounded size, so a failed response costs only one request. After the first response,
requests demand the same version of the object, so a replaced object is detected. ``obstore``'s own retries are
disabled: they do not cover an incomplete body, and treat missing credentials like a temporary failure.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from data_pipeline.errors import AbsentError, DataConfigError, StaleError, StorageError
from data_pipeline.storage.background import Background
from data_pipeline.storage.config import StorageConfig
from data_pipeline.storage.location import Url
from data_pipeline.storage.ranges import Range, coalesce, extract, split
from data_pipeline.storage.retry import Retry, TransientError
from data_pipeline.storage.store import STREAM_CHUNK_BYTES, ObjectInfo

_STATUS = re.compile(r"status code: (\d{3})")
_TRANSIENT_STATUSES = frozenset({408, 425, 429})
_METADATA_SERVICE = "169.254.169.254"
_ALLOW_HTTP = "AWS_ALLOW_HTTP"
_TO_CHECK = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN (or the machine's role), the bucket, "
    "its region (data.storage.region or AWS_REGION) and the endpoint (data.storage.endpoint or AWS_ENDPOINT_URL)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT, and the bucket",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, and the container",
    "http": "the address, and that the server lets this machine read it",
}


class RemoteStore:
    """Objects of one bucket or host.

    Args:
        root: ``Url.root``: scheme and bucket or host.
        config: Timeouts and limits.
        background: Runs the requests.
        limit: Bounds the simultaneous requests of the process.
    """

    def __init__(self, root: str, config: StorageConfig, background: Background, limit: asyncio.Semaphore) -> None:
        self._root = root
        self._config = config
        self._background = background
        self._limit = limit
        self._store = _open_store(root, config)
        self._retry = Retry(config.retry_seconds)
        self._has_succeeded = False
        self.num_requests = 0
        """Requests sent so far, including retries."""

    def stat(self, location: Any) -> ObjectInfo:
        """As ``Store.stat``."""
        return self._background.run(self.stat_async(location))

    async def stat_async(self, location: Url) -> ObjectInfo:
        """Coroutine form of ``stat``."""
        return await self._retry.run(lambda: self._stat(location), str(location))

    async def fetch(
        self, location: Url, ranges: Sequence[Range], expected: ObjectInfo | None = None
    ) -> tuple[list[bytes], ObjectInfo | None]:
        """Return the bytes of each range in the order of ``ranges``, and the version read.

        Args:
            location: The object.
            ranges: Ranges inside the object.
            expected: The version that the object must have. None accepts any, but all ranges must have the same. It is
                returned unchanged if all ranges are empty, because no request is sent then.

        Raises:
            StaleError: the object does not have the expected version.
            StorageError: the object is absent or too short, the server rejects the request, or it failed for too long.
        """
        merged = coalesce(ranges, self._config.gap_bytes, self._config.request_bytes)
        parts = [part for one in merged for part in split(one, self._config.request_bytes)]
        if expected is None and len(parts) > 1:  # The first response sets the version for the others.
            first, expected = await self._range(location, parts[0], None)
            answers = [(first, expected), *await self._ranges(location, parts[1:], expected)]
        else:
            answers = await self._ranges(location, parts, expected)
        data = iter(answer for answer, _ in answers)
        blocks = []
        for one in merged:
            count = len(split(one, self._config.request_bytes))
            blocks.append((one, next(data) if count == 1 else b"".join(next(data) for _ in range(count))))
        return [extract(blocks, Range(*wanted)) for wanted in ranges], answers[0][1] if answers else expected

    async def chunks(self, location: Url, expected: ObjectInfo | None = None) -> AsyncIterator[bytes]:
        """Yield a whole object sequentially, in chunks of ``request_bytes``. A small object takes one request.

        Raises:
            As ``fetch``.
        """
        size = self._config.request_bytes
        data, info = await self._range(location, Range(0, size), expected, to_end=True)
        yield data
        for part in split(Range(len(data), info.size), size) if len(data) < info.size else []:
            yield (await self._range(location, part, info))[0]

    async def _ranges(
        self, location: Url, parts: Sequence[Range], expected: ObjectInfo | None
    ) -> list[tuple[bytes, ObjectInfo]]:
        tasks = [asyncio.ensure_future(self._range(location, part, expected)) for part in parts]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:  # One request failed, so the call raises: cancel the others.
                task.cancel()
            raise

    async def _range(
        self, location: Url, part: Range, expected: ObjectInfo | None, *, to_end: bool = False
    ) -> tuple[bytes, ObjectInfo]:
        what = f"{location} bytes {part.start}-{part.end}"
        return await self._retry.run(lambda: self._get(location, part, expected, to_end), what)

    async def _get(
        self, location: Url, part: Range, expected: ObjectInfo | None, to_end: bool
    ) -> tuple[bytes, ObjectInfo]:
        import obstore

        options: Any = {"range": tuple(part)}
        # By the HTTP standard, a weak etag never matches; its version is compared below.
        if expected is not None and expected.etag.startswith('"'):
            options["if_match"] = expected.etag
        async with self._request(location):
            answer = await obstore.get_async(self._store, location.key, options=options)
            info, (first, end) = _info_of(answer.meta), answer.range
            if expected is not None and info != expected:
                raise StaleError(_stale(location, expected, info))
            if to_end:
                part = Range(part.start, min(part.end, info.size))
            if (first, end) != part:
                raise AbsentError(f"{location}: has {info.size} bytes, bytes {part.start}-{part.end} were requested")
            data = bytes(await answer.bytes_async())
        if len(data) != part.size:
            raise TransientError(f"the answer ends after {len(data)} of {part.size} bytes")
        return data, info

    async def _stat(self, location: Url) -> ObjectInfo:
        import obstore

        async with self._request(location):
            return _info_of(await obstore.head_async(self._store, location.key))

    def stream(self, location: Any, expected: ObjectInfo | None = None) -> Iterator[bytes]:
        """As ``Store.stream``. The next chunk is fetched while the caller uses the current one."""
        info = expected if expected is not None else self.stat(location)
        parts = [Range(at, min(at + STREAM_CHUNK_BYTES, info.size)) for at in range(0, info.size, STREAM_CHUNK_BYTES)]
        pending = None
        try:
            for part in [*parts, None]:
                ready = pending
                pending = None if part is None else self._background.start(self._range(location, part, info))
                if ready is not None:
                    yield ready.result()[0]
        finally:
            if pending is not None:
                pending.cancel()

    def names(self, folder: Any) -> Iterator[Url]:
        """As ``Store.names``. Raises for HTTP servers, which cannot list objects."""
        if folder.scheme in ("http", "https"):
            raise StorageError(f"{folder}: an HTTP server cannot list objects; name each tar")
        found = self._background.run(self._retry.run(lambda: self._list(folder), str(folder)))
        yield from (Url(f"{self._root}/{name}") for name in sorted(found))

    async def _list(self, folder: Url) -> list[str]:
        import obstore

        names: list[str] = []
        async with self._request(folder):
            async for batch in obstore.list(self._store, folder.path.rstrip("/") + "/" if folder.path else None):
                names += [meta["path"] for meta in batch]
        return names

    def write(self, location: Any, data: bytes) -> None:
        """As ``Store.write``. Raises for HTTP servers. Object stores publish only complete objects."""
        if location.scheme in ("http", "https"):
            raise StorageError(f"{location}: cannot write to an HTTP server; write to a folder or a bucket")
        self._background.run(self._retry.run(lambda: self._put(location, data), str(location)))

    async def _put(self, location: Url, data: bytes) -> None:
        import obstore

        async with self._request(location):
            await obstore.put_async(self._store, location.key, data)

    @asynccontextmanager
    async def _request(self, location: Url) -> AsyncIterator[None]:
        """Wait for a request slot, count the request, and convert its exceptions to those of ``errors``."""
        from obstore import exceptions

        async with self._limit:
            self.num_requests += 1
            try:
                yield
            except FileNotFoundError as error:
                raise AbsentError(f"{location}: there is no such object; check bucket, path and endpoint") from error
            except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, PermissionError) as error:
                raise StorageError(f"{location}: access denied; check {_to_check(location)}") from error
            except exceptions.PreconditionError as error:
                raise StaleError(_stale(location)) from error
            except exceptions.NotSupportedError as error:
                raise StorageError(
                    f"{location}: this server sends no byte ranges (a plain `python -m http.server` does not); "
                    "use one that does, or copy the shards to a disk"
                ) from error
            except exceptions.BaseError as error:
                raise self._failure(location, str(error)) from error
            self._has_succeeded = True

    def _failure(self, location: Url, text: str) -> Exception:
        reason = text.partition("\n")[0].removeprefix("Generic ")
        status = _STATUS.search(reason)
        number = int(status[1]) if status else 0
        if _METADATA_SERVICE in text and not self._has_succeeded:
            return StorageError(f"{location}: no credentials were found; set or check {_to_check(location)}")
        if "without LOCATION" in reason or number in range(300, 400):
            return StorageError(f"{location}: the server redirects the request; check {_to_check(location)} ({reason})")
        if "not allowed" in reason or "builder error" in text:
            remedy = f"for an endpoint without encryption set data.storage.allow_http or {_ALLOW_HTTP}=true"
            return StorageError(f"{location}: {reason}; {remedy}")
        if number == 416:
            return AbsentError(
                f"{location}: ends before the requested bytes; check that it is the shard that was indexed"
            )
        if number and number < 500 and number not in _TRANSIENT_STATUSES:
            return StorageError(f"{location}: the server rejected the request; check {_to_check(location)} ({reason})")
        return TransientError(reason)


def _info_of(meta: Any) -> ObjectInfo:
    changed = meta["last_modified"].timestamp()
    return ObjectInfo(meta["size"], meta["e_tag"] or (f"{changed:.0f}" if changed else ""))


def _stale(location: Url, expected: ObjectInfo | None = None, found: ObjectInfo | None = None) -> str:
    seen = "" if expected is None or found is None else (
        f" ({expected.size} bytes {expected.etag} before, {found.size} bytes {found.etag} now)"
    )  # fmt: skip
    return (
        f"{location}: was replaced while it was read{seen}; put the old object back, "
        f"or update its index and manifest with `mmscale data index` and start a new run"
    )


def _to_check(location: Url) -> str:
    return _TO_CHECK[location.scheme.removesuffix("s") if location.scheme == "https" else location.scheme]


def _open_store(root: str, config: StorageConfig) -> Any:
    try:
        from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store
    except ImportError as error:
        raise DataConfigError(
            f"{root}: reading it requires the extra `remote`: pip install 'mmscale[remote]'"
        ) from error
    scheme, _, name = root.partition("://")
    options: Any = {"timeout": f"{max(1, round(config.timeout_seconds * 1000))}ms"}
    options["connect_timeout"] = options["timeout"]
    no_retries: Any = {"max_retries": 0}
    if config.allow_http or scheme == "http" or os.environ.get(_ALLOW_HTTP, "").lower() in ("1", "true"):
        options["allow_http"] = True
    try:
        if scheme == "s3":
            named = {"endpoint": config.endpoint, "region": config.region}
            chosen: Any = {key: value for key, value in named.items() if value is not None}
            return S3Store(name, config=chosen, client_options=options, retry_config=no_retries)
        if scheme == "gs":
            return GCSStore(name, client_options=options, retry_config=no_retries)
        if scheme == "az":
            return AzureStore(name, client_options=options, retry_config=no_retries)
        return HTTPStore(root, client_options=options, retry_config=no_retries)
    except Exception as error:  # obstore raises several exception classes for wrong settings.
        raise StorageError(f"{root}: cannot be opened: {str(error).partition(chr(10))[0]}") from error
