"""Folders of Hugging Face, turned into checkpoints whose weights a stage can take.

    config.json --layout--> ModelConfig --meta device--> our names and shapes
    *.safetensors --mapped--> ranges of ours --> checkpoints/step-00000000, one file

Weights keep their number format; they are written as frozen ones are, since no optimizer has seen them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmscale.checkpoint.foreign.write import (
    IMPORTED,
    first,
    manifest_of_weights,
    new_share,
    precision_of,
    write_checkpoint,
)
from mmscale.checkpoint.save import tied_names
from mmscale.checkpoint.share import Piece
from mmscale.engine.partition import parameter_table
from mmscale.errors import CheckpointError
from mmscale.hf.layout import Layout, Stored
from mmscale.hf.layouts import layout_of, pixels
from mmscale.hf.read import CONFIG, HfFolder, read_config
from mmscale.models.build import build_weights


@dataclass(frozen=True)
class HfImportReport:
    """What ``import_folder`` did.

    Attributes:
        checkpoint: Folder that was written.
        source: Folder that was read.
        family: Its ``model_type``.
        parameters: Number of values, tied ones once.
        tensors: Number of parameters.
        precision: Of the weights.
        model: Configuration of the model: the ``model`` block of a run.
        transforms: What the folder's image processor does to an image, in the words of ``transforms`` of a data set.
        tied: Second name -> first name.
        left_out: Tensors of the folder that are of no use.
        beside: The tokenizer's files and the like, which stay where they are.
    """

    checkpoint: str
    source: str
    family: str
    parameters: int
    tensors: int
    precision: str
    model: dict[str, Any]
    transforms: dict[str, Any]
    tied: dict[str, str]
    left_out: tuple[str, ...]
    beside: tuple[str, ...]


def import_folder(source: Path, directory: Path) -> HfImportReport:
    """Writes ``directory/step-00000000`` from a folder of Hugging Face.

    Args:
        source: Holds ``config.json`` and safetensors files.
        directory: ``checkpoints`` folder of a run.

    Raises:
        CheckpointError: the folder is damaged or of a family that is not known, its configuration asks for something
            that our models do not compute, or its tensors are not those of the configuration.
    """
    values = read_config(source)
    layout = layout_of(values["model_type"])
    config = layout.model_config(values, str(source / CONFIG))
    transforms = pixels.transforms(values, str(source / CONFIG))
    folder = HfFolder(source, layout.spelled)
    model = build_weights(config)
    table, tied = parameter_table(model), tied_names(model)
    stored = layout.stored(config, {name: entry["shape"] for name, entry in table.items()})
    second = {layout.stored_name(config, name): layout.stored_name(config, owner) for name, owner in tied.items()}
    left_out = _check_names(folder, layout, stored, second)
    pieces = list(_pieces(folder, stored))
    manifest = manifest_of_weights(model, precision_of(pieces), IMPORTED, {"imported": str(folder.path)})
    path = write_checkpoint(directory, manifest, iter([new_share(0, pieces, source)]))
    return HfImportReport(
        checkpoint=str(path),
        source=str(source),
        family=layout.model_type,
        parameters=sum(piece.values.numel() for piece in pieces),
        tensors=len(pieces),
        precision=manifest.precision,
        model=config.model_dump(mode="json"),
        transforms=transforms,
        tied=manifest.tied,
        left_out=tuple(left_out),
        beside=tuple(str(file) for file in folder.beside),
    )


def _check_names(folder: HfFolder, layout: Layout, stored: Mapping[str, Stored], second: dict[str, str]) -> list[str]:
    """Compares the names of the folder with those that the model needs.

    Returns:
        Tensors that are left out: of no use, or second names whose values are those of the first.
    """
    wanted = set(stored)
    if missing := sorted(wanted - folder.names):
        raise CheckpointError(f"{folder.path} does not hold {first(missing)}")
    over = sorted(folder.names - wanted)
    for name in over:
        if name in second:
            if not torch.equal(folder.tensor(name), folder.tensor(second[name])):
                raise CheckpointError(f"{folder.path}: {name} is not {second[name]}, but {CONFIG} says that it is tied")
        elif not layout.is_unused(name):
            raise CheckpointError(f"{folder.path}: {name} has no place in a model of {layout.model_type}")
    return over


def _pieces(folder: HfFolder, stored: Mapping[str, Stored]) -> Iterator[Piece]:
    """Views of the mapped files, under our names."""
    for name, tensor in stored.items():
        values = folder.tensor(name)
        if tuple(values.shape) != tensor.shape:
            raise CheckpointError(
                f"{folder.path}: {name} is {list(values.shape)}, by {CONFIG} it should be {list(tensor.shape)}"
            )
        for ours, part in tensor.cut(values):
            if ours is not None:
                yield Piece(f"{ours}|frozen", 0, part)
            elif values.dim() > 1 and part.any():  # A vector among them scales zeros.
                raise CheckpointError(f"{folder.path}: {name} holds values where this family has zeros")
