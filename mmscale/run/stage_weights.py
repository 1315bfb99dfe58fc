"""Load weights of other checkpoints at the beginning of a stage. They replace those of the previous stage.

Uses: start from pretrained parts, or swap the decoder (train tower and connector on a base decoder, then continue with
the instruct decoder). The run does not record these loads: if it is killed before the first checkpoint of the stage, it
loads them again.

Source: Llama 3.2 Vision (Meta 2024, model card) for the swap, with a frozen decoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_pipeline.errors import DataPipelineError
from mmscale.checkpoint import LoadReport, TrainState, warm_start
from mmscale.checkpoint.manifest import (
    folder_name,
    missing_or_truncated,
    newest_of,
    read_manifest,
    require_bases,
    step_of,
)
from mmscale.checkpoint.warm_start import warm_start_problem
from mmscale.config import Loaded
from mmscale.config.layers import RUN_CONFIG
from mmscale.dist import World, all_reduce_sum_list, raise_on_any_rank
from mmscale.engine.engine import Engine
from mmscale.errors import CheckpointError, ConfigError
from mmscale.models.adapters import COMPONENT as ADAPTERS
from mmscale.models.build import build_weights
from mmscale.models.image_tokens import TOKENIZER
from mmscale.optim.stages import ALL, WeightsConfig
from mmscale.run.config import RunConfig
from mmscale.run.folder import CHECKPOINTS
from mmscale.run.image_tokens import foreign_codes


def check_stage_weights(config: RunConfig, world: World, state: TrainState) -> None:
    """Check the sources of all stages that have not begun. All ranks must call.

    Reads no weights but those of an image tokenizer, on rank 0, if a stage has images as stored codes.

    Args:
        config: The run.
        world: This rank.
        state: The state that the run resumes from. A stage that has begun no longer needs its sources.

    Raises:
        ConfigError: a source is missing or incomplete, or has no weights that fit; or it is an image tokenizer, and
            another one encoded the images of the stage. Every rank raises.
    """
    raise_on_any_rank(world, next(_problems(config, state, world), None), ConfigError)


def check_initial_weights(loaded: Loaded[RunConfig]) -> None:
    """Reject a run that takes its model from a run folder (``base:``) and would train it from random values.

    ``stages.0.weights: []``, written in a file or as an override, allows it.

    Raises:
        ConfigError: the first stage neither loads weights nor sets ``weights``.
    """
    first = loaded.value.stages[0]
    origin = loaded.origins.get("stages.0.weights")
    if first.weights or origin is None or origin.kind != "default":
        return
    for key, origin in loaded.origins.items():
        run = origin.files[-1].parent if len(origin.files) > 1 and key.startswith("model.") else None
        if run is not None and origin.files[-1].name == RUN_CONFIG and (run / CHECKPOINTS).is_dir():
            raise ConfigError(
                f"stages.0.weights: missing, and the model comes from the run {run} ({origin}); to begin with its "
                f"weights add `weights: [{{checkpoint: {run}}}]` to the stage {first.name}, or, to begin with random "
                "values, `weights: []`"
            )


def _problems(config: RunConfig, state: TrainState, world: World) -> Iterator[str]:
    for number, stage in config.stages_from(state.stage_index + (state.stage_step > 0)):
        if not stage.weights:
            continue
        model = build_weights(config.stage_model(number))
        for index, source in enumerate(stage.weights):
            place = f"stages.{number}.weights.{index}.checkpoint={source.checkpoint}"
            try:
                path = newest_of(source.checkpoint)
                manifest = read_manifest(path)
                require_bases(path)
                reason = missing_or_truncated(path, manifest)
                reason = reason or warm_start_problem(
                    manifest, path, model, _components(source), ema=source.ema, upcycle=stage.upcycle
                )
                if reason is None and world.is_main and {ALL, TOKENIZER} & set(source.components):
                    reason = foreign_codes(config.stage_data(number), path, ema=source.ema)
            except (CheckpointError, DataPipelineError) as error:
                reason = str(error)
            if reason is not None:
                yield f"{place}: {reason}"


def load_stage_weights(engine: Engine, source: WeightsConfig) -> tuple[Path, LoadReport]:
    """Load the weights of one source into the engine of a stage that begins. All ranks must call.

    If the model has adapters, the checkpoints of the run name the source instead of storing what stays frozen.

    Returns:
        The checkpoint, and which of its weights were loaded.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or holds no parameter that fits; every rank raises. The
            engine's weights are then unchanged.
    """
    path = newest_on_rank_0(engine.world, source.checkpoint)
    lasting = ADAPTERS in engine.parameter_counts
    upcycle = engine.stage.upcycle
    return path, warm_start(engine, path, _components(source), ema=source.ema, lasting=lasting, upcycle=upcycle)


def newest_on_rank_0(world: World, source: Path) -> Path:
    """Return the newest checkpoint that rank 0 finds: another run may be saving in that folder. All ranks must call.

    Raises:
        CheckpointError: no checkpoint is whole; every rank raises.
    """
    newest, message = source, None
    try:
        newest = newest_of(source)
    except CheckpointError as error:
        message = str(error)
    raise_on_any_rank(world, message, CheckpointError)
    if newest == source:
        return source
    step = all_reduce_sum_list(world, [float(step_of(newest)) if world.is_main else 0.0])[0]
    return newest.parent / folder_name(int(step))


def _components(source: WeightsConfig) -> tuple[str, ...] | None:
    return None if source.components == (ALL,) else source.components
