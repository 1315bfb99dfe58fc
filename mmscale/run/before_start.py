"""Everything that can be checked before the first step of a run: ``mmscale train`` and ``config validate`` share it.

check_before_start   configuration, files, data, this machine      before the ranks join
check_resume         checkpoint, stages, weights, teachers         before any model is built, all ranks
check_run_folder     lock, finished run, newest checkpoint, the saved data position: what a start finds in the
                     folder; only for ``config validate``, since ``train`` takes the lock and resumes
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from data_pipeline.errors import DataPipelineError
from data_pipeline.loader.loader import Loader
from data_pipeline.order.state import LoaderState
from mmscale.bad_steps.roll_back import apply_pending, is_abandoned, pending_roll_back, read_roll_backs, resume_state
from mmscale.checkpoint import TrainState
from mmscale.checkpoint.load import resume_problem
from mmscale.checkpoint.manifest import list_checkpoints, missing_or_truncated, read_manifest
from mmscale.config import Loaded, located
from mmscale.dist import World, device_type, lowest_rank_error
from mmscale.engine.optimizers.muon import check_muon
from mmscale.engine.precision import choose_precision
from mmscale.errors import CheckpointError, ConfigError, DamagedError, UnsupportedError
from mmscale.io.lock import holder_of
from mmscale.metrics.faults import quarantine_lists
from mmscale.models.build import build_weights
from mmscale.models.config import ModelConfig
from mmscale.nn.attention_backends import check_backend, check_dropout, resolve_backend
from mmscale.optim.config import MuonConfig
from mmscale.optim.schedule import freeze
from mmscale.run.config import RunConfig
from mmscale.run.file_checks import check_files
from mmscale.run.folder import BAD_STEPS, CHECKPOINTS, FAULTS, check_position
from mmscale.run.stage_teachers import check_teachers
from mmscale.run.stage_weights import check_initial_weights, check_stage_weights
from mmscale.run.starts import reject_or_report_finished


def check_before_start(loaded: Loaded[RunConfig]) -> list[str]:
    """Check configuration, files, data, and whether this machine can compute as configured. Each rank calls it alone.

    Returns:
        Warnings.

    Raises:
        MMScaleError, DataPipelineError: a check fails; see ``check_files``.
    """
    config = loaded.value
    with located(loaded):
        notes = check_files(config)
    check_initial_weights(loaded)
    device = torch.device(device_type(config.engine.device))
    dtype = choose_precision(config.engine, device).dtype
    check_backend(config.engine.attention, dtype)
    for number, stage in enumerate(config.stages):
        if isinstance(model := config.stage_model(number), ModelConfig):
            check_dropout(resolve_backend(config.engine.attention, dtype), model.decoder.attention_dropout)
        if isinstance(stage.optimizer, MuonConfig):
            try:
                check_muon()
            except UnsupportedError as error:
                raise UnsupportedError(f"stages.{number}.optimizer.kind=muon: {error}") from error
    return notes


def current_stage(config: RunConfig, state: TrainState) -> TrainState:
    """Return the state at the beginning of the next stage if its stage is over, else the state itself."""
    if state.stage_step == config.stages[state.stage_index].steps and state.step < config.total_steps:
        return replace(state, stage_index=state.stage_index + 1, stage_step=0)
    return state


def check_resume(config: RunConfig, world: World, state: TrainState, latest: Path | None) -> None:
    """Check the position of a checkpoint in the stages, and the sources of later stages. All ranks must call.

    Args:
        config: The run.
        world: This rank.
        state: The state to resume from.
        latest: The checkpoint; None at the beginning of the run.

    Raises:
        ConfigError: the stages do not contain the checkpoint's step, or a source of weights or a teacher does not fit.
            Every rank raises.
    """
    if latest:
        check_position(config, state, latest)
    check_stage_weights(config, world, state)
    check_teachers(config, world, state)


def open_loader(config: RunConfig, world: World, state: TrainState, position: LoaderState | None) -> Loader:
    """Open the loader of the state's stage. All ranks must call.

    The loader starts at ``position`` if given. Otherwise a stage that begins, and whose data or crops differ from those
    of the previous stage, starts at the beginning of its data. All others start at the position in ``state``.

    Raises:
        DataPipelineError: the data cannot be opened, or the saved position does not fit the data; every rank raises.
    """
    data = config.stage_data(state.stage_index)
    fresh = state.stage_step == 0 and not config.continues(state.stage_index)
    mine: DataPipelineError | None = None
    try:
        loader = Loader(
            data,
            config.stage_media(state.stage_index),
            seed=config.seed,
            rank=world.rank,
            world_size=world.world_size,
            micro_lanes=config.engine.micro_lanes,
            state=position or (None if fresh else state.loader),
            quarantine=quarantine_lists(config.run_dir / FAULTS, data.faults),
        )
    except DataPipelineError as error:
        mine = error
    if (message := lowest_rank_error(world, None if mine is None else str(mine))) is not None:
        raise mine or DataPipelineError(message)
    return loader


def check_run_folder(config: RunConfig) -> list[str]:
    """Check what a start on one rank would find in the run folder, and change nothing there.

    Unlike a start it compares only the sizes of the checkpoint's files.

    Returns:
        Notes: the folder is in use, the run is finished, or where a start would resume.

    Raises:
        MMScaleError, DataPipelineError: a start with this configuration would fail.
    """
    world = World(0, 1, 0, torch.device("cpu"))
    notes = []
    if (holder := holder_of(config.run_dir)) is not None:
        notes.append(holder)
    if reject_or_report_finished(config, world):
        return notes
    roll_backs = read_roll_backs(config.run_dir / BAD_STEPS)
    latest = next(_usable_checkpoints(config, notes), None)
    before = resume_state(latest, roll_backs)
    pending = pending_roll_back(before, roll_backs)
    _, state = apply_pending(before, roll_backs)
    check_resume(config, world, state, latest)
    current = current_stage(config, state)
    with open_loader(config, world, current, None if pending is None else pending.position):
        pass
    if latest and current.stage_step:
        _check_model(config, current, latest)
    if latest:
        notes.append(f"a start resumes from {latest} (step {state.step} of {config.total_steps})")
    return notes


def _check_model(config: RunConfig, state: TrainState, latest: Path) -> None:
    """Check that a checkpoint is of the stage's model and optimizer, as the engine does before it loads."""
    stage = config.stages[state.stage_index]
    model = build_weights(config.stage_model(state.stage_index))
    freeze(model, model.components(), stage)
    if (problem := resume_problem(model, stage, latest, read_manifest(latest))) is not None:
        raise CheckpointError(problem)


def _usable_checkpoints(config: RunConfig, notes: list[str]) -> Iterator[Path]:
    """Yield the checkpoints that a start would try, newest first, and add a note for each that it would set aside."""
    roll_backs = read_roll_backs(config.run_dir / BAD_STEPS)
    for path in reversed(list_checkpoints(config.run_dir / CHECKPOINTS)):
        if is_abandoned(path, roll_backs):
            continue
        try:
            problem = missing_or_truncated(path, read_manifest(path))
        except DamagedError as error:
            problem = str(error)
        if problem is None:
            yield path
        elif config.checkpoint.on_damage == "stop":
            raise ConfigError(
                f"{path} is damaged: {problem}; to resume from the checkpoint before it, set "
                "checkpoint.on_damage=previous"
            )
        else:
            notes.append(f"{path} is damaged ({problem}); a start sets it aside")
