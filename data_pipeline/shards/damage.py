"""What can be wrong with a shard, and how it is told.

Not for: finding it (``verify``, ``contents``).
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
    """The tar ends too early; what lay behind is lost."""
    HEADER = "header"
    """A tar header that does not fit its checksum, or is none."""
    PATH = "path"
    """A member whose name leaves the shard (``../x``, ``/x``), or is no UTF-8."""
    LINK = "link"
    """A link, a device, a pipe or a sparse file in the tar; never followed."""
    TAIL = "tail"
    """Data behind the end mark of the tar."""
    SLACK = "slack"
    """A byte between members that should be zero: nothing is lost, but this disk or transfer changes bytes."""
    NAME = "name"
    """A member without an extension: webdataset passes over it."""
    DUPLICATE = "duplicate"
    """A key comes twice, or an extension twice in a sample."""
    MISSING = "missing"
    """A member that the index lists is not in the tar."""
    CHECKSUM = "checksum"
    """Bytes differ from those that were indexed."""
    TEXT = "text"
    """No UTF-8, no JSON, or JSON of the wrong form."""
    PARTNER = "partner"
    """The JSON names a member that is absent."""
    EXTENSION = "extension"
    """The bytes of an image are of no known format, or a member is compressed."""
    RENAMED = "renamed"
    """An image of another format than its extension says: a run decodes it all the same, so this is a warning."""
    IMAGE = "image"
    """An image that cannot be decoded."""
    BOMB = "bomb"
    """An image or a text that would take too much memory; refused by its header or its size."""

    @property
    def is_warning(self) -> bool:
        """Whether a run trains on such a sample, so that ``verify`` does not fail."""
        return self is Problem.RENAMED


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong.

    Attributes:
        shard: Path of the tar, or of the manifest.
        key: The sample; empty if it is about no sample, or nobody can tell.
        offset: Byte inside the tar: of a member's first byte, or of a header; None if it is about the whole file.
        problem: Its kind.
        detail: What was seen, for people.
    """

    shard: str
    key: str
    offset: int | None
    problem: Problem
    detail: str


@dataclass
class ShardReport:
    """What reading a shard found."""

    shard: str
    num_samples: int = 0
    num_members: int = 0
    num_bytes: int = 0
    orphans: Orphans = field(default_factory=Orphans)
    damages: list[Damage] = field(default_factory=list)

    def add(self, problem: Problem, detail: str, key: str = "", offset: int | None = None) -> None:
        """Notes a damage of this shard."""
        self.damages.append(Damage(self.shard, key, offset, problem, detail))
