"""Errors of the data side.

DataPipelineError
├── DataConfigError   a value that was asked for cannot work; nothing was read yet
├── ManifestError     a manifest or an index is missing, stale or damaged
├── ShardError        a tar is damaged or hostile
├── SampleError       one sample is bad; the fault policy decides what follows
├── TooManyFaultsError     the fault policy gave up
└── StateError        a resume state does not fit this data set, seed or configuration
"""

from __future__ import annotations


class DataPipelineError(Exception):
    """Root: whatever a user, a file or the network can cause on the data side."""


class DataConfigError(DataPipelineError):
    """A configured value cannot work; the message names it and the remedy."""


class ManifestError(DataPipelineError):
    """A manifest or a sidecar index is missing, stale or damaged."""


class ShardError(DataPipelineError):
    """A tar file is damaged, truncated or hostile; the message names file and offset."""


class SampleError(DataPipelineError):
    """One sample cannot be used.

    Args:
        reason: What was seen and what was expected.
        shard: Path of the tar, when known.
        key: Key of the sample inside the tar, when known.
    """

    def __init__(self, reason: str, *, shard: str = "?", key: str = "?") -> None:
        super().__init__(f"{shard}/{key}: {reason}")
        self.reason = reason
        self.shard = shard
        self.key = key

    def located(self, shard: str, key: str) -> SampleError:
        """The same complaint with its place filled in."""
        return SampleError(self.reason, shard=shard, key=key)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_sample_error, (self.reason, self.shard, self.key))


def _rebuild_sample_error(reason: str, shard: str, key: str) -> SampleError:
    return SampleError(reason, shard=shard, key=key)


class TooManyFaultsError(DataPipelineError):
    """More samples in a row were bad than the fault policy allows."""


class StateError(DataPipelineError):
    """A resume state belongs to other data, another seed or another configuration."""
