"""The loader as a ``torch.utils.data`` iterable, for training loops outside of mmscale.

for batch in open_loader("data.yaml", MediaSpec(Placement.EMBEDDING, patch_size=14), seed=1): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch.utils.data import IterableDataset, get_worker_info

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataConfigError, StateError
from data_pipeline.io.strict import faults_of
from data_pipeline.io.untrusted import UntrustedError, read_yaml
from data_pipeline.loader.loader import Loader
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.state import LoaderState


class PackedBatches(IterableDataset[MultimodalBatch]):
    """The batches of one rank, one per step. Create it with ``open_loader``.

    A new iteration continues after the last batch that was yielded. An iteration ends when every data set with a weight
    above 0 has reached its ``max_epochs``; without ``max_epochs`` it never ends. ``data.workers`` sets the worker
    processes: do not wrap the object in a ``DataLoader`` with workers.
    """

    def __init__(self, config: DataConfig, spec: MediaSpec, seed: int, rank: int, world_size: int) -> None:
        self._config, self._spec, self._seed = config, spec, seed
        self._rank, self._world_size = rank, world_size
        self._state: LoaderState | None = None
        self._open().close()  # Raise errors of the configuration here, not in the first step.

    def _open(self) -> Loader:
        lanes = -(-self._config.lanes // self._world_size)
        return Loader(
            self._config,
            self._spec,
            seed=self._seed,
            rank=self._rank,
            world_size=self._world_size,
            micro_lanes=lanes,
            state=self._state,
        )

    def __iter__(self) -> Iterator[MultimodalBatch]:
        """Yield the batches after the last one that was yielded.

        Raises:
            DataConfigError: called in a worker process of a ``DataLoader``.
            DataPipelineError: data cannot be read, or the fault policy stops the iteration.
        """
        if get_worker_info() is not None:
            raise DataConfigError(
                "this loader has workers of its own: set data.workers, and num_workers=0 of the DataLoader around it"
            )
        with self._open() as loader:
            for step in loader:
                if not step.num_samples and step.exhausted:
                    return
                self._state = step.state
                (batch,) = step.microbatches
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position of this rank: plain values, a few integers per lane. Empty before the first batch."""
        return {} if self._state is None else self._state.to_dict()

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Let the next iteration continue from a state.

        Args:
            state: The ``state_dict`` of this rank for the same number of ranks; or the list of the ``state_dict`` of
                all ranks, which fits any number of ranks and workers.

        Raises:
            StateError: the state belongs to other data or another order, or lacks a lane of this rank.
        """
        parts = [state] if isinstance(state, Mapping) else list(state)
        old = self._state
        if parts and not any(parts):
            self._state = None
            return
        if not all(parts):
            raise StateError("some ranks have a state and others have none: save the state of all ranks after one step")
        self._state = LoaderState.merge([LoaderState.from_dict(part) for part in parts])
        try:
            self._open().close()
        except StateError:
            self._state = old
            raise


def open_loader(
    config: DataConfig | Mapping[str, Any] | str | Path,
    spec: MediaSpec,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> PackedBatches:
    """Return the batches of one rank.

    Args:
        config: A data block as an object, a mapping, or a YAML file. The file contains the block itself, or a run's
            configuration with the block under ``data:``.
        spec: The model's inputs.
        seed: Seed of order, augmentation and drawn captions.
        rank: This rank, from 0.
        world_size: Number of ranks. It decides which lanes of the global batch this rank gets, not their content.

    Raises:
        DataConfigError: the configuration is wrong or cannot work; the message names the field.
        ManifestError, StorageError: a manifest is missing, damaged, or cannot be read from its URL.
    """
    if isinstance(config, str | Path):
        config = _read(Path(config))
    if not isinstance(config, DataConfig):
        try:
            config = DataConfig.model_validate(config)
        except ValidationError as error:
            raise DataConfigError(f"data configuration: {'; '.join(faults_of(error, config))}") from error
    return PackedBatches(config, spec, seed, rank, world_size)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        value = read_yaml(path)
    except (OSError, UntrustedError) as error:
        raise DataConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, Mapping):
        raise DataConfigError(f"{path}: expected a data block (tokenizer, datasets, lanes, packing)")
    block = value.get("data", value)
    if not isinstance(block, Mapping):
        raise DataConfigError(f"{path}: data: expected a block (tokenizer, datasets, lanes, packing)")
    return block
