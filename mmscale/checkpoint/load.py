"""Choose, verify and load checkpoints.

``resume`` restores the exact state of an engine. ``load_weights`` fills a plain module, and ``fill_frozen`` a frozen
model that may be sharded. World size and ZeRO stage may differ from those of the save.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.order.state import LoaderState
from mmscale.checkpoint.config import CheckpointConfig
from mmscale.checkpoint.manifest import (
    DAMAGED,
    Manifest,
    TrainState,
    folder_name,
    list_checkpoints,
    read_manifest,
    read_state,
    require_bases,
    step_of,
    wrong_name,
)
from mmscale.checkpoint.reshard import CheckpointReader, verify, verify_together, whole_parameter
from mmscale.checkpoint.save import model_config_values, tied_names
from mmscale.checkpoint.share import persistent_buffers
from mmscale.dist import World, all_reduce_sum_list, broadcast_bytes, raise_on_any_rank
from mmscale.engine.engine import Engine
from mmscale.engine.partition import frozen_ranges, parameter_table
from mmscale.errors import CheckpointError, DamagedError
from mmscale.io.files import set_aside
from mmscale.optim.stages import StageConfig

_MAX_LISTED = 3


def choose(
    world: World,
    directory: Path,
    config: CheckpointConfig,
    note: Callable[[str], None] = lambda text: None,
    passes: Callable[[Path], bool] = lambda path: True,
) -> Path | None:
    """Return the newest good checkpoint, after verifying every byte of it. All ranks must call.

    With ``on_damage=previous`` rank 0 renames each damaged checkpoint to ``step-N.damaged``. Its step can then be saved
    again, and retention no longer counts it.

    Args:
        world: This rank.
        directory: ``checkpoints`` folder of the run, shared by all ranks. Only rank 0 lists it.
        config: ``on_damage`` decides whether to stop at a damaged checkpoint or to try the one before it.
        note: Called with a line for each skipped checkpoint. Some lines appear on rank 0 only.
        passes: Called on rank 0; checkpoints for which it returns False are ignored.

    Returns:
        None if no checkpoint passes, or if all that pass were damaged and renamed.

    Raises:
        DamagedError: a checkpoint is damaged and ``on_damage`` is ``stop``.
        CheckpointError: a checkpoint cannot be read or renamed, or no checkpoint is good and a folder holds another
            step than its name gives. All ranks raise.
    """
    candidates, strays = _candidates(world, directory, passes)
    for stray in strays:
        note(f"skipped: {stray}")
    for path in candidates:
        try:
            verify_together(world, path)
        except DamagedError as error:
            if config.on_damage == "stop":
                raise DamagedError(
                    f"{error}; to resume from the checkpoint before it, set checkpoint.on_damage=previous"
                ) from error
            note(f"skipped: {error}")
            _set_aside(world, path, note)
            continue
        return path
    raise_on_any_rank(world, next(iter(strays), None), CheckpointError)
    if candidates:
        note(f"no usable checkpoint is left in {directory}: the run starts again at its first step")
    return None


def _candidates(world: World, directory: Path, passes: Callable[[Path], bool]) -> tuple[list[Path], list[str]]:
    """List the checkpoints that rank 0 sees, newest first. All ranks must call.

    Returns:
        The checkpoints, equal on all ranks, and on rank 0 a sentence for each folder with a wrong name.
    """
    steps: list[float] = []
    strays = []
    for path in filter(passes, reversed(list_checkpoints(directory)) if world.is_main else ()):
        if (problem := wrong_name(path)) is not None:
            strays.append(problem)
        else:
            steps.append(float(step_of(path)))
    count = int(all_reduce_sum_list(world, [float(len(steps))])[0])
    agreed = all_reduce_sum_list(world, steps if world.is_main else [0.0] * count)
    return [directory / folder_name(int(step)) for step in agreed], strays


def _set_aside(world: World, path: Path, note: Callable[[str], None]) -> None:
    """Rename a damaged checkpoint on rank 0. All ranks must call, and all raise if that fails."""
    complaint = None
    if world.is_main:
        try:
            note(f"{path} is set aside as {set_aside(path, DAMAGED).name}; remove it when you no longer need it")
        except OSError as error:
            complaint = f"{path} is damaged and cannot be renamed: {error.strerror}"
    raise_on_any_rank(world, complaint, CheckpointError)


def resume(engine: Engine, path: Path, *, verified: bool = False) -> TrainState:
    """Restore the exact state of an engine. All ranks must call.

    Restores weights, optimizer state, the average of the weights, step counts, buffers, loss scaler and random state.
    The engine changes only after all bytes are verified and all ranks agree that the checkpoint holds everything that
    the engine needs. With the world size of the save, training continues bit-identically. With another one, sums are
    rounded in another order.

    Args:
        engine: Mutated; at any step.
        path: Checkpoint folder.
        verified: True if ``choose`` has just verified the checkpoint: skip that here.

    Returns:
        The progress of the run, with the loader state of all lanes.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, of another model or of another stage. All ranks raise.
    """
    if not verified:
        verify_together(engine.world, path)
    complaint, world = None, engine.world
    try:
        saved_ranks = read_manifest(path).world_size
        near = world.rank * saved_ranks // world.world_size
        with CheckpointReader(path, check_sizes=False, near=near) as reader:
            complaint = _resume_problem(engine, reader)
            random_state = _random_state(world, reader)
    except CheckpointError as error:
        complaint = str(error)
    raise_on_any_rank(world, complaint, CheckpointError)
    state = read_state_together(world, path)
    with reader:
        for owned in engine.partition.owned(whole=True):
            name = owned.name
            reader.fill(owned.master, name, reader.weights_kind(name), owned.start)
            for kind, kept in owned.moments.items():
                values = kept.float()  # The tensor itself, or a dequantised copy of 8-bit state.
                reader.fill(values, name, kind, owned.start)
                kept.copy_(values)
        for key, values in engine.partition.whole_state().items():
            values.copy_(reader.whole(key))
        _load_buffers(engine.model, reader)
        engine.set_loss_scaler_state(reader.manifest.loss_scaler)
        engine.partition.set_optimizer_steps(reader.manifest.optimizer_steps)
        if "cpu" in random_state:
            torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state:
            torch.cuda.set_rng_state(random_state["cuda"], engine.world.device)
        engine.stage_step = reader.manifest.state.stage_step
        engine.frozen_sources = reader.frozen_sources
    engine.partition.publish()
    return state


def read_state_together(world: World, path: Path) -> TrainState:
    """Read the progress of the run on rank 0, and send it to all ranks. All ranks must call.

    Otherwise each of thousands of ranks would read the metadata of all ranks.

    Raises:
        CheckpointError: as ``read_state``. All ranks raise.
    """
    complaint, text = None, b""
    if world.is_main:
        try:
            state = read_state(path)
            loader = None if state.loader is None else state.loader.to_dict()
            text = json.dumps({**vars(state), "loader": loader}).encode()
        except CheckpointError as error:
            complaint = str(error)
    raise_on_any_rank(world, complaint, CheckpointError)
    values = json.loads(broadcast_bytes(world, text))
    loader = values.pop("loader")
    return TrainState(**values, loader=None if loader is None else LoaderState.from_dict(loader))


def _resume_problem(engine: Engine, reader: CheckpointReader) -> str | None:
    """Return the reason why this rank cannot resume from the checkpoint; None if it can."""
    path, manifest = reader.path, reader.manifest
    if (problem := resume_problem(engine.model, engine.stage, path, manifest)) is not None:
        return problem
    if missing := list(_missing_state(engine, reader)):
        return f"{path} does not hold everything that stage {manifest.stage!r} needs to resume: {_first(missing)}"
    return None


def resume_problem(model: nn.Module, stage: StageConfig, path: Path, manifest: Manifest) -> str | None:
    """Return the reason why a stage cannot resume from a checkpoint; None if model, stage and optimizer fit.

    Args:
        model: The model of the stage, with its other components frozen; may be on the meta device.
        stage: The stage.
        path: The checkpoint, for messages.
        manifest: Its manifest.
    """
    differences = list(_differences(manifest, model))
    if differences:
        return f"{path} is a checkpoint of another model: {_first(differences)}"
    table = parameter_table(model)
    other = [name for name, entry in manifest.parameters.items() if entry.trained != table[name]["trained"]]
    if manifest.stage != stage.name or other:
        return (
            f"{path} was saved in stage {manifest.stage!r}, this engine is in stage {stage.name!r} and trains "
            f"{'other' if other else 'the same'} parameters; put the stage's "
            "name and its train list back, or load the weights in a new stage (stages.*.weights)"
        )
    saved, here = (
        _describe_state(manifest.optimizer, manifest.ema),
        _describe_state(stage.optimizer.state_name, bool(stage.ema)),
    )
    if saved != here:
        return (
            f"{path} was saved with {saved}, stage {stage.name!r} now has {here}; restore stages.*.optimizer "
            "and stages.*.ema, or begin a new stage with the change (a new stage loads only weights)"
        )
    return None


def _missing_state(engine: Engine, reader: CheckpointReader) -> Iterator[str]:
    """Yield a sentence for each tensor of this rank's engine that the checkpoint lacks or holds in another shape."""
    for owned in engine.partition.owned(whole=True):
        for kind in (reader.weights_kind(owned.name), *owned.moments):
            if not reader.holds(owned.name, kind, owned.start):
                yield f"{owned.name}|{kind} is missing"
    for key, values in engine.partition.whole_state().items():
        if (shape := reader.whole_shape(key)) != tuple(values.shape):
            yield f"{key} is {'missing' if shape is None else list(shape)}, expected {list(values.shape)}"
    scaler, saved = engine.loss_scaler_state(), reader.manifest.loss_scaler
    if scaler is not None and saved is not None and scaler.keys() != saved.keys():
        yield f"the state of the loss scaler has {sorted(saved)}, expected {sorted(scaler)}"


