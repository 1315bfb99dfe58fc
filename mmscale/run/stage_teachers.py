"""The teachers of a stage: found, checked before the first step, and opened without any rank holding a whole one.

    stages.*.distill --newest checkpoint, remembered in the run's checkpoints--> manifest: configuration, vocabulary
                     --each rank its own ranges--> Teacher

Unlike weights that a stage takes once (``stage_weights``), a teacher is needed as long as its stage lasts. So a run
that goes on wants the very checkpoint that the stage began with, known by its manifest's checksum, also where the run
that made it has newer ones by now.

Source: the setting is that of Llama 3.2 1B and 3B, with the logits of 8B and 70B (Meta 2024, model card).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import cast

from data_pipeline.media_spec import MediaSpec
from mmscale.checkpoint import TrainState
from mmscale.checkpoint.load import fill_frozen
from mmscale.checkpoint.manifest import (
    Manifest,
    checkpoints_of,
    is_whole,
    manifest_checksum,
    missing_or_cut,
    model_config_of,
    newest_of,
    read_manifest,
)
from mmscale.checkpoint.reshard import verify_together
from mmscale.checkpoint.warm_start import match
from mmscale.dist import World, raise_on_any_rank
from mmscale.engine.construct import construct
from mmscale.engine.precision import choose_precision
from mmscale.errors import CheckpointError, ConfigError
from mmscale.models.build import build_model, build_weights, media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.multimodal import MultimodalModel
from mmscale.objectives.teacher import Teacher
from mmscale.optim.stages import DistillConfig
from mmscale.run.config import RunConfig
from mmscale.run.stage_weights import agreed_newest

_KEY = "teachers"
"""Of ``TrainState.extra``: configured path -> (checkpoint, checksum of its manifest), of the state's stage."""

_Known = Mapping[str, tuple[str, str]]


def check_teachers(config: RunConfig, world: World, state: TrainState) -> None:
    """Checks the teachers of the state's stage and of those to come, cheaply: no weights are read. All ranks must call.

    Args:
        config: The run.
        world: This rank.
        state: Where the run goes on.

    Raises:
        ConfigError: a teacher is missing or not whole, is not the one that the stage began with, or does not fit the
            stage's model; every rank raises.
    """
    raise_on_any_rank(world, next(_complaints(config, state), None), ConfigError)


def _complaints(config: RunConfig, state: TrainState) -> Iterator[str]:
    is_over = state.stage_step == config.stages[state.stage_index].steps
    for number, stage in config.stages_from(state.stage_index + is_over):
        for index, source in enumerate(stage.distill):
            try:
                path = _find(source, _known(state) if number == state.stage_index else {})
                manifest = read_manifest(path)
                reason = missing_or_cut(path, manifest) or _unfit(manifest, path, config.stage_model(number), source)
            except CheckpointError as error:
                reason = str(error)
            if reason is not None:
                yield f"stages.{number}.distill.{index}.checkpoint={source.checkpoint}: {reason}"


def note_teachers(config: RunConfig, world: World, state: TrainState) -> TrainState:
    """The state with its stage's teachers by checkpoint, so that whoever goes on takes the same. All ranks must call.

    Raises:
        CheckpointError: one is not there.
    """
    chosen = {}
    for source in config.stages[state.stage_index].distill:
        key = str(source.checkpoint)
        known = _known(state)
        path = _find(source, known) if key in known else agreed_newest(world, source.checkpoint)
        chosen[key] = (str(path), manifest_checksum(path))
    extra = {key: value for key, value in state.extra.items() if key != _KEY}
    return replace(state, extra={**extra, _KEY: chosen} if chosen else extra)


