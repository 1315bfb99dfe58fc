"""A model of transformers, ours with the same weights, and one set of inputs for both."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.checkpoint import load_weights
from mmscale.checkpoint.imports import import_folder
from mmscale.models.build import build_unset
from mmscale.models.config import read_model_config


@dataclass(frozen=True)
class ModelPair:
    """Both models with their inputs.

    Attributes:
        name: Family and inputs.
        ours, theirs: The models.
        run_ours, run_theirs: Forward passes that return the rows of real tokens or patches, in the same order.
        padding: Share of rows that are padding, for ours and theirs: rows of the decoder, or of a tower alone.
    """

    name: str
    ours: nn.Module
    theirs: nn.Module
    run_ours: Callable[[], Tensor]
    run_theirs: Callable[[], Tensor]
    padding: dict[str, float]


def our_model(theirs: Any) -> Any:
    """Return our model with the same weights, imported from the folder of ``theirs``."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        source, run = Path(folder) / "theirs", Path(folder) / "run"
        theirs.save_pretrained(source)
        report = import_folder(source, run / "checkpoints")
        model = build_unset(read_model_config(report.model), dtype=torch.float32)
        load_weights(model, Path(report.checkpoint))
        return model


def randomise(model: nn.Module, seed: int = 0, *, spread: float = 0.03, scale_spread: float = 0.1) -> None:
    """Set random parameters: gates open, norms not 1 and biases not 0, so that a missing part changes the outputs.

    Args:
        model: Changed in place.
        seed: Seed of all values.
        spread: Standard deviation of matrices and vectors. A parameter of one value, such as a gate, has 0.5.
        scale_spread: Standard deviation of the scales of norms around 1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.dim() == 1 and "norm" in name and name.endswith("weight")
            parameter.copy_(
                1 + scale_spread * noise if is_scale else noise * (0.5 if parameter.numel() == 1 else spread)
            )