def _describe_state(optimizer: str, ema: bool) -> str:
    return f"the state of {optimizer} and {'an' if ema else 'no'} average of the weights"


def load_weights(model: nn.Module, path: Path, *, ema: bool = False) -> None:
    """Load weights and buffers into a plain module, in one process, without DeepSpeed.

    Args:
        model: Mutated.
        path: Checkpoint folder. Every byte is verified first.
        ema: Load the exponential moving average of the trained weights instead of the weights.

    Raises:
        CheckpointError: the checkpoint is damaged, of another model, or has no average.
    """
    require_bases(path)
    if problems := verify(path):
        raise CheckpointError(f"{path} is damaged: {problems[0]}")
    with CheckpointReader(path) as reader:
        differences = list(_differences(reader.manifest, model))
        if differences:
            raise CheckpointError(f"{path} is a checkpoint of another model: {_first(differences)}")
        if ema and not reader.manifest.ema:
            raise CheckpointError(f"{path} holds no average of the weights: it was saved without stages.*.ema")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(whole_parameter(reader, name, ema=ema))
        _load_buffers(model, reader)


def fill_frozen(
    model: nn.Module, *, gather: object, path: Path, zero_stage: int, world: World, ema: bool = False
) -> None:
    """Load weights and buffers into a frozen model.

    Bind all arguments but ``model`` and ``gather`` with ``functools.partial``, and pass the result to
    ``mmscale.engine.construct.construct`` as ``initialise``. Each rank reads only the values that it keeps: at ZeRO
    stage 3 its shards, so no rank holds the whole model.

    Args:
        model: Mutated.
        gather: Unused: this function fills shards in place.
        path: Checkpoint folder of the same model. The caller has verified it with ``verify_together``.
        zero_stage: ZeRO stage that the model is constructed for.
        world: This rank.
        ema: Load the exponential moving average of the trained weights instead of the weights.
    """
    del gather
    with CheckpointReader(path, check_sizes=False, near=world.rank) as reader, torch.no_grad():
        for owned in frozen_ranges(model, zero_stage, world):
            stored = reader.manifest.stored_name(owned.name)
            assert stored is not None
            reader.fill(owned.master, stored, reader.weights_kind(stored, ema=ema), owned.start)
        _load_buffers(model, reader)


