"""Export the weights of a checkpoint for other programs, under mmscale's names or in a Hugging Face layout.

The exporter reads and writes values in small ranges, so memory never holds the model or a large matrix. A matrix whose
axes a layout exchanges is the exception. Tied parameters are stored once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmscale.checkpoint.manifest import Manifest, model_config_of, require_bases
from mmscale.checkpoint.reshard import CheckpointReader, verify, whole_parameter
from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import HfTensor
from mmscale.hf.layouts import layout_for, layout_of, pixels
from mmscale.hf.read import PREPROCESSOR, companion_files, read_config
from mmscale.hf.write import SHARD_BYTES, OutputTensor, require_new, write_folder
from mmscale.models.config import AnyModelConfig
from mmscale.nn.adapters import ADAPTER_PARAMETERS, merged_rows

Weights = Literal["master", "ema"]
Format = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CHUNK_VALUES = 4 << 20


@dataclass(frozen=True)
class HuggingFace:
    """Target of an export: a folder in the layout of a Hugging Face family.

    If ``like`` is None, families that ``transformers`` can load are tried first.

    Attributes:
        like: A Hugging Face folder of the target family. The export copies its tokenizer and processor files, and the
            keys of its ``config.json`` that do not change the computation, such as token ids and context length. None
            chooses the first family that can express the model, and copies neither files nor keys.
        files: Further files to copy into the folder.
        stacked_experts: Write one tensor for all experts of a layer instead of one for each expert. transformers reads
            both; published folders have one for each expert.
    """

    like: Path | None = None
    files: tuple[Path, ...] = ()
    stacked_experts: bool = False


@dataclass(frozen=True)
class _Entry:
    """A tensor to write.

    Attributes:
        name: Name in the checkpoint.
        kind: Kind of its values in the checkpoint.
        shape: Shape of the whole tensor.
        dtype: Number format to write.
        scaling: Factor of the adapter to merge into this weight; None for no adapter.
        ema: Whether to merge the averages of the adapter.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    scaling: float | None = None
    ema: bool = False


