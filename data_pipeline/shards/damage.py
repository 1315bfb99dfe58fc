"""Kinds of damage in a shard, and the report that collects them.

The checks themselves are in ``prepare.verify`` and ``prepare.contents``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from data_pipeline.shards.orphans import Orphans


class Problem(str, Enum):
    """Kinds of damage."""

    SHARD = "shard"
    """The tar is missing, empty or cannot be read."""
    MANIFEST = "manifest"
    """The manifest and the shard disagree, or the manifest is damaged."""
    INDEX = "index"
    """The index is missing, damaged, or made for another tar."""
    TRUNCATED = "truncated"
    """The tar ends before its end mark, so the data after that point is lost."""
    HEADER = "header"
    """A tar header whose checksum does not match, or a block that is no header at all."""
    PATH = "path"
    """A member whose name points outside the shard (``../x``, ``/x``), or is not valid UTF-8."""
    LINK = "link"
    """A link, a device, a pipe or a sparse file in the tar. Readers do not follow it."""
    TAIL = "tail"
    """Data after the end mark of the tar."""
    SLACK = "slack"
    """A padding byte that is not zero, or an unusual form of a header checksum. No content is lost, but the disk or the
    transfer may alter bytes."""
    NAME = "name"
    """A member without an extension. webdataset skips it."""
    DUPLICATE = "duplicate"
    """A key that occurs twice in the shard, or an extension that occurs twice in a sample."""
    MISSING = "missing"
    """A member that the index lists and the tar lacks."""
    CHECKSUM = "checksum"
    """Bytes that differ from those that were indexed."""
    TEXT = "text"
    """Text that is not UTF-8 or not JSON, is structured wrongly, or exceeds a bound of the JSON reader."""
    PARTNER = "partner"
    """The JSON names an image, a video or a sound that is not a member of the sample."""
    EXTENSION = "extension"
    """An image in an unknown format, or a compressed member."""
    RENAMED = "renamed"
    """An image whose format differs from its extension. Training decodes it anyway, so this is only a warning."""
    IMAGE = "image"
    """An image that cannot be decoded."""
    VIDEO = "video"
    """A video that cannot be decoded, or whose frames are too large."""
    AUDIO = "audio"
    """A sound that cannot be decoded."""
    TOKENS = "tokens"
    """A damaged token grid of an image or a video."""
    BOMB = "bomb"
    """An image or a text that would take too much memory. It is rejected by its header or size, before decoding."""

    @property
    def is_warning(self) -> bool:
        """Whether training accepts such a sample. ``verify`` does not fail on a warning."""
        return self is Problem.RENAMED


@dataclass(frozen=True)
class Damage:
    """One defect of a shard or a manifest.

    Attributes:
        shard: Path of the tar, or of the manifest.
        key: Key of the sample; empty if the defect concerns no sample, or the sample is unknown.
        offset: Byte offset inside the tar, of a member's content or of a header. None if the whole file is concerned.
        problem: Kind of the defect.
        detail: Human-readable description of what was seen.
    """

    shard: str
    key: str
    offset: int | None
    problem: Problem
    detail: str


@dataclass
class ShardReport:
    """Counts and defects that one pass over a shard found."""

    shard: str
    num_samples: int = 0
    num_members: int = 0
    num_bytes: int = 0
    orphans: Orphans = field(default_factory=Orphans)
    damages: list[Damage] = field(default_factory=list)

    def add(self, problem: Problem, detail: str, key: str = "", offset: int | None = None) -> None:
        """Record a defect of this shard."""
        self.damages.append(Damage(self.shard, key, offset, problem, detail))
