"""What was counted in a data set, or in a part of one; parts add up to the whole in any order.

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
    """Adds to a counter that strange data cannot fill up: beyond ``MAX_NAMES`` names all are ``other``."""
    for name in sorted(names):
        counter[name if name in counter or len(counter) < MAX_NAMES else OTHER] += names[name]


@dataclass
class Tally:
    """Figures of samples; all but ``keys`` are small whatever was counted.

    Attributes:
        num_samples: Samples that were looked at.
        members: Files by extension.
        kinds: Samples by what they consist of: ``jpg+json``.
        images: Distributions over images: ``width height pixels aspect_ratio bytes``.
        samples: Over samples: ``images text_bytes``.
        texts: Over texts: ``characters``, and ``tokens`` with a tokenizer.
        documents: Over samples as they are trained on: ``tokens patches cost``.
        languages: Texts by language, of those that were asked.
        odd: Samples or images by what is odd about them.
        refused: Samples that cannot be read or make no document, by kind of fault.
        examples: The first of those, with place and reason.
        num_too_long: Documents that no pack holds whole.
        keys: ``copies.image_keys`` of the images; taken out when parts are added.
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
        """Adds a part that comes after this one."""
        self.num_samples += other.num_samples
        self.num_too_long += other.num_too_long
        for name in ("members", "kinds", "languages", "odd", "refused"):
            count_names(getattr(self, name), getattr(other, name))
        for name in ("images", "samples", "texts", "documents"):
            for key, histogram in getattr(self, name).items():
                histogram.merge(getattr(other, name)[key])
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]

    def figures(self) -> dict[str, Any]:
        """As they are printed; what was not counted is left out."""
        images = self.images["width"].count + self.odd["damaged_header"]
        found: dict[str, Any] = {
            "members": dict(sorted(self.members.items())),
            "kinds": dict(self.kinds.most_common()),
            "images": {"count": images, "per_sample": self.samples["images"].figures()},
            "text_bytes": self.samples["text_bytes"].figures(),
        }
        if images:
            found["images"] |= {name: histogram.figures() for name, histogram in self.images.items()}
        for name, histogram in self.texts.items():
            if histogram.count:
                found[f"text_{name}"] = histogram.figures()
        if self.documents["tokens"].count:
            found["documents"] = {name: histogram.figures() for name, histogram in self.documents.items()}
            found["documents"]["longer_than_a_pack"] = self.num_too_long
        found["languages"] = dict(self.languages.most_common())
        found["odd"] = dict(sorted((name, count) for name, count in self.odd.items() if count))
        found["refused"] = dict(sorted(self.refused.items()))
        if self.examples:
            found["refused_examples"] = list(self.examples)
        return found
