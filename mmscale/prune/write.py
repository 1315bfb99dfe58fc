"""Pruning, whole: a checkpoint and the configuration of a smaller model become a checkpoint of that model.

Tensors are read, cut and written one after the other; only calibration ever holds a model in memory, and one at a time.
Values keep their number format; they are written as frozen ones are, since no optimizer has seen them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mmscale.checkpoint.foreign.write import manifest_of_weights, new_share, precision_of, write_checkpoint
from mmscale.checkpoint.manifest import model_config_of, newest_of
from mmscale.checkpoint.reshard import CheckpointReader, verify, whole_parameter
from mmscale.checkpoint.save import tied_names
from mmscale.checkpoint.share import Deferred, Piece
from mmscale.config import Loaded, Origin
from mmscale.config.tree import DEFAULT
from mmscale.errors import CheckpointError, ConfigError
from mmscale.models.build import build_weights, count_parameters
from mmscale.models.config import ModelConfig
from mmscale.prune.calibration import Calibration, load_model
from mmscale.prune.choice import Choice, choose
from mmscale.prune.cut import Cut, cut_of
from mmscale.prune.limits import axes, refusals
from mmscale.prune.scores import Scores
from mmscale.prune.weights import scores_of_weights

PRUNED = "pruned"
"""Stage of a checkpoint that was cut out of another one."""


@dataclass(frozen=True)
class PruneReport:
    """What ``prune_checkpoint`` did.

    Attributes:
        checkpoint: Folder that was written.
        source: Checkpoint that was read.
        importance: ``activations`` or ``weights``: what units were judged by.
        tokens: Of calibration; 0 without.
        blocks: Numbers of the blocks that stay, from 0.
        before: Sizes of the source by axis.
        after: Sizes of the result.
        parameters_before: Of the source, its tower and connector included.
        parameters_after: Of the result.
        left_out: Components of the source that are not the decoder's.
        losses_before: Of the source, by held-out set.
        losses_after: Of the result.
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
    """Writes ``directory/step-00000000``, whole or not at all.

    Args:
        source: A checkpoint or a run folder, of which the newest checkpoint is taken; its average of the weights if it
            keeps one.
        target: The smaller model.
        directory: ``checkpoints`` folder of a run.
        calibration: What importance is measured on; None judges by the weights alone.

    Raises:
        CheckpointError: the source is missing or damaged, or the result is already there or cannot be written.
        ConfigError: the smaller model cannot be cut out of the source.
        DataPipelineError: the calibration data are missing or damaged.
    """
    path = newest_of(source)
    if problems := verify(path):
        raise CheckpointError(f"{path} is damaged and was not pruned: {'; '.join(problems)}")
    with CheckpointReader(path) as reader:
        config = _source_config(reader)
        _check(config, target, path)
        scores, tokens, losses_before = _judged(reader, config, calibration)
        choice = choose(config.decoder, target.value.decoder, scores)
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
        left_out=tuple(name for name in config.components if name in ("vision", "connector")),
        losses_before=losses_before,
        losses_after=calibration.losses(load_model(written, target.value)) if calibration and losses_before else {},
    )


def _source_config(reader: CheckpointReader) -> ModelConfig:
    config = model_config_of(reader.manifest, reader.path)
    if not isinstance(config, ModelConfig):
        raise CheckpointError(f"{reader.path} holds a vision tower alone; only decoders are pruned")
    return config


def _check(config: ModelConfig, target: Loaded[ModelConfig], source: Path) -> None:
    """Refuses what cannot be cut, every reason with the line that asks for it."""
    if found := refusals(config, target.value):
        reasons = [f"{_origin(target, path)} {path}: {reason}" for path, reason in found]
        raise ConfigError(f"{source} cannot be pruned to this model: " + "\n".join(reasons))


def _origin(target: Loaded[ModelConfig], path: str) -> Origin:
    """Where a field, or the first field of a block, was written."""
    return next((at for key, at in target.origins.items() if f"{key}.".startswith(f"{path}.")), DEFAULT)


def _judged(
    reader: CheckpointReader, config: ModelConfig, calibration: Calibration | None
) -> tuple[Scores, int, dict[str, float]]:
    """Scores, the tokens behind them, and the held-out losses of the source."""
    if calibration is None:
        return scores_of_weights(config.decoder, functools.partial(_whole, reader)), 0, {}
    calibration.check(config)
    model = load_model(reader.path, config)
    return *calibration.scores(model), calibration.losses(model)


def _whole(reader: CheckpointReader, name: str) -> Tensor:
    """A parameter of the source, float32."""
    stored = reader.manifest.stored_name(name)
    if stored is None:
        raise CheckpointError(f"{reader.path} does not hold {name}, which its model's configuration has")
    return whole_parameter(reader, stored, ema=reader.manifest.ema)


def _write(reader: CheckpointReader, model: nn.Module, choice: Choice, directory: Path) -> Path:
    """Writes the parameters of the smaller ``model``, which is on the meta device."""
    pieces, second = [], {owner: name for name, owner in tied_names(model).items()}
    for name, parameter in model.named_parameters():
        cut = cut_of(name, choice, second)
        stored = reader.manifest.stored_name(cut.name) or cut.name
        dtype = reader.dtype(stored, reader.weights_kind(stored, ema=reader.manifest.ema))
        make = functools.partial(_cut, reader, cut, tuple(parameter.shape), dtype)
        pieces.append(Piece(f"{name}|frozen", 0, Deferred(tuple(parameter.shape), dtype, make)))
    manifest = manifest_of_weights(model, precision_of(pieces), PRUNED, {"pruned": str(reader.path)})
    return write_checkpoint(directory, manifest, iter([new_share(0, pieces, reader.path)]))


def _cut(reader: CheckpointReader, cut: Cut, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = cut.of(_whole(reader, cut.name))
    assert tuple(values.shape) == shape, (cut.name, values.shape, shape)
    return values.to(dtype)
