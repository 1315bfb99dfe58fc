"""Writing a folder of safetensors files with an index and a configuration, as Hugging Face's libraries read it.

    FOLDER/model-00001-of-00002.safetensors   model-00002-of-00002.safetensors   whole tensors, by name
    FOLDER/model.safetensors.index.json       which tensor lies in which file
    FOLDER/config.json                        where a configuration is known

Values come piece by piece and are written on. All of the folder appears, or nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.io.untrusted import open_regular
from mmscale.errors import CheckpointError
from mmscale.hf.read import CONFIG, INDEX, PREPROCESSOR
from mmscale.hf.tensor_file import file_header
from mmscale.io.files import new_folder, write_file

SHARD_BYTES = 5_000_000_000
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be written.

    Attributes:
        name: In the file.
        dtype: In the file.
        shape: In the file.
        values: Its values in that format, flattened, in pieces that follow one another.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def require_new(folder: Path) -> None:
    """For those who have much to read before they write.

    Raises:
        CheckpointError: ``folder`` exists.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} is already there; export into a new folder")


def write_folder(
    folder: Path,
    tensors: Sequence[Outgoing],
    config: Mapping[str, object] | None,
    *,
    preprocessor: Mapping[str, object] | None = None,
    tied: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    beside: Iterable[Path] = (),
) -> tuple[str, ...]:
    """Writes the new folder ``folder``.

    Args:
        folder: Must not exist.
        tensors: In order.
        config: JSON values of ``config.json``; None for no such file.
        preprocessor: The same of ``preprocessor_config.json``, unless it is among those ``beside``.
        tied: Second name of a tensor -> its first; the index says so under ``metadata.tied``.
        shard_bytes: Largest file, unless one tensor alone is larger.
        beside: Files to copy along.

    Returns:
        Names of the safetensors files.

    Raises:
        CheckpointError: it exists or cannot be written.
    """
    require_new(folder)
    shards = _shards(tensors, shard_bytes)
    names = tuple(f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1))
    try:
        with new_folder(folder) as partial:
            for name, held in zip(names, shards, strict=True):
                write_file(partial / name, _stream(held))
            metadata: dict[str, object] = {"total_size": sum(tensor.num_bytes for tensor in tensors)}
            if tied is not None:
                metadata["tied"] = dict(tied)
            places = {tensor.name: name for name, held in zip(names, shards, strict=True) for tensor in held}
            _write_json(partial / INDEX, {"metadata": metadata, "weight_map": places})
            if config is not None:
                _write_json(partial / CONFIG, config)
            if preprocessor is not None:
                _write_json(partial / f"{PREPROCESSOR}.json", preprocessor)
            for file in beside:
                write_file(partial / file.name, _read(file))
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error}") from error
    return names


def _shards(tensors: Sequence[Outgoing], shard_bytes: int) -> list[list[Outgoing]]:
    """In order, a new file where the next tensor would make one larger than ``shard_bytes``."""
    shards: list[list[Outgoing]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return shards


def _stream(tensors: Sequence[Outgoing]) -> Iterator[memoryview]:
    """A safetensors file, piece by piece."""
    yield memoryview(file_header(((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors), {"format": "pt"}))
    for tensor in tensors:
        for values in tensor.values():
            yield values.view(torch.uint8).numpy().data


def _write_json(path: Path, value: object) -> None:
    write_file(path, [memoryview((json.dumps(value, indent=2) + "\n").encode())])


def _read(path: Path) -> Iterator[memoryview]:
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield memoryview(chunk)
