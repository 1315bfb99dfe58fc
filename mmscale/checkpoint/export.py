"""Weights of a checkpoint, whole, for programs that know nothing of ours.

    FOLDER/model-00001-of-00002.safetensors   model-00002-of-00002.safetensors   whole tensors, by name
    FOLDER/model.safetensors.index.json       which tensor lies in which file, as Hugging Face's tools read it
    FOLDER/config.json                        the model's configuration, where it is known

Values are read range by range and written on, so neither a model nor a large matrix is ever in memory. Tied parameters
are stored once; the index names their second names.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mmscale.checkpoint.manifest import PARTIAL
from mmscale.checkpoint.reshard import CheckpointReader, verify
from mmscale.checkpoint.share import file_header
from mmscale.durable.files import sync_folder, write_file
from mmscale.errors import CheckpointError

Weights = Literal["master", "ema"]
Format = Literal["fp32", "bf16"]
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CHUNK_VALUES = 4 << 20


@dataclass(frozen=True)
class _Entry:
    """A tensor to be written; ``kind`` says where its values lie in the checkpoint."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class ExportReport:
    """What ``export_weights`` wrote.

    Attributes:
        folder: Where.
        checkpoint: What was read.
        step: Step of the run.
        weights: ``master`` or ``ema``.
        format: Number format of the parameters; buffers keep theirs.
        tensors: Their number, buffers included.
        tied: Second name -> the name under which the values lie.
        bytes: Of all tensors.
        files: Names of the safetensors files.
        configured: Whether the checkpoint knew the model's configuration.
    """

    folder: str
    checkpoint: str
    step: int
    weights: Weights
    format: Format
    tensors: int
    tied: dict[str, str]
    bytes: int
    files: tuple[str, ...]
    configured: bool


def export_weights(
    checkpoint: Path,
    folder: Path,
    *,
    weights: Weights = "master",
    number_format: Format = "fp32",
    shard_bytes: int = SHARD_BYTES,
) -> ExportReport:
    """Writes the weights of ``checkpoint`` into the new folder ``folder``: all of it or nothing.

    Args:
        checkpoint: Read in full and checked first.
        folder: Must not exist.
        weights: The trained weights, or their exponential moving average where the run kept one. Frozen parameters are
            the same in both.
        number_format: Of the parameters. ``fp32`` is exact.
        shard_bytes: Largest file, unless one tensor alone is larger.

    Raises:
        CheckpointError: the checkpoint is damaged or holds no such weights, or ``folder`` exists or cannot be written.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} is already there; export into a new folder")
    if problems := verify(checkpoint):
        raise CheckpointError(f"{checkpoint} is damaged and was not exported: {'; '.join(problems)}")
    partial = folder.with_name(folder.name + PARTIAL)
    with CheckpointReader(checkpoint) as reader:
        entries = list(_entries(reader, weights, _DTYPES[number_format]))
        shards = _shards(entries, shard_bytes)
        try:
            partial.mkdir(parents=True)
            names = _write(reader, shards, partial)
            sync_folder(partial)
            partial.rename(folder)
            sync_folder(folder.parent)
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return ExportReport(
            folder=str(folder),
            checkpoint=str(checkpoint),
            step=reader.manifest.state.step,
            weights=weights,
            format=number_format,
            tensors=len(entries),
            tied=reader.manifest.tied,
            bytes=sum(entry.num_bytes for entry in entries),
            files=tuple(names),
            configured=reader.manifest.model_config_values is not None,
        )


def _entries(reader: CheckpointReader, weights: Weights, dtype: torch.dtype) -> Iterator[_Entry]:
    """Every parameter and buffer, in the model's order."""
    manifest = reader.manifest
    if weights == "ema":
        _require_averages(reader)
    for name, entry in manifest.parameters.items():
        kind = weights if entry.trained else "frozen"
        yield _Entry(name, kind, entry.shape, dtype)
    for name, shape in manifest.buffers.items():
        yield _Entry(name, "buffer", shape, reader.buffer(name).dtype)


def _require_averages(reader: CheckpointReader) -> None:
    averaged = {key.removesuffix("|ema") for notes in reader.notes for key in notes.tensors if key.endswith("|ema")}
    lacking = [name for name, entry in reader.manifest.parameters.items() if entry.trained and name not in averaged]
    if not averaged:
        raise CheckpointError(
            f"{reader.path} holds no averaged weights (EMA): the run kept none; export the master weights instead"
        )
    if lacking:
        raise CheckpointError(f"{reader.path} holds averaged weights, but none of {', '.join(lacking[:5])}")


def _shards(entries: list[_Entry], shard_bytes: int) -> list[list[_Entry]]:
    """In order, a new file where the next tensor would make one larger than ``shard_bytes``."""
    shards: list[list[_Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.num_bytes
    return shards


def _write(reader: CheckpointReader, shards: list[list[_Entry]], folder: Path) -> list[str]:
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, entries in zip(names, shards, strict=True):
        write_file(folder / name, _stream(reader, entries))
    index = {
        "metadata": {
            "total_size": sum(entry.num_bytes for entries in shards for entry in entries),
            "tied": reader.manifest.tied,
        },
        "weight_map": {entry.name: name for name, entries in zip(names, shards, strict=True) for entry in entries},
    }
    _write_json(folder / INDEX, index)
    if reader.manifest.model_config_values is not None:
        _write_json(folder / "config.json", reader.manifest.model_config_values)
    return names


def _write_json(path: Path, value: object) -> None:
    write_file(path, [memoryview((json.dumps(value, indent=2) + "\n").encode())])


def _stream(reader: CheckpointReader, entries: list[_Entry]) -> Iterator[memoryview]:
    """A safetensors file, piece by piece."""
    yield memoryview(file_header(((entry.name, entry.dtype, entry.shape) for entry in entries), {"format": "pt"}))
    for entry in entries:
        for values in _values(reader, entry):
            yield values.view(torch.uint8).numpy().data


def _values(reader: CheckpointReader, entry: _Entry) -> Iterator[Tensor]:
    """The flattened tensor in chunks."""
    if entry.kind == "buffer":
        yield from [values] if (values := reader.buffer(entry.name).reshape(-1)).numel() else []
        return
    for start in range(0, entry.numel, _CHUNK_VALUES):
        chunk = torch.empty(min(_CHUNK_VALUES, entry.numel - start), dtype=entry.dtype)
        reader.fill(chunk, entry.name, entry.kind, start)
        yield chunk
