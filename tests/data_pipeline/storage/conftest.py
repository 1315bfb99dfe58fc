"""One S3 server per test session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from benchmarks.servers import KEY, SECRET, s3_server
from data_pipeline.storage.location import Url
from data_pipeline.storage.ranges import Range
from data_pipeline.storage.storage import Storage
from data_pipeline.storage.store import ObjectInfo


def read_ranges(storage: Storage, url: Url, ranges: Sequence[Range], expected: ObjectInfo | None = None) -> list[bytes]:
    """Return the bytes of each range of a remote object, fetched in the same way as by the loader."""
    fetched: list[bytes] = storage.background.run(storage.store(url).fetch(url, ranges, expected))[0]
    return fetched


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of a local S3 server."""
    with s3_server() as port:
        yield port


@pytest.fixture
def s3_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment variables with the credentials of the server's only account."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
