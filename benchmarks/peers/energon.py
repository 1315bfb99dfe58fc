"""Megatron-Energon over the same tars, with its own index and the shared decoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_loader,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

from benchmarks.peers.job import BATCH, SHUFFLE_BUFFER, Job


@edataclass
class EnergonPair(Sample):
    """An image and its text, raw or decoded."""

    image: Any
    text: Any


@stateless
def _cook(sample: dict[str, Any]) -> EnergonPair:
    return EnergonPair(**basic_sample_keys(sample), image=sample["jpg"], text=sample["txt"])


class _Encoder(DefaultTaskEncoder[Any, Any, Any, Any]):
    cookers = (Cooker(_cook),)
    decoder = None

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job

    @stateless
    def encode_sample(self, sample: EnergonPair) -> EnergonPair:
        sample.image, sample.text = self._job.encode(sample.image, sample.text)
        return sample

    @stateless
    def batch(self, samples: list[EnergonPair]) -> Any:
        return self._job.stack([(sample.image, sample.text) for sample in samples])

    @stateless
    def encode_batch(self, batch: Any) -> Any:
        return batch


def prepare(folder: Path) -> None:
    """Write the files of ``energon prepare``: ``.nv-meta`` and an index of each tar."""
    if (folder / ".nv-meta" / "dataset.yaml").exists():
        return
    tars = [path.name for path in sorted(folder.glob("*.tar"))]
    BaseWebdatasetFactory.prepare_dataset(EPath(folder), tars, split_parts_ratio=[("train", 1.0)], workers=2)
    (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")


def _dataset(job: Job) -> Any:
    return get_train_dataset(
        job.folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=job.workers),
        batch_size=BATCH,
        shuffle_buffer_size=SHUFFLE_BUFFER,
        max_samples_per_sequence=100,
        task_encoder=_Encoder(job),
    )


def batches(job: Job) -> Iterator[int]:
    """Yield the number of samples of each batch."""
    for images, _ in get_loader(_dataset(job)):
        yield len(images)


def at(job: Job, num_samples: int) -> Any:
    """Return the state of its savable loader."""
    loader = get_savable_loader(_dataset(job))
    stream, seen = iter(loader), 0
    while seen < num_samples:
        images, _ = next(stream)
        seen += len(images)
    return loader.save_state_rank()


def resumed(job: Job, state: Any) -> None:
    """Resume and read the first batch after the state."""
    loader = get_savable_loader(_dataset(job))
    loader.restore_state_rank(state)
    next(iter(loader))
