"""Samples that lack one half of a pair: a text without an image, or an image without a text.

Neither is damage: a set of texts or of pages may hold both. But in a set of captions an orphan is often what is left of
a damaged or misnamed pair, so ``ingest``, ``index`` and ``verify`` count them. Not for: whether a run trains on such a
sample (``template.images``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.index import ShardIndex


class Orphans(NamedTuple):
    """Counts of samples.

    Attributes:
        samples: All samples.
        no_image: Those with text and no image member.
        no_text: Those with an image member and no text: no ``txt``, caption, page, dialogue or annotation.
    """

    samples: int = 0
    no_image: int = 0
    no_text: int = 0

    def plus(self, other: Orphans) -> Orphans:
        """The counts of both."""
        return Orphans(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def figures(self) -> dict[str, int]:
        """For the output of a command."""
        return {"without_image": self.no_image, "without_text": self.no_text}

    def warnings(self) -> Iterator[str]:
        """A sentence for each half that some samples lack; none about a set of texts alone."""
        if self.no_text == self.samples > 0:
            yield (
                f"not one of {self.samples:,} samples has a text (no .txt, caption, captions, parts, messages or "
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


def orphans_of(index: ShardIndex) -> Orphans:
    """The orphans of an indexed shard; no sample is read.

    Raises:
        ManifestError: a row of the index is damaged.
    """
    if not len(index):
        return Orphans()
    shown = np.array([is_image(ext) for ext in index.extensions], bool)[index.column("ext")]
    has_image = np.logical_or.reduceat(shown, index.column("cu_members")[:-1])
    has_text = index.column("text_bytes") > 0
    return Orphans(len(index), int((has_text & ~has_image).sum()), int((has_image & ~has_text).sum()))