@dataclass(frozen=True)
class ExportReport:
    """Result of ``export_weights``.

    Attributes:
        folder: Folder that was written.
        checkpoint: Checkpoint that was read.
        step: Step of the run.
        weights: ``master`` or ``ema``.
        format: Number format of the parameters; buffers keep theirs.
        tensors: Number of tensors in the folder, buffers included.
        tied: Further name of a tied parameter -> the name under which it is stored in the checkpoint.
        bytes: Bytes of all tensors.
        files: Names of the safetensors files.
        configured: Whether the checkpoint stores the model's configuration.
        family: ``model_type`` of the folder; None if the tensors have mmscale's names.
        beside: Names of the files of the tokenizer and the processor.
        merged: Number of layers whose adapters were merged into their weights.
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
    merged: int = 0


def export_weights(
    checkpoint: Path,
    folder: Path,
    *,
    weights: Weights = "master",
    number_format: Format = "fp32",
    shard_bytes: int = SHARD_BYTES,
    to: HuggingFace | None = None,
    merge: bool = True,
) -> ExportReport:
    """Write the weights of ``checkpoint`` into the new folder ``folder``, atomically.

    Args:
        checkpoint: Checkpoint folder. Every byte is verified first.
        folder: Path that must not exist.
        weights: The trained weights (``master``), or their exponential moving average (``ema``) if the run kept one.
            Frozen parameters are the same in both.
        number_format: Number format of the parameters. ``fp32`` is exact; buffers keep their own.
        shard_bytes: Largest size of a file, unless one tensor alone is larger.
        to: Write a Hugging Face layout; None keeps mmscale's names.
        merge: Merge adapters into the weights of their layers. False writes both, which no Hugging Face layout can.

    Raises:
        CheckpointError: the checkpoint is damaged or lacks these weights, no family can express the model, the
            processor of ``to.like`` normalises pixels differently, or ``folder`` exists or cannot be written.
    """
    require_new(folder)
    require_bases(checkpoint)
    if problems := verify(checkpoint):
        raise CheckpointError(f"{checkpoint} is damaged and was not exported: {'; '.join(problems)}")
    with CheckpointReader(checkpoint) as reader:
        manifest = reader.manifest
        entries = {entry.name: entry for entry in _entries(reader, weights, _DTYPES[number_format])}
        if merge:
            entries, manifest = _merged(entries, manifest, ema=weights == "ema")
        if to is None:
            config, tied = manifest.model_config_values, manifest.tied
            tensors = [
                _outgoing(reader, HfTensor.single(entry.name, entry.shape), entries) for entry in entries.values()
            ]
        else:
            config, stored = _as_family(manifest, checkpoint, entries, number_format, to)
            tied = {}
            tensors = [_outgoing(reader, tensor, entries) for tensor in stored.values()]
        copied = [] if to is None else [*([] if to.like is None else companion_files(to.like)), *to.files]
        preprocessor = None if to is None or config is None else config.pop(PREPROCESSOR, None)
        names = write_folder(
            folder, tensors, config, preprocessor=preprocessor, tied=tied, shard_bytes=shard_bytes, companions=copied
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
            merged=sum(entry.scaling is not None for entry in entries.values()),
        )


def _merged(entries: dict[str, _Entry], manifest: Manifest, *, ema: bool) -> tuple[dict[str, _Entry], Manifest]:
    """Return the entries of a model without adapters, and the manifest with its configuration."""
    adapters = (manifest.model_config_values or {}).get("adapters")
    if not adapters:
        return entries, manifest
    own = {name: entry for name, entry in entries.items() if name.rpartition(".")[2] not in ADAPTER_PARAMETERS}
    for name in entries.keys() - own.keys():
        weight = f"{name.rpartition('.')[0]}.weight"
        own[weight] = replace(own[weight], scaling=adapters["alpha"] / adapters["rank"], ema=ema)
    return own, manifest.model_copy(update={"model_config_values": {**manifest.model_config_values, "adapters": None}})  # type: ignore[dict-item]


def _as_family(
    manifest: Manifest, checkpoint: Path, entries: Mapping[str, _Entry], number_format: Format, to: HuggingFace
) -> tuple[dict[str, Any], dict[str, HfTensor]]:
    """Return the values of ``config.json``, and the tensors of the Hugging Face layout by name."""
    config = model_config_of(manifest, checkpoint)
    like = {} if to.like is None else read_config(to.like)
    layout = layout_of(like["model_type"]) if like else layout_for(config)
    values = layout.with_keys_of(layout.config_values(config), like)
    values["dtype"] = {"fp32": "float32", "bf16": "bfloat16"}[number_format]
    if PREPROCESSOR in like:  # The processor's file is copied from ``like``.
        values.pop(PREPROCESSOR, None)
        _check_pixels(config, like, str(to.like))
    shapes = {
        name: entry.shape
        for name, entry in entries.items()
        if not (layout.training_only and re.fullmatch(layout.training_only, name))
    }
    return values, layout.hf_tensors(config, shapes, stacked=to.stacked_experts)


def _check_pixels(config: AnyModelConfig, like: Mapping[str, Any], where: str) -> None:
    """Require that the processor to be copied normalises pixels as the model was trained with.

    Raises:
        CheckpointError: mean or standard deviation differ.
    """
    if config.vision is None:
        return
    trained = {"mean": list(config.vision.mean), "std": list(config.vision.std)}
    copied = pixels.to_model(Keys(like, where), (config.vision.mean, config.vision.std))
    if any(abs(a - b) > 1e-6 for name in trained for a, b in zip(trained[name], copied[name], strict=True)):
        raise CheckpointError(
            f"{where}: its image processor normalises pixels with {copied}, but the model was trained with {trained}; "
            "give another folder to --like, or omit it"
        )


def _outgoing(reader: CheckpointReader, tensor: HfTensor, entries: Mapping[str, _Entry]) -> OutputTensor:
    dtype = entries[tensor.parts[0].name].dtype

    def values() -> Iterator[Tensor]:
        for part, start, stop in tensor.ranges():
            ranges = _values(reader, entries[part.name], start, stop)
            if part.axes is not None:
                yield part.axes.to_theirs(torch.cat(list(ranges)))
            elif part.unit_rows:
                rows = torch.cat(list(ranges)).view(part.shape)
                yield torch.nn.functional.normalize(rows.float(), dim=-1).to(dtype).view(-1)
            else:
                yield from ranges
            if part.zeros:
                yield torch.zeros(part.zeros, dtype=dtype)

    return OutputTensor(tensor.name, dtype, tensor.shape, values)


def _entries(reader: CheckpointReader, weights: Weights, dtype: torch.dtype) -> Iterator[_Entry]:
    """Yield every parameter, then every buffer, in the order of the manifest.

    Raises:
        CheckpointError: ``weights`` is ``ema``, and a trained parameter has no average.
    """
    manifest = reader.manifest
    if weights == "ema":
        _require_averages(reader)
    for name, entry in manifest.parameters.items():
        kind = weights if entry.trained else "frozen"
        yield _Entry(name, kind, entry.shape, dtype)
    for name, shape in manifest.buffers.items():
        yield _Entry(name, "buffer", shape, reader.buffer(name).dtype)


def _require_averages(reader: CheckpointReader) -> None:
    trained = [name for name, entry in reader.manifest.parameters.items() if entry.trained]
    averaged = {name for name in trained if 0 in reader.manifest.parameters[name].shape or reader.holds(name, "ema")}
    missing = [name for name in trained if name not in averaged]
    if not averaged:
        raise CheckpointError(
            f"{reader.path} holds no averaged weights (EMA): the run kept none; export the master weights instead"
        )
    if missing:
        raise CheckpointError(f"{reader.path} holds averaged weights, but none of {', '.join(missing[:5])}")


def _values(reader: CheckpointReader, entry: _Entry, start: int, stop: int) -> Iterator[Tensor]:
    """Yield the values ``start:stop`` of the flattened tensor in chunks. A buffer is always yielded whole."""
    if entry.kind == "buffer":
        yield from [values] if (values := reader.buffer(entry.name).reshape(-1)).numel() else []
        return
    if entry.scaling is not None:
        yield from _merged_values(reader, entry, start, stop)
        return
    for first in range(start, stop, _CHUNK_VALUES):
        chunk = torch.empty(min(_CHUNK_VALUES, stop - first), dtype=entry.dtype)
        reader.fill(chunk, entry.name, entry.kind, first)
        yield chunk


def _merged_values(reader: CheckpointReader, entry: _Entry, start: int, stop: int) -> Iterator[Tensor]:
    """Yield the values ``start:stop`` of a flattened weight with its adapter, in chunks of whole rows."""
    path, width = entry.name.rpartition(".")[0], entry.shape[1]
    parts = {
        name: whole_parameter(reader, f"{path}.{name}", ema=entry.ema)
        for name in ADAPTER_PARAMETERS
        if f"{path}.{name}" in reader.manifest.parameters
    }
    lora_b, magnitude = parts["lora_B"], parts.get("magnitude")
    last, step = -(-stop // width), max(1, _CHUNK_VALUES // width)
    for row in range(start // width, last, step):
        end = min(last, row + step)
        weight = torch.empty((end - row) * width)
        reader.fill(weight, entry.name, entry.kind, row * width)
        lengths = None if magnitude is None else magnitude[row:end]
        rows = merged_rows(weight.view(-1, width), parts["lora_A"], lora_b[row:end], lengths, entry.scaling or 0.0)
        yield rows.view(-1)[max(0, start - row * width) : stop - row * width].to(entry.dtype)