def _load_buffers(model: nn.Module, reader: CheckpointReader) -> None:
    for name, values in persistent_buffers(model).items():
        values.copy_(reader.buffer(name))


def _random_state(world: World, reader: CheckpointReader) -> dict[str, Tensor]:
    """Read the states of this rank's generators, by device type; empty if the save had fewer ranks.

    Raises:
        CheckpointError: a state is missing, or torch does not accept it.
    """
    if world.rank >= reader.manifest.world_size:
        return {}  # This rank keeps its initial seed.
    saved, states = reader.rank_metadata(world.rank).random_state, {}
    for device in ("cpu", "cuda") if world.device.type == "cuda" and "cuda" in saved else ("cpu",):
        try:
            states[device] = torch.tensor(list(bytes.fromhex(saved[device])), dtype=torch.uint8)
            torch.Generator(device).set_state(states[device])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{reader.path}: torch does not accept the random state of rank {world.rank} ({device}): {error!r}"
            ) from error
    return states


def _differences(manifest: Manifest, model: nn.Module) -> Iterator[str]:
    """Yield a sentence for each difference between model and checkpoint.

    Compares names and shapes of parameters and buffers, ties, and the configuration values that both have.
    """
    table = parameter_table(model)
    for name in table.keys() | manifest.parameters.keys():
        if name not in manifest.parameters:
            yield f"{name} is only in the model"
        elif name not in table:
            yield f"{name} is only in the checkpoint"
        elif tuple(table[name]["shape"]) != manifest.parameters[name].shape:
            yield f"{name} is {list(manifest.parameters[name].shape)} in the checkpoint, {table[name]['shape']} here"
    here = {name: tuple(values.shape) for name, values in persistent_buffers(model).items()}
    for name in here.keys() | manifest.buffers.keys():
        if name not in manifest.buffers:
            yield f"the buffer {name} is only in the model"
        elif name not in here:
            yield f"the buffer {name} is only in the checkpoint"
        elif here[name] != manifest.buffers[name]:
            yield f"the buffer {name} is {list(manifest.buffers[name])} in the checkpoint, {list(here[name])} here"
    if tied_names(model) != manifest.tied:
        yield f"tied parameters are {manifest.tied} in the checkpoint, {tied_names(model)} here"
    saved, values = manifest.model_config_values, model_config_values(model)
    if saved is not None and values is not None:
        yield from _config_differences("model", saved, values)


def _config_differences(path: str, saved: Any, here: Any) -> Iterator[str]:
    if isinstance(saved, Mapping) and isinstance(here, Mapping):
        for key in sorted(saved.keys() & here.keys()):
            yield from _config_differences(f"{path}.{key}", saved[key], here[key])
    elif saved != here:
        yield f"{path} is {saved!r} in the checkpoint, {here!r} here"


def _first(differences: list[str]) -> str:
    listed = "; ".join(sorted(differences)[:_MAX_LISTED])
    more = len(differences) - _MAX_LISTED
    return f"{listed}; and {more} more differences" if more > 0 else listed
