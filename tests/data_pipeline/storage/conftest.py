"""One S3 server for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.servers import KEY, SECRET, s3_server


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
