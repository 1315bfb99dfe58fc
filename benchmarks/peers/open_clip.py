"""A webdataset pipeline as open_clip builds it, with a smaller shuffle buffer and the shared decoder.

It has no state: a resume reads and skips the samples before the position, without decoding them.
Source: open_clip, ``src/open_clip_train/data.py``, ``get_wds_dataset``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import webdataset as wds

from benchmarks.peers.job import BATCH, SHUFFLE_BUFFER, Job
from data_pipeline.shards.manifest import Manifest


def _pipeline(job: Job, skip: int = 0) -> Any:
    manifest = Manifest.open(job.manifest)
    urls = [str(manifest.shard_path(number)) for number in range(manifest.num_shards)]

    def endless(shards: Iterator[Any]) -> Iterator[Any]:
        kept = list(shards)
        while True:
            yield from kept

    def complete(sample: dict[str, Any]) -> bool:
        return "txt" in sample and "jpg" in sample

    stages = [
        wds.SimpleShardList(urls),
        wds.detshuffle(bufsize=2000, initial=500, seed=1),
        wds.split_by_node,
        wds.split_by_worker,
        endless,
        wds.tarfile_to_samples(handler=wds.warn_and_continue),
        wds.shuffle(bufsize=SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER),
        lambda samples: itertools.islice(samples, skip // max(1, job.workers), None),
        wds.select(complete),
        wds.map(lambda sample: job.encode(sample["jpg"], sample["txt"]), handler=wds.warn_and_continue),
        wds.batched(BATCH, partial=False, collation_fn=job.stack),
    ]
    dataset = wds.DataPipeline(*stages)
    return wds.WebLoader(dataset, batch_size=None, shuffle=False, num_workers=job.workers)


def batches(job: Job) -> Iterator[int]:
    """Yield the number of samples of each batch."""
    for images, _ in _pipeline(job):
        yield len(images)


def at(job: Job, num_samples: int) -> int:
    """Return the number of samples to skip."""
    return num_samples


def resumed(job: Job, state: int) -> None:
    """Read up to the first batch after the skipped samples."""
    next(iter(_pipeline(job, skip=state)))
