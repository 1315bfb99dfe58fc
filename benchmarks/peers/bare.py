"""No loader: the shared decoder over encoded bytes in memory, in as many processes as workers.

It is the upper limit for every loader of decoded samples. Raw samples and a resume have no such limit.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator

from benchmarks.peers.job import BATCH, Job
from data_pipeline.sample import ImagePart
from data_pipeline.shards.sample_reader import read_samples

_IMAGES = 500


def _images(job: Job) -> list[bytes]:
    samples = itertools.islice(read_samples(job.manifest), _IMAGES)
    return [part.data for sample in samples for part in sample.parts if isinstance(part, ImagePart)]


def _decode(job: Job, images: list[bytes]) -> Iterator[int]:
    stream = itertools.cycle(images)
    while True:
        for data in itertools.islice(stream, BATCH):
            job.pixels(data)
        yield BATCH


def _count(job: Job, images: list[bytes], done: multiprocessing.SimpleQueue[int]) -> None:
    for count in _decode(job, images):
        done.put(count)


def batches(job: Job) -> Iterator[int]:
    """Yield numbers of decoded images."""
    images = _images(job)
    if not job.workers:
        yield from _decode(job, images)
        return
    done: multiprocessing.SimpleQueue[int] = multiprocessing.SimpleQueue()
    for _ in range(job.workers):
        multiprocessing.Process(target=_count, args=(job, images, done), daemon=True).start()
    while True:
        yield done.get()
