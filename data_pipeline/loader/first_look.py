"""A check of a few samples of a data set before a run starts: do they fit into a pack, and do they have images?

The check reads text and the image sizes of the index (``SampleReader.read_without_images``), so it takes milliseconds.
Not for: finding every bad sample (``mmscale data verify``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.config import DatasetConfig
from data_pipeline.errors import DataConfigError, ManifestError, SampleError, ShardError
from data_pipeline.media_spec import IMAGE, VIDEO
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Budget
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader

_NUM_CHECKED = 32


@dataclass(frozen=True)
class FirstLook:
    """Result of the check.

    Attributes:
        looked_at: Number of samples that were read.
        unusable: Number of them that give no document, or one that no pack can hold (``packing.too_long``).
        reason: The error of the first unusable sample, with its shard and key; empty if there is none.
        holds_images: Whether the template uses images, and a checked sample has one or its shard contains image files.
        highest_label: The highest token id that a checked sample teaches to predict; -1 for none.
        modalities: Names of the modalities besides images that documents of checked samples have, and ``VIDEO`` if one
            has a video.
    """

    looked_at: int
    unusable: int
    reason: str
    holds_images: bool
    highest_label: int = -1
    modalities: frozenset[str] = frozenset()


def look_at(dataset: DatasetConfig, builder: DocumentBuilder, budget: Budget) -> FirstLook:
    """Build documents without pixels from samples that are spread evenly over a data set with a local manifest.

    Raises:
        ManifestError: the manifest is damaged.
        DataConfigError: the data set has no samples.
    """
    reader = SampleReader(Manifest.open(dataset.indexed), dataset.name)
    takes_images = dataset.template.takes_images
    num_samples = reader.manifest.num_samples
    if not num_samples:
        raise DataConfigError(f"data set {dataset.name}: {dataset.manifest} holds no samples")
    numbers = np.unique(np.linspace(0, num_samples - 1, _NUM_CHECKED).astype(np.int64)).tolist()
    reasons, holds_images, highest, found = [], False, -1, set[str]()
    try:
        for number in numbers:
            try:
                sample = reader.read_without_images(number)
                holds_images |= takes_images and any(map(is_image, reader.extensions(number)))
                document = builder.dry_run(sample)
                found |= {VIDEO if item.is_video else item.modality for item in document.items}
                budget.admit(document)
                highest = max(highest, int(document.labels.max(initial=-1)))
            except (SampleError, ShardError, ManifestError) as error:
                reasons.append(str(error))
    finally:
        reader.close()
    reason = reasons[0] if reasons else ""
    return FirstLook(
        len(numbers),
        len(reasons),
        reason,
        holds_images or not found.isdisjoint({IMAGE, VIDEO}),
        highest,
        frozenset(found - {IMAGE}),
    )
