"""Weights of a checkpoint, whole, for other programs: under our names, or as a family of Hugging Face stores them.

Values are read range by range and written on, so neither a model nor a large matrix is ever in memory, save one whose
axes a family exchanges. Tied parameters are stored once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmscale.checkpoint.manifest import Manifest, model_config_of
from mmscale.checkpoint.reshard import CheckpointReader, verify
from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import Stored
from mmscale.hf.layouts import layout_for, layout_of, pixels
from mmscale.hf.read import PREPROCESSOR, beside, read_config
from mmscale.hf.write import SHARD_BYTES, Outgoing, require_new, write_folder
from mmscale.models.config import AnyModelConfig

Weights = Literal["master", "ema"]
Format = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CHUNK_VALUES = 4 << 20


@dataclass(frozen=True)
class HuggingFace:
    """To write a folder that ``transformers`` loads.

    Attributes:
        like: A folder of the same family: its tokenizer's files go along, and what ``config.json`` says of token ids
            and context length. None: the first family that has words for the model, and neither.
    """

    like: Path | None = None


@dataclass(frozen=True)
class _Entry:
    """A tensor to be written; ``kind`` says where its values lie in the checkpoint."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype


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
        family: ``model_type`` of the folder; None if it has our names.
        beside: Names of files that went along.
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
    family: str | None = None
    beside: tuple[str, ...] = ()


def export_weights(
    checkpoint: Path,
    folder: Path,
    *,
    weights: Weights = "master",
    number_format: Format = "fp32",
    shard_bytes: int = SHARD_BYTES,
    to: HuggingFace | None = None,
) -> ExportReport:
    """Writes the weights of ``checkpoint`` into the new folder ``folder``: all of it or nothing.

    Args:
        checkpoint: Read in full and checked first.
        folder: Must not exist.
        weights: The trained weights, or their exponential moving average where the run kept one. Frozen parameters are
            the same in both.
        number_format: Of the parameters. ``fp32`` is exact.
        shard_bytes: Largest file, unless one tensor alone is larger.
        to: Names and configuration of a family of Hugging Face; None keeps ours.

    Raises:
        CheckpointError: the checkpoint is damaged or holds no such weights, no family has words for the model, or
            ``folder`` exists or cannot be written.
    """
    require_new(folder)
    if problems := verify(checkpoint):
        raise CheckpointError(f"{checkpoint} is damaged and was not exported: {'; '.join(problems)}")
    with CheckpointReader(checkpoint) as reader:
        manifest = reader.manifest
        entries = {entry.name: entry for entry in _entries(reader, weights, _DTYPES[number_format])}
        if to is None:
            config, tied = manifest.model_config_values, manifest.tied
            tensors = [_outgoing(reader, Stored.alone(entry.name, entry.shape), entries) for entry in entries.values()]
        else:
            config, stored = _as_family(manifest, checkpoint, entries, number_format, to)
            tied = {}
            tensors = [_outgoing(reader, tensor, entries) for tensor in stored.values()]
        copied = [] if to is None or to.like is None else beside(to.like)
        preprocessor = None if to is None or config is None else config.pop(PREPROCESSOR, None)
        names = write_folder(
            folder, tensors, config, preprocessor=preprocessor, tied=tied, shard_bytes=shard_bytes, beside=copied
        )
        return ExportReport(
            folder=str(folder),
            checkpoint=str(checkpoint),
            step=manifest.state.step,
            weights=weights,
            format=number_format,
            tensors=len(tensors),
            tied=manifest.tied,
            bytes=sum(tensor.num_bytes for tensor in tensors),
            files=names,
            configured=manifest.model_config_values is not None,
            family=None if to is None else str((config or {})["model_type"]),
            beside=tuple(file.name for file in copied),
        )


def _as_family(
    manifest: Manifest, checkpoint: Path, entries: Mapping[str, _Entry], number_format: Format, to: HuggingFace
) -> tuple[dict[str, Any], dict[str, Stored]]:
    """``config.json``, and the family's tensors by name."""
    config = model_config_of(manifest, checkpoint)
    like = {} if to.like is None else read_config(to.like)
    layout = layout_of(like["model_type"]) if like else layout_for(config)
    values = layout.like(layout.config_values(config), like)
    values["dtype"] = {"fp32": "float32", "bf16": "bfloat16"}[number_format]
    if PREPROCESSOR in like:  # Its file is copied with the others.
        values.pop(PREPROCESSOR, None)
        _check_pixels(config, like, str(to.like))
    return values, layout.stored(config, {name: entry.shape for name, entry in entries.items()})


def _check_pixels(config: AnyModelConfig, like: Mapping[str, Any], where: str) -> None:
    """Require that a processor, which goes along, normalises pixels as the model does."""
    if config.vision is None:
        return
    mine = {"mean": list(config.vision.mean), "std": list(config.vision.std)}
    theirs = pixels.to_model(Keys(like, where), (config.vision.mean, config.vision.std))
    if any(abs(a - b) > 1e-6 for name in mine for a, b in zip(mine[name], theirs[name], strict=True)):
        raise CheckpointError(
            f"{where}: its image processor normalises pixels otherwise ({theirs}) than the model was trained with "
            f"({mine}); take another folder for --like, or none"
        )


def _outgoing(reader: CheckpointReader, tensor: Stored, entries: Mapping[str, _Entry]) -> Outgoing:
    dtype = entries[tensor.parts[0].name].dtype

    def values() -> Iterator[Tensor]:
        for part, start, stop in tensor.ranges():
            ranges = _values(reader, entries[part.name], start, stop)
            yield from ranges if part.axes is None else [part.axes.to_theirs(torch.cat(list(ranges)))]
            if part.zeros:
                yield torch.zeros(part.zeros, dtype=dtype)

    return Outgoing(tensor.name, dtype, tensor.shape, values)


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


def _values(reader: CheckpointReader, entry: _Entry, start: int, stop: int) -> Iterator[Tensor]:
    """A range of the flattened tensor in chunks."""
    if entry.kind == "buffer":
        yield from [values] if (values := reader.buffer(entry.name).reshape(-1)).numel() else []
        return
    for first in range(start, stop, _CHUNK_VALUES):
        chunk = torch.empty(min(_CHUNK_VALUES, stop - first), dtype=entry.dtype)
        reader.fill(chunk, entry.name, entry.kind, first)
        yield chunk
