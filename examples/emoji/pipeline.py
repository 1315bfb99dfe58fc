"""A custom webdataset pipeline that reads the emoji shards: see docs/loader.md, "A pipeline of your own"."""

from __future__ import annotations

import random
from typing import Any

import webdataset as wds

SHARDS = "examples/emoji/shards/train-quick-{00000..00001}.tar"


def shout(sample: dict[str, Any]) -> dict[str, Any]:
    """Change one sample in a stage of the pipeline. A stage may return None to skip the sample."""
    sample["json"]["name"] = sample["json"]["name"].upper()
    return sample


def train(epoch: int) -> wds.WebDataset:
    """Return the data set of one epoch; the epoch's number decides the order."""
    dataset = wds.WebDataset(SHARDS, shardshuffle=False, empty_check=False)
    return dataset.decode(only=["json"]).map(shout).shuffle(100, rng=random.Random(epoch))
