"""The vision tower of a stage's perceptual loss: find it in a checkpoint, and check that it fits the images."""

from __future__ import annotations

from pathlib import Path

from mmscale.checkpoint.manifest import Manifest, model_config_of
from mmscale.checkpoint.warm_start import match
from mmscale.errors import CheckpointError
from mmscale.models.build import build_weights
from mmscale.models.config import TokenizerConfig, TowerConfig
from mmscale.models.vision import VisionConfig
from mmscale.objectives.perceptual import PerceptualConfig, shortened, tower_problem
from mmscale.run.config import RunConfig


def perceptual_loss(config: RunConfig, number: int) -> PerceptualConfig | None:
    """Return the perceptual loss of stage ``number``; None without one."""
    losses = config.stages[number].reconstruction
    return None if losses is None else losses.perceptual


def perceptual_model(loss: PerceptualConfig, manifest: Manifest, path: Path) -> TowerConfig:
    """Return the part of a checkpoint's tower that the loss needs.

    Raises:
        CheckpointError: the checkpoint records no configuration, or has no vision transformer without adapters.
    """
    return shortened(_tower(manifest, path), loss.layers)


def _tower(manifest: Manifest, path: Path) -> VisionConfig:
    model = model_config_of(manifest, path)
    if not isinstance(model.vision, VisionConfig):
        raise CheckpointError(f"{path} holds no vision transformer (model.vision), so it cannot compare images")
    if getattr(model, "adapters", None) is not None:
        raise CheckpointError(f"{path} has adapters, which a perceptual loss does not apply; name a model without them")
    return model.vision


def unfit_tower(loss: PerceptualConfig, model: TokenizerConfig, manifest: Manifest, path: Path) -> str | None:
    """Return why the checkpoint cannot compare the images of ``model``, or None.

    Raises:
        CheckpointError: as ``perceptual_model``.
    """
    if problem := tower_problem(_tower(manifest, path), loss.layers, model.image_tokenizer.channels):
        return f"{path}: {problem}"
    if loss.ema and not manifest.ema:
        return f"{path} holds no average of the weights: it was saved without stages.*.ema"
    report = match(build_weights(perceptual_model(loss, manifest, path)), manifest)
    if report.missing or report.mismatched or report.resampled:
        return f"{path} does not hold the weights of its own model configuration: {report}"
    return None
