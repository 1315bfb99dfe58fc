"""Every ``bash s3`` block of docs/data.md runs as it stands, against a real S3 server on this machine.

The bucket ``my-bucket`` holds the tars that the page names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.servers import KEY, SECRET, s3_server
from data_pipeline.storage.config import StorageConfig
from data_pipeline.storage.location import Url
from data_pipeline.storage.storage import Storage
from tests.docs.conftest import paste

REPO = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"^```bash s3\n(.*?)^```", (REPO / "docs" / "data.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Fill the bucket and yield the environment variables of a shell that can read it."""
    with s3_server() as port, pytest.MonkeyPatch.context() as patch:
        settings = {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ALLOW_HTTP": "true",
        }
        for name, value in settings.items():
            patch.setenv(name, value)
        with Storage(StorageConfig(allow_http=True)) as storage:
            for tar in sorted((REPO / "examples" / "emoji" / "shards").glob("train-quick-*.tar")):
                url = Url(f"s3://my-bucket/pairs/{tar.name}")
                storage.store(url).write(url, tar.read_bytes())
        yield settings


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(environment: dict[str, str], checkout: Path) -> None:
    assert len(BLOCKS) >= 2
    for block in BLOCKS:
        paste(block, checkout, environment)
