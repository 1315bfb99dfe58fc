"""Import a Hugging Face folder as a checkpoint whose weights a stage can load.

    config.json --layout--> ModelConfig --meta device--> mmscale's names and shapes
    *.safetensors --mapped--> ranges of parameters --> checkpoints/step-00000000, one rank

Weights keep their number format. They are stored as frozen parameters, because there is no optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmscale.checkpoint.imports.write import (
    IMPORTED,
    manifest_of_weights,
    new_share,
    precision_of,
    write_checkpoint,
)
from mmscale.checkpoint.save import tied_names
from mmscale.checkpoint.share import LazyTensor, TensorPiece, persistent_buffers
from mmscale.engine.partition import parameter_table
from mmscale.errors import CheckpointError
from mmscale.hf.describe import FolderData, describe_folder
from mmscale.hf.layout import FamilyLayout, HfTensor
from mmscale.hf.layouts import layout_of
from mmscale.hf.read import CONFIG, HfFolder, read_config
from mmscale.models.build import build_weights
from mmscale.models.config import AnyModelConfig

_MOST_LISTED = 20
"""Largest number of tensor names that a message lists on each side."""


@dataclass(frozen=True)
class HfImportReport:
    """Result of ``import_folder``.

    Attributes:
        checkpoint: Folder that was written.
        source: Folder that was read.
        family: ``model_type`` of the folder.
        parameters: Number of values; tied ones count once.
        tensors: Number of tensors that were written.
        precision: Precision of the weights.
        model: Configuration of the model, usable as the ``model`` block of a run.
        data: Tokenizer, template and transforms of the folder.
        tied: Further name of a tied parameter -> its first name.
        left_out: Names of tensors that were not imported: unused ones, and copies of tied ones.
        beside: Tokenizer and processor files of the folder.
    """

    checkpoint: str
    source: str
    family: str
    parameters: int
    tensors: int
    precision: str
    model: dict[str, Any]
    data: FolderData
    tied: dict[str, str]
    left_out: tuple[str, ...]
    beside: tuple[str, ...]


@dataclass(frozen=True)
class DescribedFolder:
    """A Hugging Face folder by its configuration, tokenizer and processor files, which are read in seconds.

    Attributes:
        source: The folder.
        layout: Layout of its family.
        config: Configuration of its model.
        data: Tokenizer, template and transforms.
    """

    source: Path
    layout: FamilyLayout
    config: AnyModelConfig
    data: FolderData

    @classmethod
    def read(cls, source: Path) -> DescribedFolder:
        """Read the files of a folder, except its weights.

        Raises:
            CheckpointError: a file is damaged, the family is unknown, or the configuration requires a feature that
                mmscale's models lack.
        """
        values = read_config(source)
        layout = layout_of(values["model_type"])
        config = layout.model_config(values, str(source / CONFIG))
        return cls(source, layout, config, describe_folder(source, layout, config, values))


def import_folder(source: Path, directory: Path) -> HfImportReport:
    """Write ``directory/step-00000000`` from a Hugging Face folder.

    Args:
        source: Folder with ``config.json`` and safetensors files.
        directory: ``checkpoints`` folder of a run.

    Raises:
        CheckpointError: see ``DescribedFolder.read`` and ``import_weights``.
    """
    return import_weights(DescribedFolder.read(source), directory)


def import_weights(described: DescribedFolder, directory: Path) -> HfImportReport:
    """Write ``directory/step-00000000`` with the weights of a folder; ``directory``: ``checkpoints`` folder of a run.

    Raises:
        CheckpointError: a file of weights is damaged, or its tensors do not match the configuration. Also if
            ``step-00000000`` already exists or cannot be written.
    """
    source, layout, config = described.source, described.layout, described.config
    folder = HfFolder(source, layout.current_name)
    model = build_weights(config)
    table, tied = parameter_table(model), tied_names(model)
    buffers = (
        {name: tuple(values.shape) for name, values in persistent_buffers(model).items()} if layout.buffers else {}
    )
    shapes = {name: entry["shape"] for name, entry in table.items()} | buffers
    stored = _stored(layout, config, shapes, folder.names)
    second = {layout.hf_name(config, name): layout.hf_name(config, owner) for name, owner in tied.items()}
    left_out = _check_names(folder, layout, stored, second)
    pieces = list(_pieces(folder, stored, buffers))
    weights = [piece for piece in pieces if not piece.whole]
    manifest = manifest_of_weights(model, precision_of(weights), IMPORTED, {"imported": str(folder.path)}, buffers)
    path = write_checkpoint(directory, manifest, iter([new_share(0, pieces, source)]))
    return HfImportReport(
        checkpoint=str(path),
        source=str(source),
        family=layout.model_type,
        parameters=sum(piece.values.numel() for piece in weights),
        tensors=len(pieces),
        precision=manifest.precision,
        model=config.model_dump(mode="json"),
        data=described.data,
        tied=manifest.tied,
        left_out=tuple(left_out),
        beside=tuple(str(file) for file in folder.companion_files),
    )


def _stored(
    layout: FamilyLayout, config: AnyModelConfig, shapes: Mapping[str, Sequence[int]], names: set[str]
) -> dict[str, HfTensor]:
    """Return the tensors that the model needs, in the spelling of the experts that more of ``names`` have."""
    spellings = [layout.hf_tensors(config, shapes)]
    if layout.stacked is not None:
        spellings.append(layout.hf_tensors(config, shapes, stacked=True))
    return max(spellings, key=lambda stored: len(stored.keys() & names))


def _check_names(
    folder: HfFolder, layout: FamilyLayout, stored: Mapping[str, HfTensor], second: dict[str, str]
) -> list[str]:
    """Compare the tensor names of the folder with those that the model needs.

    Args:
        folder: The folder.
        layout: Layout of its family.
        stored: Tensors that the model needs, by name.
        second: Further name of a tied tensor -> its first name, in the folder's names.

    Returns:
        Names of tensors that are not imported: unused ones, and tied ones whose values equal those of the first name.

    Raises:
        CheckpointError: tensors are missing or unknown, with the names of both, or a tied tensor has values of its own.
    """
    missing = sorted(set(stored) - folder.names)
    over = sorted(folder.names - set(stored))
    unknown = [name for name in over if name not in second and not layout.is_unused(name)]
    if missing or unknown:
        lacks = f"the folder does not hold {_listed(missing)}" if missing else ""
        has = f"it holds {_listed(unknown)} that a {layout.model_type} model does not have" if unknown else ""
        raise CheckpointError(
            f"{folder.path}: {'; '.join(filter(None, (lacks, has)))}. The names follow from {CONFIG}: check that both "
            "belong to the same model"
        )
    for name in over:
        if name in second and not torch.equal(folder.tensor(name), folder.tensor(second[name])):
            raise CheckpointError(
                f"{folder.path}: {name} differs from {second[name]}, but {CONFIG} declares the two tied"
            )
    return over


def _listed(names: list[str]) -> str:
    """Return the number of tensors and their first names."""
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:_MOST_LISTED])}{more})"


def _pieces(
    folder: HfFolder, stored: Mapping[str, HfTensor], buffers: Mapping[str, tuple[int, ...]]
) -> Iterator[TensorPiece]:
    """Yield the parameters and ``buffers`` under mmscale's names: views of the mapped files.

    A parameter that the folder stores in several tensors is joined when it is written, one parameter at a time.
    """
    ranges: dict[str, list[Tensor]] = {}  # In the order of the values: ``hf_tensors`` lists the tensors so.
    for name, tensor in stored.items():
        values = folder.tensor(name)
        if tuple(values.shape) != tensor.shape:
            raise CheckpointError(
                f"{folder.path}: {name} is {list(values.shape)}, by {CONFIG} it should be {list(tensor.shape)}"
            )
        for part, own in tensor.split(values):
            if part is not None:
                ranges.setdefault(part.name, []).append(own)
            elif values.dim() > 1 and own.any():  # A nonzero vector is harmless: it scales zeros.
                raise CheckpointError(f"{folder.path}: {name} has nonzero values where this family has zeros")
    for name, found in ranges.items():
        if name in buffers:
            yield TensorPiece(
                f"{name}|buffer", 0, torch.cat([each.flatten() for each in found]).view(buffers[name]), whole=True
            )
        else:
            yield TensorPiece(f"{name}|frozen", 0, _joined(found))


def _joined(ranges: list[Tensor]) -> Tensor | LazyTensor:
    """Return consecutive ranges of a parameter as one flat tensor; a single range as it is."""
    if len(ranges) == 1:
        return ranges[0]
    dtype = reduce(torch.promote_types, (values.dtype for values in ranges))
    shape = (sum(values.numel() for values in ranges),)
    return LazyTensor(shape, dtype, lambda: torch.cat([values.reshape(-1).to(dtype) for values in ranges]))
