"""litdata over its own chunks of the same bytes, with the shared decoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from litdata import StreamingDataLoader, StreamingDataset, optimize

from benchmarks.peers import stateful
from benchmarks.peers.job import BATCH, Job, manifest_path
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader


class _Photos(StreamingDataset):
    def __init__(self, job: Job) -> None:
        super().__init__(str(job.folder / "litdata"), shuffle=True, seed=1)
        self._job = job

    def __getitem__(self, index: Any) -> Any:
        image, text = super().__getitem__(index)
        return self._job.encode(
            bytes(image), text
        )  # litdata returns views of its files, which cannot be sent between processes.


class _Read:
    """Reads samples by number in the processes that write the chunks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, number: int) -> Any:
        image, text = SampleReader(Manifest.open(manifest_path(self.folder)), "photos").read(number).parts
        return image.data, text.text  # type: ignore[union-attr]


def prepare(folder: Path) -> None:
    """Write the chunks."""
    if (folder / "litdata" / "index.json").exists():
        return
    numbers = range(Manifest.open(manifest_path(folder)).num_samples)
    optimize(
        _Read(folder), list(numbers), str(folder / "litdata"), chunk_bytes="64MB", num_workers=1, start_method="fork"
    )


def _loader(job: Job) -> Any:
    return StreamingDataLoader(
        _Photos(job), batch_size=BATCH, num_workers=job.workers, collate_fn=job.stack, drop_last=False
    )


def batches(job: Job) -> Iterator[int]:
    """Yield the number of samples of each batch."""
    return stateful.batches(_loader(job))


def at(job: Job, num_samples: int) -> Any:
    """Return the state of its loader."""
    return stateful.state_at(_loader(job), num_samples)


def resumed(job: Job, state: Any) -> None:
    """Resume and read the first batch after the state."""
    stateful.resume(_loader(job), state)
