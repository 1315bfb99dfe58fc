"""A model of transformers and ours with the same weights, by way of its folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmscale.checkpoint import load_weights
from mmscale.checkpoint.foreign import import_folder
from mmscale.models.build import build_unset
from mmscale.models.config import read_model_config


def imported(source: Path, run: Path) -> tuple[Any, Path]:
    """The model of an imported folder, by the configuration that the report prints, and its checkpoint."""
    report = import_folder(source, run / "checkpoints")
    model = build_unset(read_model_config(report.model), attention="sdpa")
    load_weights(model, Path(report.checkpoint))
    return model, Path(report.checkpoint)


def their_gradients(theirs: Any, folder: Path) -> dict[str, Tensor]:
    """Gradients of a model of transformers by our names: saved as if they were weights, and imported.

    A parameter without a gradient counts as one with zeros.
    """
    carrier = copy.deepcopy(theirs)
    with torch.no_grad():
        for mine, parameter in zip(carrier.parameters(), theirs.parameters(), strict=True):
            mine.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    carrier.save_pretrained(folder / "gradients")
    model, _ = imported(folder / "gradients", folder / "of gradients")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All that the safetensors files of a folder hold."""
    return {name: values for file in folder.glob("*.safetensors") for name, values in load_file(file).items()}


def loaded(folder: Path, auto_class: str) -> Any:
    """By a class of transformers, which must find each key and no other."""
    import transformers

    model, info = getattr(transformers, auto_class).from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in info if kind != "error_msgs"), info
    return model.eval()
