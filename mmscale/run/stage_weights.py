"""Weights that a stage takes from other checkpoints at its beginning, over those of the stage before.

For: a decoder swap (train tower and connector on a base decoder, then put the instruct decoder in its place), and for
beginning from pretrained parts. Nothing of it is remembered: a run that is killed before the first checkpoint of the
stage does it again.

Source: the swap as in Llama 3.2 Vision, whose decoder was frozen meanwhile (Meta 2024, model card).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from mmscale.checkpoint import LoadReport, TrainState, warm_start
from mmscale.checkpoint.manifest import folder_name, missing_or_cut, newest_of, read_manifest, step_of
from mmscale.checkpoint.warm_start import cannot_give
from mmscale.dist import World, all_reduce_sum_list, raise_on_any_rank
from mmscale.engine.engine import Engine
from mmscale.errors import CheckpointError, ConfigError
from mmscale.models.build import build_model
from mmscale.optim.stages import ALL, WeightsConfig
from mmscale.run.config import RunConfig


def check_stage_weights(config: RunConfig, world: World, state: TrainState) -> None:
    """Checks the sources of all stages that are still to begin, cheaply: no weights are read. All ranks must call.

    Args:
        config: The run.
        world: This rank.
        state: Where the run goes on. A stage that has taken its weights does not need the source any more.

    Raises:
        ConfigError: a source is missing or not whole, or has nothing that fits; every rank raises.
    """
    raise_on_any_rank(world, next(_complaints(config, state), None), ConfigError)


def _complaints(config: RunConfig, state: TrainState) -> Iterator[str]:
    for number, stage in config.stages_from(state.stage_index + (state.stage_step > 0)):
        if not stage.weights:
            continue
        with torch.device("meta"):
            model = build_model(config.stage_model(number), attention="sdpa")
        for index, source in enumerate(stage.weights):
            place = f"stages.{number}.weights.{index}.checkpoint={source.checkpoint}"
            try:
                path = newest_of(source.checkpoint)
                manifest = read_manifest(path)
                reason = missing_or_cut(path, manifest)
                reason = reason or cannot_give(manifest, path, model, _components(source), ema=source.ema)
            except CheckpointError as error:
                reason = str(error)
            if reason is not None:
                yield f"{place}: {reason}"


def take_stage_weights(engine: Engine, source: WeightsConfig) -> tuple[Path, LoadReport]:
    """Takes one source's weights into the engine of a stage that begins. All ranks must call.

    Returns:
        The checkpoint that was taken, and what of it.

    Raises:
        CheckpointError: it is missing or damaged; nothing of it was taken.
    """
    path = agreed_newest(engine.world, source.checkpoint)
    return path, warm_start(engine, path, _components(source), ema=source.ema)


def agreed_newest(world: World, source: Path) -> Path:
    """Rank 0's newest checkpoint: another run may be writing into the folder at this moment. All ranks must call.

    Raises:
        CheckpointError: none is whole; every rank raises.
    """
    newest, complaint = source, None
    try:
        newest = newest_of(source)
    except CheckpointError as error:
        complaint = str(error)
    raise_on_any_rank(world, complaint, CheckpointError)
    if newest == source:
        return source
    step = all_reduce_sum_list(world, [float(step_of(newest)) if world.is_main else 0.0])[0]
    return newest.parent / folder_name(int(step))


def _components(source: WeightsConfig) -> tuple[str, ...] | None:
    return None if source.components == (ALL,) else source.components