def open_teachers(config: RunConfig, world: World, state: TrainState) -> list[Teacher]:
    """The teachers of the state's stage, with their weights. All ranks must call.

    Args:
        config: The run.
        world: This rank.
        state: From ``note_teachers``.

    Raises:
        CheckpointError: one is damaged; every rank raises.
    """
    teachers = []
    for source in config.stages[state.stage_index].distill:
        path, _ = state.extra[_KEY][str(source.checkpoint)]
        teachers.append(_open(config, world, source, Path(path)))
    return teachers


def _open(config: RunConfig, world: World, source: DistillConfig, path: Path) -> Teacher:
    verify_together(world, path)
    model, precision = _configuration(read_manifest(path), path), choose_precision(config.engine, world.device)
    build = partial(build_model, model, attention=config.engine.attention, seed=None, dtype=precision.dtype)
    fill = partial(fill_frozen, path=path, zero_stage=config.engine.zero_stage, world=world, ema=source.ema)
    # Below stage 3 DeepSpeed would convert it; here it need not be read into twice the memory.
    whole = construct(lambda: build().to(precision.dtype), config.engine, world, fill)
    return Teacher(cast(MultimodalModel, whole), source.weight, source.temperature)


def teacher_models(config: RunConfig, number: int) -> list[ModelConfig]:
    """Configurations of the teachers of stage ``number``.

    Raises:
        CheckpointError: one is not there.
    """
    paths = [newest_of(source.checkpoint) for source in config.stages[number].distill]
    return [_configuration(read_manifest(path), path) for path in paths]


def _known(state: TrainState) -> _Known:
    return state.extra.get(_KEY, {}) if state.stage_step else {}


def _find(source: DistillConfig, known: _Known) -> Path:
    """The checkpoint that the stage began with; of a teacher that it did not know then, the newest."""
    if str(source.checkpoint) not in known:
        return newest_of(source.checkpoint)
    begun, checksum = known[str(source.checkpoint)]
    for path in checkpoints_of(source.checkpoint):
        if is_whole(path) and manifest_checksum(path) == checksum:
            return path
    raise CheckpointError(
        f"this stage began with the teacher {begun} (checksum {checksum}), which is gone or has changed; put it back, "
        "or begin the stage again"
    )


def _configuration(manifest: Manifest, path: Path) -> ModelConfig:
    """What to build for a teacher's weights.

    Raises:
        CheckpointError: the checkpoint does not say, or is of a tower.
    """
    model = model_config_of(manifest, path)
    if not isinstance(model, ModelConfig) or not model.predicts_tokens:
        raise CheckpointError(f"{path} holds towers; it expects no tokens, so it cannot teach")
    return model


def _unfit(manifest: Manifest, path: Path, student: ModelConfig, source: DistillConfig) -> str | None:
    """Why the checkpoint cannot teach ``student``."""
    teacher = _configuration(manifest, path)
    if source.ema and not manifest.ema:
        return f"{path} holds no average of the weights: it was saved without stages.*.ema"
    if not (report := match(build_weights(teacher), manifest)).complete:
        return f"{path} is not a checkpoint of the model that it says: {report}"
    theirs, mine = (model.decoder.vocab_size + model.decoder.predicted_rows for model in (teacher, student))
    if theirs != mine:
        return (
            f"the teacher has logits for {theirs} token ids and the student for {mine}; token by token they can only "
            "be compared over one vocabulary"
        )
    if teacher.decoder.num_ids < student.decoder.num_ids:
        return (
            f"the teacher reads {teacher.decoder.num_ids} token ids, the student's data have {student.decoder.num_ids}"
        )
    differences = list(_differences(media_spec(teacher), media_spec(student)))
    if differences:
        return f"teacher and student read the same batches, but do not take images alike: {'; '.join(differences)}"
    return None


def _differences(theirs: MediaSpec, mine: MediaSpec) -> Iterator[str]:
    for field in fields(MediaSpec):
        there, here = getattr(theirs, field.name), getattr(mine, field.name)
        if there != here and field.name != "cost_per_patch":  # That decides what is packed, by the student.
            yield f"{field.name} is {there} of the teacher, {here} of the student"
