"""Look at a few samples of a data set before a run starts: do they fit into a pack, and do they hold images?

Only text and the sizes in the index are read, as ``SampleReader.read_outline`` does, so a look takes milliseconds.
Not for: finding every bad sample (``mmscale data verify``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.config import DatasetConfig
from data_pipeline.errors import DataConfigError, ManifestError, SampleError, ShardError
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Budget
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader

_NUM_LOOKED_AT = 32


@dataclass(frozen=True)
class FirstLook:
    """What a look found.

    Attributes:
        looked_at: Samples that were read.
        unusable: How many of them make no document, or one that no pack can hold (``packing.too_long``).
        reason: Of the first of these, with its shard and key.
        holds_images: Whether any document has an image, or any shard that was looked at, where the template takes them.
    """

    looked_at: int
    unusable: int
    reason: str
    holds_images: bool


def look_at(dataset: DatasetConfig, builder: DocumentBuilder, budget: Budget) -> FirstLook:
    """Make documents, without pixels, of samples spread evenly over an indexed data set on this machine.

    Raises:
        ManifestError: the manifest is damaged.
        DataConfigError: it holds no samples.
    """
    reader = SampleReader(Manifest.open(dataset.indexed), dataset.name)
    takes_images = dataset.template.takes_images
    num_samples = reader.manifest.num_samples
    if not num_samples:
        raise DataConfigError(f"data set {dataset.name}: {dataset.manifest} holds no samples")
    numbers = np.unique(np.linspace(0, num_samples - 1, _NUM_LOOKED_AT).astype(np.int64)).tolist()
    reasons, holds_images = [], False
    try:
        for number in numbers:
            try:
                sample = reader.read_outline(number)
                holds_images |= takes_images and any(map(is_image, reader.extensions(number)))
                document = builder.measure(sample)
                holds_images |= bool(document.items)
                budget.admit(document)
            except (SampleError, ShardError, ManifestError) as error:
                reasons.append(str(error))
    finally:
        reader.close()
    return FirstLook(len(numbers), len(reasons), reasons[0] if reasons else "", holds_images)
