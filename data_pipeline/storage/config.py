"""Configuration of remote data: ``data.storage`` and ``data.cache``. It contains no credentials."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path

from pydantic import Field

from data_pipeline.io.strict import StrictConfig

CACHE_VARIABLE = "MMSCALE_CACHE"


class StorageConfig(StrictConfig):
    """How remote objects are read. No key changes the content of a batch.

    Credentials come from environment variables (``AWS_ACCESS_KEY_ID`` and others), web identity or instance roles.
    """

    endpoint: str | None = Field(default=None, pattern=r"^https?://[^/@]+(/.*)?$")
    """URL of an S3-compatible server. null uses ``AWS_ENDPOINT_URL``, else Amazon S3."""
    region: str | None = None
    """Region of the S3 buckets. null uses ``AWS_REGION``."""
    allow_http: bool = False
    """Allow an unencrypted S3 endpoint, whose URL starts with http. ``AWS_ALLOW_HTTP=true`` allows it too."""
    timeout_seconds: float = Field(default=30.0, gt=0, le=1e9)
    """Time limit of one request in seconds, above 0. A request that exceeds it is cancelled and retried."""
    retry_seconds: float = Field(default=300.0, ge=0, le=1e9)
    """Total time for the retries of one request in seconds; 0 disables retries. Connection errors, timeouts, incomplete
    responses and the statuses 408, 425, 429 and 5xx are retried."""
    max_concurrency: int = Field(default=16, ge=1, le=1024)
    """Largest number of simultaneous requests of one process, 1 to 1024."""
    gap_bytes: int = Field(default=256 * 2**10, ge=0)
    """Byte ranges that are at most this many bytes apart are read in one request."""
    request_bytes: int = Field(default=8 * 2**20, ge=4096)
    """Largest size of one request in bytes, at least 4096. Longer ranges are split into parallel requests.
    Sequential reads of whole tars use requests of 8 MiB instead."""
    read_ahead_bytes: int = Field(default=256 * 2**20, ge=0)
    """Memory of one process for prefetched samples of its lanes, in bytes. 0 disables prefetching."""


class Keep(str, Enum):
    """Kinds of objects that the cache stores."""

    ALL = "all"
    """Indexes, manifests and pages of shards."""
    INDEXES = "indexes"
    """Indexes and manifests only, for one pass over more data than fits on the disk."""


def default_folder() -> Path:
    """Return ``$MMSCALE_CACHE``, else ``~/.cache/mmscale``."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "mmscale"


class CacheConfig(StrictConfig):
    """Disk cache of remote data, shared by all processes of a machine."""

    folder: Path | None = None
    """Cache folder, on a local disk. null uses ``$MMSCALE_CACHE``, else ``~/.cache/mmscale``."""
    max_bytes: int = Field(default=16 * 2**30, ge=1)
    """Size limit of the folder in bytes, at least 1. The least recently used entries are removed first."""
    keep: Keep = Keep.ALL
    """``all`` caches pages of shards too; ``indexes`` caches indexes and manifests only."""

    @property
    def resolved_folder(self) -> Path:
        """``folder``, or its default."""
        return self.folder if self.folder is not None else default_folder()
