"""Errors of the data pipeline.

DataPipelineError
├── DataConfigError      a configured value cannot work
├── ManifestError        a manifest or an index is missing, stale or damaged
├── ShardError           a tar is damaged, truncated or hostile
│   └── ReplacedError    a remote tar differs from the one that was indexed
├── StorageError         a remote object cannot be read: absent, access denied, or too many failed attempts
│   ├── AbsentError      the object does not exist or is too short
│   └── StaleError       the object was replaced since it was indexed or first read
├── SampleError          one sample is bad; the fault policy skips it or stops the run
├── TooManyFaultsError   more samples or shards are bad than the fault policy allows
├── PipelineError        a user's webdataset pipeline failed
├── WorkerError          a process of a loader, an ingest, a reshard or an export failed or died
├── SampleLogError       a step is not in the sample log of a run, or a part of the sample log is damaged
└── StateError           a resume state does not fit this data set, seed or configuration
"""

from __future__ import annotations

import errno
from enum import Enum
from typing import Any


class FaultKind(str, Enum):
    """The kind of a sample's fault. ``data.faults`` has a key for each kind except the last."""

    CHECKSUM = "checksum"
    """The bytes of the sample differ from those that were indexed."""
    DECODE = "decode"
    """An image cannot be decoded or is too large."""
    TEXT = "text"
    """Text is not UTF-8, JSON is malformed, a field that the template needs is missing, or no text is learned."""
    NO_IMAGE = "no_image"
    """The sample has no image, and its template (``template.images``) or a contrastive model requires one."""
    DOCUMENT = "document"
    """The sample gives no valid document: image tokens and features differ in number, no pack can hold the document, or
    the model has no tower for its image."""
    UNEXPECTED = "unexpected"
    """An exception that is no error of this package, for example from a library."""
    SHARD = "shard"
    """The shard of the sample or its index is missing, stale, truncated or unreadable."""
    EXCLUDED = "excluded"
    """A list in ``data.faults.exclude`` names the sample; the run does not read it."""


_MAX_REASON_LENGTH = 500


_ALLOCATION_FAILED = ("you tried to allocate", "cannot allocate memory", "out of memory", "_alloc_failed")
"""Parts of the messages of torch, CUDA and cuBLAS. These errors have no common class below RuntimeError."""


def out_of_memory(error: BaseException) -> str | None:
    """Return the first line of the message if a failed allocation caused the error; None for any other error."""
    text = str(error).strip().partition("\n")[0]
    failed = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if not failed and isinstance(error, RuntimeError):
        failed = any(part in str(error).lower() for part in _ALLOCATION_FAILED)
    return text or type(error).__name__ if failed else None


class DataPipelineError(Exception):
    """Base class of the errors that a user, a file or the network can cause in the data pipeline."""


class DataConfigError(DataPipelineError):
    """A configured value cannot work; the message names it and the remedy."""


class ManifestError(DataPipelineError):
    """A manifest or a sidecar index is missing, stale or damaged."""


class ShardError(DataPipelineError):
    """A tar file is damaged, truncated or hostile; the message names file and offset."""


class ReplacedError(ShardError):
    """A remote tar has the indexed size but other bytes; the message names the URL."""


class StorageError(DataPipelineError):
    """A remote object cannot be read; the message names the URL and what to check."""


class AbsentError(StorageError):
    """A remote object does not exist, or it ends before the requested bytes; the message names the URL."""


class StaleError(StorageError):
    """A remote object was replaced since it was indexed or first read; the message names the URL."""


class SampleError(DataPipelineError):
    """One sample cannot be used.

    Args:
        reason: What was found and what was expected; cut to 500 characters, because it may quote the data.
        kind: The kind of fault, for the fault policy.
        shard: Path of the tar; ``?`` if unknown.
        key: Key of the sample inside the tar; ``?`` if unknown.
    """

    def __init__(self, reason: str, *, kind: FaultKind = FaultKind.DOCUMENT, shard: str = "?", key: str = "?") -> None:
        reason = reason if len(reason) <= _MAX_REASON_LENGTH else f"{reason[: _MAX_REASON_LENGTH - 3]}..."
        super().__init__(f"{shard}/{key}: {reason}")
        self.reason = reason
        self.kind = kind
        self.shard = shard
        self.key = key

    def located(self, shard: str, key: str) -> SampleError:
        """Return a copy of the error with this shard and key."""
        return SampleError(self.reason, kind=self.kind, shard=shard, key=key)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_sample_error, (self.reason, self.kind, self.shard, self.key))


def _rebuild_sample_error(reason: str, kind: FaultKind, shard: str, key: str) -> SampleError:
    return SampleError(reason, kind=kind, shard=shard, key=key)


class TooManyFaultsError(DataPipelineError):
    """More samples or shards are bad than the fault policy allows (``max_consecutive``, ``max_share``).

    Attributes:
        skipped: The samples skipped in the unfinished step (``fault_policy.Skipped``), without the one in the message.
    """

    skipped: tuple[Any, ...] = ()


class PipelineError(DataPipelineError):
    """A user's webdataset pipeline or stage failed; the message names the data set, the code and the sample."""


class WorkerError(DataPipelineError):
    """A process of a loader, an ingest, a reshard or an export failed or died; finished shards are kept."""


class SampleLogError(DataPipelineError):
    """The sample log of a run lacks the requested steps or is damaged; the message names the file or the steps."""


class StateError(DataPipelineError):
    """A resume state belongs to other data, another seed or another configuration."""
