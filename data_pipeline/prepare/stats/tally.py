"""Counts and histograms of a data set or a part of one. Parts can be merged.

Not for: counting (``count``), drawing (``mmscale.report``).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.prepare.stats.histogram import Histogram

MAX_NAMES = 1000
OTHER = "other"
MAX_EXAMPLES = 5
PER_RATIO = 1000


def count_names(counter: Counter[str], names: dict[str, int] | Counter[str]) -> None:
    """Add counts by name. After ``MAX_NAMES`` names, further ones count as ``other``, so memory stays bounded."""
    for name in sorted(names):
        counter[name if name in counter or len(counter) < MAX_NAMES else OTHER] += names[name]


@dataclass
class Tally:
    """Counts and histograms of samples. Their size is bounded, except that of ``keys``.

    Attributes:
        num_samples: Samples that were counted.
        members: Members by extension.
        kinds: Samples by the kinds of their members, such as ``jpg+json``.
        images: Histograms over images: ``width height pixels aspect_ratio bytes``.
        videos: Histograms over videos: ``frames seconds width height``, and ``bytes`` of those that are files. Frames
            that are stored as images are also counted as images.
        sounds: Histograms over sounds, without sound tracks of videos: ``seconds rate channels bytes``.
        samples: Histograms over samples: ``images text_bytes``.
        texts: Histograms over texts: ``characters``, and ``tokens`` with a tokenizer.
        documents: Histograms over the documents of a run: ``tokens patches cost``.
        languages: Texts by language; of a large data set only every n-th sample's.
        odd: Samples, images, videos or sounds by what is unusual about them.
        refused: Samples that cannot be read or converted to a document, by kind of fault.
        examples: The first of those errors, with shard, key and reason.
        num_too_long: Documents with more tokens than a pack.
        keys: ``copies.image_keys`` of the images; ``merge`` does not add them.
    """

    num_samples: int = 0
    members: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    images: dict[str, Histogram] = field(
        default_factory=lambda: {
            **{name: Histogram() for name in ("width", "height", "pixels", "bytes")},
            "aspect_ratio": Histogram(PER_RATIO),
        }
    )
    videos: dict[str, Histogram] = field(
        default_factory=lambda: {
            **{name: Histogram() for name in ("frames", "width", "height", "bytes")},
            "seconds": Histogram(PER_RATIO),
        }
    )
    sounds: dict[str, Histogram] = field(
        default_factory=lambda: {
            **{name: Histogram() for name in ("rate", "channels", "bytes")},
            "seconds": Histogram(PER_RATIO),
        }
    )
    samples: dict[str, Histogram] = field(
        default_factory=lambda: {name: Histogram() for name in ("images", "text_bytes")}
    )
    texts: dict[str, Histogram] = field(
        default_factory=lambda: {name: Histogram() for name in ("characters", "tokens")}
    )
    documents: dict[str, Histogram] = field(
        default_factory=lambda: {name: Histogram() for name in ("tokens", "patches", "cost")}
    )
    languages: Counter[str] = field(default_factory=Counter)
    odd: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    num_too_long: int = 0
    keys: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))

    def merge(self, other: Tally) -> None:
        """Add the counts of the part that follows this one; ``examples`` stay in order. ``keys`` are not merged."""
        self.num_samples += other.num_samples
        self.num_too_long += other.num_too_long
        for name in ("members", "kinds", "languages", "odd", "refused"):
            count_names(getattr(self, name), getattr(other, name))
        for name in ("images", "videos", "sounds", "samples", "texts", "documents"):
            for key, histogram in getattr(self, name).items():
                histogram.merge(getattr(other, name)[key])
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]

    def summary(self) -> dict[str, Any]:
        """Return the counts as a JSON object, without those that were not counted."""
        images = self.images["width"].count + self.odd["damaged_header"]
        found: dict[str, Any] = {
            "members": dict(sorted(self.members.items())),
            "kinds": dict(self.kinds.most_common()),
            "images": {"count": images, "per_sample": self.samples["images"].summary()},
            "text_bytes": self.samples["text_bytes"].summary(),
        }
        if images:
            found["images"] |= {name: histogram.summary() for name, histogram in self.images.items()}
        videos = self.videos["frames"].count + self.odd["damaged_video"]  # Not ``bytes``: those of frames are unknown.
        for kind, num, histograms in (
            ("videos", videos, self.videos),
            ("sounds", self.sounds["bytes"].count, self.sounds),
        ):
            if num:
                found[kind] = {"count": num}
                found[kind] |= {name: histogram.summary() for name, histogram in histograms.items()}
        for name, histogram in self.texts.items():
            if histogram.count:
                found[f"text_{name}"] = histogram.summary()
        if self.documents["tokens"].count:
            found["documents"] = {name: histogram.summary() for name, histogram in self.documents.items()}
            found["documents"]["longer_than_a_pack"] = self.num_too_long
        found["languages"] = dict(self.languages.most_common())
        found["odd"] = dict(sorted((name, count) for name, count in self.odd.items() if count))
        found["refused"] = dict(sorted(self.refused.items()))
        if self.examples:
            found["refused_examples"] = list(self.examples)
        return found
