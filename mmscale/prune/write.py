"""Prune a checkpoint to a smaller model, and write the result as a checkpoint.

Tensors are read, cut and written one at a time. Only calibration loads a model into memory, one at a time. Values keep
their number format. They are stored as frozen parameters, because there is no optimizer state.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mmscale.checkpoint.imports.write import manifest_of_weights, new_share, precision_of, write_checkpoint
from mmscale.checkpoint.manifest import model_config_of, newest_of
from mmscale.checkpoint.reshard import CheckpointReader, verify, whole_parameter
from mmscale.checkpoint.save import tied_names
from mmscale.checkpoint.share import LazyTensor, TensorPiece
from mmscale.config import Loaded, Origin
from mmscale.config.tree import DEFAULT
from mmscale.errors import CheckpointError, ConfigError
from mmscale.models.build import build_weights, count_parameters
from mmscale.models.config import ModelConfig
from mmscale.prune.calibration import Calibration, load_model
from mmscale.prune.choice import UnitChoice, choose_units
from mmscale.prune.cut import Cut, cut_of
from mmscale.prune.limits import axes, conflicts
from mmscale.prune.scores import Scores
from mmscale.prune.weights import scores_of_weights

PRUNED = "pruned"
"""Stage name of a pruned checkpoint."""


@dataclass(frozen=True)
class PruneReport:
    """Result of ``prune_checkpoint``.

    Attributes:
        checkpoint: Folder that was written.
        source: Checkpoint that was read.
        importance: Basis of the scores: ``activations`` or ``weights``.
        tokens: Number of calibration tokens; 0 without calibration.
        blocks: Numbers of the kept blocks in the source, from 0.
        before: Sizes of the source, by axis.
        after: Sizes of the result, by axis.
        parameters_before: Number of parameters of the source, with tower and connector.
        parameters_after: Number of parameters of the result.
        left_out: Components of the source that the result lacks: ``vision``, ``connector``.
        losses_before: Loss of the source, by held-out set; empty without calibration.
        losses_after: Loss of the result, by held-out set.
    """

    checkpoint: str
    source: str
    importance: str
    tokens: int
    blocks: tuple[int, ...]
    before: dict[str, int]
    after: dict[str, int]
    parameters_before: int
    parameters_after: int
    left_out: tuple[str, ...]
    losses_before: dict[str, float]
    losses_after: dict[str, float]


def prune_checkpoint(
    source: Path, target: Loaded[ModelConfig], directory: Path, calibration: Calibration | None = None
) -> PruneReport:
    """Write ``directory/step-00000000`` atomically, in one process.

    Args:
        source: A checkpoint, or a run folder, whose newest checkpoint is used. Its exponential moving average is pruned
            if it has one, else its weights.
        target: Configuration of the smaller model.
        directory: ``checkpoints`` folder of a run.
        calibration: Calibration data; None scores units by the weights alone.

    Raises:
        CheckpointError: the source is missing or damaged, or the result already exists or cannot be written.
        ConfigError: the smaller model cannot be cut out of the source, or the calibration data do not fit it.
        DataPipelineError: the calibration data are missing or damaged.
    """
    path = newest_of(source)
    if problems := verify(path):
        raise CheckpointError(f"{path} is damaged and was not pruned: {'; '.join(problems)}")
    with CheckpointReader(path) as reader:
        config = _source_config(reader)
        _check(config, target, path)
        scores, tokens, losses_before = _score_source(reader, config, calibration)
        choice = choose_units(config.decoder, target.value.decoder, scores)
        written = _write(reader, build_weights(target.value), choice, directory)
    small = target.value.decoder
    return PruneReport(
        checkpoint=str(written),
        source=str(path),
        importance="weights" if calibration is None else "activations",
        tokens=tokens,
        blocks=tuple(block.number for block in choice.blocks),
        before=axes(config.decoder),
        after=axes(small),
        parameters_before=count_parameters(config).total,
        parameters_after=count_parameters(target.value).total,
        left_out=tuple(name for name in config.components if name in ("vision", "connector", "video_connector")),
        losses_before=losses_before,
        losses_after=calibration.losses(load_model(written, target.value)) if calibration and losses_before else {},
    )


def _source_config(reader: CheckpointReader) -> ModelConfig:
    config = model_config_of(reader.manifest, reader.path)
    if not isinstance(config, ModelConfig):
        raise CheckpointError(f"{reader.path} holds only a vision tower; only decoders can be pruned")
    return config


def _check(config: ModelConfig, target: Loaded[ModelConfig], source: Path) -> None:
    """Require that ``target`` can be cut out of the source.

    Raises:
        ConfigError: lists the conflicts, each with its line in the file of ``target``.
    """
    if found := conflicts(config, target.value):
        reasons = [f"{_origin(target, path)} {path}: {reason}" for path, reason in found]
        raise ConfigError(f"{source} cannot be pruned to this model: " + "\n".join(reasons))


def _origin(target: Loaded[ModelConfig], path: str) -> Origin:
    """Return the origin of a field, or of the first field of a block."""
    return next((at for key, at in target.origins.items() if f"{key}.".startswith(f"{path}.")), DEFAULT)


def _score_source(
    reader: CheckpointReader, config: ModelConfig, calibration: Calibration | None
) -> tuple[Scores, int, dict[str, float]]:
    """Return the scores of the source, the number of calibration tokens, and the held-out losses."""
    if calibration is None:
        return scores_of_weights(config.decoder, functools.partial(_read_parameter, reader)), 0, {}
    calibration.check(config)
    model = load_model(reader.path, config)
    return *calibration.scores(model), calibration.losses(model)


def _read_parameter(reader: CheckpointReader, name: str) -> Tensor:
    """Read a parameter of the source, unsharded, float32."""
    stored = reader.manifest.stored_name(name)
    if stored is None:
        raise CheckpointError(f"{reader.path} does not hold {name}, which its model's configuration requires")
    return whole_parameter(reader, stored, ema=reader.manifest.ema)


def _write(reader: CheckpointReader, model: nn.Module, choice: UnitChoice, directory: Path) -> Path:
    """Write a checkpoint of the smaller ``model``, which is on the meta device."""
    pieces, second = [], {owner: name for name, owner in tied_names(model).items()}
    for name, parameter in model.named_parameters():
        cut = cut_of(name, choice, second)
        stored = reader.manifest.stored_name(cut.name) or cut.name
        dtype = reader.dtype(stored, reader.weights_kind(stored, ema=reader.manifest.ema))
        make = functools.partial(_cut, reader, cut, tuple(parameter.shape), dtype)
        pieces.append(TensorPiece(f"{name}|frozen", 0, LazyTensor(tuple(parameter.shape), dtype, make)))
    manifest = manifest_of_weights(model, precision_of(pieces), PRUNED, {"pruned": str(reader.path)})
    return write_checkpoint(directory, manifest, iter([new_share(0, pieces, reader.path)]))


def _cut(reader: CheckpointReader, cut: Cut, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = cut.apply(_read_parameter(reader, cut.name))
    assert tuple(values.shape) == shape, (cut.name, values.shape, shape)
    return values.to(dtype)
