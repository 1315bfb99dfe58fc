"""The emoji shards as a webdataset pipeline of one's own: see docs/loader.md, "A pipeline of your own"."""

from __future__ import annotations

import random
from typing import Any

import webdataset as wds

SHARDS = "examples/emoji/shards/train-quick-{00000..00001}.tar"


def shout(sample: dict[str, Any]) -> dict[str, Any]:
    """A stage for one sample: return it changed, or None to leave it out."""
    sample["json"]["name"] = sample["json"]["name"].upper()
    return sample


def train(epoch: int) -> wds.WebDataset:
    """One epoch; the order follows from its number."""
    dataset = wds.WebDataset(SHARDS, shardshuffle=False, empty_check=False)
    return dataset.decode(only=["json"]).map(shout).shuffle(100, rng=random.Random(epoch))
