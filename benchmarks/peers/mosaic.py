"""mosaicml-streaming over MDS files of the same bytes, with the shared decoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

from benchmarks.peers import stateful
from benchmarks.peers.job import BATCH, Job, manifest_path
from data_pipeline.shards.sample_reader import read_samples


class _Photos(StreamingDataset):
    def __init__(self, job: Job) -> None:
        super().__init__(local=str(job.folder / "mds"), shuffle=True, shuffle_seed=1, batch_size=BATCH)
        self._job = job

    def __getitem__(self, at: int) -> Any:
        stored = super().__getitem__(at)
        return self._job.encode(stored["jpg"], stored["txt"])


def prepare(folder: Path) -> None:
    """Write the MDS files."""
    if (folder / "mds" / "index.json").exists():
        return
    with MDSWriter(out=str(folder / "mds"), columns={"jpg": "bytes", "txt": "str"}) as writer:
        for sample in read_samples(manifest_path(folder)):
            image, text = sample.parts
            writer.write({"jpg": image.data, "txt": text.text})  # type: ignore[union-attr]


def _loader(job: Job) -> Any:
    return StreamingDataLoader(_Photos(job), batch_size=BATCH, num_workers=job.workers, collate_fn=job.stack)


def batches(job: Job) -> Iterator[int]:
    """Yield the number of samples of each batch."""
    return stateful.batches(_loader(job))


def at(job: Job, num_samples: int) -> Any:
    """Return the state of its loader."""
    return stateful.state_at(_loader(job), num_samples)


def resumed(job: Job, state: Any) -> None:
    """Resume and read the first batch after the state."""
    stateful.resume(_loader(job), state)
