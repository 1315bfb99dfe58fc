"""Count orphans: samples with a text and no image, or with an image and no text.

An orphan is no damage: data sets of texts or pages may contain both kinds. In a data set of captions, an orphan often
comes from a damaged or misnamed pair, so ``ingest``, ``index`` and ``verify`` count them. ``template.images`` decides
whether a run trains on samples without an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.media_kind import media_kind
from data_pipeline.shards.token_grid import is_grid


class Orphans(NamedTuple):
    """Sample counts of a shard or data set.

    Attributes:
        samples: Number of samples.
        no_image: Samples with text, and no member of media.
        no_text: Samples with a member of media and no text: no ``txt``, caption, page, dialogue or annotation.
    """

    samples: int = 0
    no_image: int = 0
    no_text: int = 0

    def plus(self, other: Orphans) -> Orphans:
        """Return the sum of both counts."""
        return Orphans(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def counts(self) -> dict[str, int]:
        """Return the two orphan counts, as commands print them."""
        return {"without_image": self.no_image, "without_text": self.no_text}

    def warnings(self) -> Iterator[str]:
        """Yield a warning for each missing half; none if all samples have a text and no image."""
        if self.no_text == self.samples > 0:
            yield (
                f"none of the {self.samples:,} samples has a text (no .txt, caption, captions, parts, messages or "
                "annotations): if they have captions, name the column with mmscale data ingest --column caption=NAME, "
                "or the field with template.field"
            )
        elif self.no_text:
            yield (
                f"{self.no_text:,} of {self.samples:,} samples have an image and no text (no .txt, caption, captions, "
                "parts, messages or annotations): kind caption cannot train on them unless template.answers or "
                "template.field names another field"
            )
        if 0 < self.no_image < self.samples:
            yield (
                f"{self.no_image:,} of {self.samples:,} samples have a text and no image: kind caption skips them as "
                "bad samples (no_image) unless template.images is optional"
            )


def is_medium(ext: str) -> bool:
    """Return whether a member is an image, video or sound, or the token ids of an image or video."""
    return media_kind(ext) is not None or is_grid(ext)


def orphans_of(index: ShardIndex) -> Orphans:
    """Count the orphans of a shard from its index, without reading samples.

    Raises:
        ManifestError: a row of the index is damaged.
    """
    if not len(index):
        return Orphans()
    member_is_image = np.array([is_medium(ext) for ext in index.extensions], bool)[index.column("ext")]
    has_image = np.logical_or.reduceat(member_is_image, index.column("cu_members")[:-1])
    has_text = index.column("text_bytes") > 0
    return Orphans(len(index), int((has_text & ~has_image).sum()), int((has_image & ~has_text).sum()))
