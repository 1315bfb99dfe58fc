"""Errors of the data side.

DataPipelineError
├── DataConfigError   a value that was asked for cannot work; nothing was read yet
├── ManifestError     a manifest or an index is missing, stale or damaged
├── ShardError        a tar is damaged or hostile
│   └── ReplacedError a remote tar is another one than was indexed
├── StorageError      an object of a remote store cannot be read: absent, refused, or the store failed for too long
│   ├── AbsentError   there is no such object, or it ends too early
│   └── StaleError    it is not the object that was indexed, or was replaced while it was read
├── SampleError       one sample is bad; the fault policy decides what follows
├── TooManyFaultsError   the fault policy gave up
├── PipelineError     a user's webdataset pipeline failed
├── WorkerError       a process of a loader, an ingest, a reshard or an export died
├── LedgerError       a step is not in the ledger of a run, or a part of the ledger is damaged
└── StateError        a resume state does not fit this data set, seed or configuration
"""

from __future__ import annotations

import errno
from enum import Enum
from typing import Any


class FaultKind(str, Enum):
    """What is wrong with a sample; the fault policy (``data.faults``) has a line for each but the last."""

    CHECKSUM = "checksum"
    """Its bytes are not those that were indexed."""
    DECODE = "decode"
    """An image that cannot be decoded, or is refused for its size."""
    TEXT = "text"
    """No UTF-8, malformed JSON, a field that the template needs is missing, or nothing to learn."""
    NO_IMAGE = "no_image"
    """It has no image, and its template requires one (``template.images``)."""
    DOCUMENT = "document"
    """It makes no document: placeholders and features differ, it fits into no pack, no tower sees its image."""
    UNEXPECTED = "unexpected"
    """A library raised what nobody foresaw."""
    SHARD = "shard"
    """Its shard or that one's index is missing, stale, truncated or cannot be read."""
    EXCLUDED = "excluded"
    """Nothing is wrong that this run saw: a list in ``data.faults.exclude`` names it."""


_MAX_REASON = 500


_ALLOCATION_FAILED = ("you tried to allocate", "cannot allocate memory", "out of memory", "_alloc_failed")
"""Parts of the messages of torch, CUDA and cuBLAS, whose errors of this kind share no class but RuntimeError."""


def out_of_memory(error: BaseException) -> str | None:
    """Return the first line of an error that says that an allocation failed; None for any other error."""
    text = str(error).strip().partition("\n")[0]
    failed = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if not failed and isinstance(error, RuntimeError):
        failed = any(part in str(error).lower() for part in _ALLOCATION_FAILED)
    return text or type(error).__name__ if failed else None


class DataPipelineError(Exception):
    """Root: whatever a user, a file or the network can cause on the data side."""


class DataConfigError(DataPipelineError):
    """A configured value cannot work; the message names it and the remedy."""


class ManifestError(DataPipelineError):
    """A manifest or a sidecar index is missing, stale or damaged."""


class ShardError(DataPipelineError):
    """A tar file is damaged, truncated or hostile; the message names file and offset."""


class ReplacedError(ShardError):
    """A remote tar of the right size holds other bytes than were indexed; the message names its URL."""


class StorageError(DataPipelineError):
    """A remote object cannot be read; the message names its URL and what to check."""


class AbsentError(StorageError):
    """There is no such object, or it ends before the bytes that were asked for; the message names its URL."""


class StaleError(StorageError):
    """A remote object was replaced since it was indexed or first read; the message names its URL."""


class SampleError(DataPipelineError):
    """One sample cannot be used.

    Args:
        reason: What was seen and what was expected; cut where it quotes more of the data than anybody reads.
        kind: What the fault policy goes by.
        shard: Path of the tar, when known.
        key: Key of the sample inside the tar, when known.
    """

    def __init__(self, reason: str, *, kind: FaultKind = FaultKind.DOCUMENT, shard: str = "?", key: str = "?") -> None:
        reason = reason if len(reason) <= _MAX_REASON else f"{reason[: _MAX_REASON - 3]}..."
        super().__init__(f"{shard}/{key}: {reason}")
        self.reason = reason
        self.kind = kind
        self.shard = shard
        self.key = key

    def located(self, shard: str, key: str) -> SampleError:
        """The same complaint with its place filled in."""
        return SampleError(self.reason, kind=self.kind, shard=shard, key=key)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_sample_error, (self.reason, self.kind, self.shard, self.key))


def _rebuild_sample_error(reason: str, kind: FaultKind, shard: str, key: str) -> SampleError:
    return SampleError(reason, kind=kind, shard=shard, key=key)


class TooManyFaultsError(DataPipelineError):
    """More samples were bad, in a row or of the last ones, than the fault policy allows.

    Attributes:
        skipped: What was left out of the step that this ended (``faults.Skipped``), but for the one in the message.
    """

    skipped: tuple[Any, ...] = ()


class PipelineError(DataPipelineError):
    """Code of the user's own, a webdataset pipeline or a stage, failed; the message names data set, code and sample."""


class WorkerError(DataPipelineError):
    """A process that helps a loader, an ingest, a reshard or an export failed or died; what is finished stays."""


class LedgerError(DataPipelineError):
    """The ledger of a run does not hold what was asked for, or is damaged; the message names the file or the steps."""


class StateError(DataPipelineError):
    """A resume state belongs to other data, another seed or another configuration."""
