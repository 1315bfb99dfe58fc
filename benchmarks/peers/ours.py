"""This project: ``open_samples`` for raw samples, the loader of a training run for decoded ones.

A decoded batch is a pack for the model: tokens, positions, patches, segments, and the resume state.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from benchmarks.peers.job import BATCH, SIDE, TOKENIZER, Job, Scenario
from data_pipeline import open_samples
from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.images.decode import DecodeMode
from data_pipeline.images.transforms import FixedTransform
from data_pipeline.loader.loader import Loader
from data_pipeline.media_spec import MediaSpec, Placement

_PATCH = 14


def _raw(job: Job) -> Any:
    return open_samples(job.manifest, seed=1, workers=job.workers)


def batches(job: Job) -> Iterator[int]:
    """Yield the number of samples of each batch."""
    if job.scenario is Scenario.RAW:
        stream = iter(_raw(job))
        while True:
            yield len(list(islice(stream, BATCH)))
    mode = DecodeMode.FAST if job.scenario is Scenario.FAST else DecodeMode.EXACT
    dataset = DatasetConfig(name="photos", manifest=job.manifest, transforms=FixedTransform(decode=mode))
    config = DataConfig.model_validate(
        {
            "tokenizer": TOKENIZER,
            "datasets": [dataset],
            "lanes": max(1, job.workers),
            "packing": {"max_tokens": 1 << 14, "max_documents": BATCH},
            "workers": job.workers,
        }
    )
    spec = MediaSpec(Placement.CROSS_ATTENTION, patch_size=_PATCH, fixed_grid=(SIDE // _PATCH, SIDE // _PATCH))
    with Loader(config, spec, seed=1) as loader:
        for step in loader:
            yield step.num_samples


def at(job: Job, num_samples: int) -> Any:
    """Return the state after ``num_samples`` samples."""
    samples = _raw(job)
    for _ in islice(samples, num_samples):
        pass
    return samples.state_dict()


def resumed(job: Job, state: Any) -> None:
    """Resume and read the first sample after the state."""
    samples = _raw(job)
    samples.load_state_dict(state)
    next(iter(samples))
