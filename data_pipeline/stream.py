"""The endless documents of one lane: mixture, order, reading and building behind one position."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence

from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.document import Document
from data_pipeline.documents import DocumentBuilder
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.faults import FaultPolicy, Skipped
from data_pipeline.lanes import LaneOrder, Place, mix
from data_pipeline.media_spec import MediaSpec
from data_pipeline.mixture import Mixture
from data_pipeline.packing import Budget
from data_pipeline.reader import SampleReader
from data_pipeline.shards.manifest import Manifest
from data_pipeline.state import StreamPosition
from data_pipeline.tokenizer import Tokenizer


def dataset_seed(seed: int, name: str) -> int:
    """64 bits of a run's seed and a data set's name, so that data sets are shuffled independently."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def sample_generator(seed: int, place: Place) -> np.random.Generator:
    """Randomness of one sample in one epoch, the same wherever and whenever the sample is read.

    Args:
        seed: ``dataset_seed``.
        place: Sample and epoch.
    """
    return np.random.Generator(np.random.PCG64(_Words(seed, place)))  # type: ignore[arg-type]  # Stubs lack the interface.


class _Words(ISeedSequence):
    """The 256 bits that start a PCG64. ``SeedSequence`` would ask the system for entropy each time, a slow call."""

    def __init__(self, seed: int, place: Place) -> None:
        self._start = mix(mix(mix(seed) ^ place.sample) ^ place.epoch)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> npt.NDArray[Any]:
        """Words of a counter through the hash."""
        return np.array([mix((self._start + i) & (2**64 - 1)) for i in range(n_words)], dtype=np.uint64).astype(dtype)


@dataclass(frozen=True)
class OpenDataset:
    """One data set of the mixture, open in this process; lanes share it."""

    config: DatasetConfig
    seed: int
    reader: SampleReader
    build: DocumentBuilder

    @classmethod
    def open(cls, config: DatasetConfig, seed: int, tokenizer: Tokenizer, spec: MediaSpec) -> OpenDataset:
        """Opens manifest and builder.

        Raises:
            ManifestError: the manifest is missing or damaged.
            DataConfigError: it is empty, or the transforms do not fit the model.
        """
        manifest = Manifest.open(config.manifest)
        if manifest.num_samples == 0:
            raise DataConfigError(f"data set {config.name}: {config.manifest} holds no samples")
        reader = SampleReader(manifest, config.name)
        return cls(config, dataset_seed(seed, config.name), reader, DocumentBuilder(config, tokenizer, spec))


class LaneStream:
    """Documents of one lane, one after the other: a ``packing.Source``.

    Args:
        config: The data block.
        datasets: Open data sets, in the order of ``config.datasets``.
        lane: This lane.
        budget: Refuses documents that no pack can hold.
        position: Where to go on.
    """

    def __init__(
        self, config: DataConfig, datasets: Sequence[OpenDataset], lane: int, budget: Budget, position: StreamPosition
    ) -> None:
        self._lane = lane
        self._datasets = datasets
        self._budget = budget
        self._mixture = Mixture([dataset.config.weight for dataset in datasets], lane)
        self._orders = [
            LaneOrder(
                num_samples=dataset.reader.manifest.num_samples,
                block_size=config.order.block_size,
                window_blocks=config.order.window_blocks,
                seed=dataset.seed,
                lane=lane,
                num_lanes=config.lanes,
            )
            for dataset in datasets
        ]
        self._position = position
        self._policy = FaultPolicy(config.faults)
        self._skipped: list[Skipped] = []

    def position(self) -> StreamPosition:
        """Where the next document is read from."""
        return self._position

    def make(self) -> Document | None:
        """Reads the next document; None if its sample was skipped.

        Raises:
            TooManyFaultsError: too many bad samples in a row.
            DataPipelineError: a shard is missing, stale or damaged; or a bad sample under ``on_error: fail``.
        """
        dataset, place = self._draw()
        result = self._policy.attempt(
            lambda: self._document(dataset, place), lambda: dataset.reader.where(place.sample)
        )
        if isinstance(result, SampleError):
            origin = (dataset.config.name, place.epoch, place.sample, self._lane, result.shard, result.key)
            self._skipped.append(Skipped(*origin, result.kind, result.reason))
            return None
        return result

    def pass_over(self) -> None:
        """Moves past the next document without reading it."""
        self._draw()

    def take_skipped(self) -> tuple[Skipped, ...]:
        """Samples skipped since the last call."""
        skipped, self._skipped = tuple(self._skipped), []
        return skipped

    def _draw(self) -> tuple[OpenDataset, Place]:
        draws, cursors = list(self._position.draws), list(self._position.cursors)
        chosen = self._mixture.choose(draws)
        place, cursors[chosen] = self._orders[chosen].resolve(cursors[chosen])
        draws[chosen] += 1
        self._position = StreamPosition(tuple(draws), tuple(cursors))
        return self._datasets[chosen], place

    def _document(self, dataset: OpenDataset, place: Place) -> Document:
        sample = dataset.reader.read(place.sample, place.epoch)
        document = dataset.build(sample, sample_generator(dataset.seed, place))
        try:
            return self._budget.admit(document)
        except SampleError as error:
            raise error.located(sample.provenance.shard, sample.provenance.key) from error
