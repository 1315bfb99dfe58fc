"""One S3 server for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from benchmarks.servers import KEY, SECRET, s3_server
from data_pipeline.storage.location import Url
from data_pipeline.storage.ranges import Range
from data_pipeline.storage.storage import Storage
from data_pipeline.storage.store import ObjectInfo


def read_ranges(storage: Storage, url: Url, ranges: Sequence[Range], expected: ObjectInfo | None = None) -> list[bytes]:
    """The bytes of each range of a remote object, as a loader fetches them."""
    fetched: list[bytes] = storage.background.run(storage.store(url).fetch(url, ranges, expected))[0]
    return fetched


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of a real S3 server on this machine."""
    with s3_server() as port:
        yield port


@pytest.fixture
def s3_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """The credentials of the server's only account, where a run looks for them."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
