"""Write a folder of safetensors files with index and configuration in Hugging Face's format.

    FOLDER/model-00001-of-00002.safetensors   model-00002-of-00002.safetensors   whole tensors, by name
    FOLDER/model.safetensors.index.json       tensor name -> file name
    FOLDER/config.json                        if the caller gives a configuration

Values are streamed, so a tensor need not fit in memory. The write is atomic: the whole folder appears or nothing does.
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
class OutputTensor:
    """A tensor that ``write_folder`` writes.

    Attributes:
        name: Name in the file.
        dtype: Dtype in the file.
        shape: Shape in the file.
        values: Called once; returns consecutive pieces of the flattened values, in ``dtype`` and on the CPU.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def require_new(folder: Path) -> None:
    """Raise if the output folder exists. Call it before expensive work; ``write_folder`` checks it too.

    Raises:
        CheckpointError: ``folder`` exists.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} is already there; export into a new folder")


def write_folder(
    folder: Path,
    tensors: Sequence[OutputTensor],
    config: Mapping[str, object] | None,
    *,
    preprocessor: Mapping[str, object] | None = None,
    tied: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    companions: Iterable[Path] = (),
) -> tuple[str, ...]:
    """Write the new folder ``folder`` atomically.

    Args:
        folder: Must not exist.
        tensors: Tensors in file order.
        config: JSON values of ``config.json``; None for no such file.
        preprocessor: JSON values of ``preprocessor_config.json``; None for no such file. A companion file of that name
            overwrites it.
        tied: Second name of a tied tensor -> its first name, written to the index under ``metadata.tied``.
        shard_bytes: Largest size of a file's tensors, bytes. A larger tensor gets a file of its own.
        companions: Files to copy into the folder.

    Returns:
        Names of the safetensors files.

    Raises:
        CheckpointError: the folder exists or cannot be written.
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
            file_of = {tensor.name: name for name, held in zip(names, shards, strict=True) for tensor in held}
            _write_json(partial / INDEX, {"metadata": metadata, "weight_map": file_of})
            if config is not None:
                _write_json(partial / CONFIG, config)
            if preprocessor is not None:
                _write_json(partial / f"{PREPROCESSOR}.json", preprocessor)
            for file in companions:
                write_file(partial / file.name, _read(file))
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error}") from error
    return names


def _shards(tensors: Sequence[OutputTensor], shard_bytes: int) -> list[list[OutputTensor]]:
    """Group the tensors in order; start a new file when the next tensor would exceed ``shard_bytes``."""
    shards: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return shards


def _stream(tensors: Sequence[OutputTensor]) -> Iterator[memoryview]:
    """Yield the bytes of a safetensors file: the header, then the values."""
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
