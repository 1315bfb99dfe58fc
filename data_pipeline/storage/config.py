"""Configuration of remote data: ``data.storage`` and ``data.cache``. Credentials never stand here."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path

from pydantic import Field

from data_pipeline.io.strict import StrictConfig

CACHE_VARIABLE = "MMSCALE_CACHE"


class StorageConfig(StrictConfig):
    """How remote objects are read. Nothing here changes what a step contains.

    Credentials come from the environment or the machine: ``AWS_ACCESS_KEY_ID`` and so on, web identity, instance roles.
    """

    endpoint: str | None = Field(default=None, pattern=r"^https?://[^/@]+(/.*)?$")
    """URL of an S3-compatible server; None asks ``AWS_ENDPOINT_URL``, then Amazon itself."""
    region: str | None = None
    """Region of the buckets; None asks ``AWS_REGION``."""
    allow_http: bool = False
    """Talk to an S3 endpoint without encryption, where its URL starts with http; so does ``AWS_ALLOW_HTTP=true``."""
    timeout_seconds: float = Field(default=30.0, gt=0, le=1e9)
    """A request that is not answered in full within this time is given up and tried again."""
    retry_seconds: float = Field(default=300.0, ge=0, le=1e9)
    """One read is tried again for this long: refused, broken and slow answers, 429 and 5xx."""
    max_concurrency: int = Field(default=16, ge=1, le=1024)
    """Requests of one process at the same time."""
    gap_bytes: int = Field(default=256 * 2**10, ge=0)
    """Ranges this close are read as one."""
    request_bytes: int = Field(default=8 * 2**20, ge=4096)
    """Bytes of one request at most; longer ranges are read in pieces, at the same time."""
    read_ahead_bytes: int = Field(default=256 * 2**20, ge=0)
    """Memory of one process for what its lanes need next; 0 reads each sample when it is its turn."""


class Keep(str, Enum):
    """What the cache keeps."""

    ALL = "all"
    """Pages of shards as well as indexes and manifests."""
    INDEXES = "indexes"
    """Indexes and manifests only: for one pass over more data than the disk holds."""


def default_folder() -> Path:
    """``$MMSCALE_CACHE``, else ``~/.cache/mmscale``."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "mmscale"


class CacheConfig(StrictConfig):
    """The disk cache of remote data, shared by all processes of a machine."""

    folder: Path | None = None
    """On a local disk; None takes ``$MMSCALE_CACHE``, else ``~/.cache/mmscale``."""
    max_bytes: int = Field(default=16 * 2**30, ge=1)
    """Size of the folder; what was used longest ago goes first."""
    keep: Keep = Keep.ALL
    """``all`` or ``indexes``."""

    @property
    def place(self) -> Path:
        """The folder, resolved."""
        return self.folder if self.folder is not None else default_folder()
