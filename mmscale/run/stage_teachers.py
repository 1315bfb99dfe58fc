"""Find, check and open the frozen models of a stage: teachers, the reference of preferences, or a perceptual tower.

    stages.*.distill --newest checkpoint, recorded in TrainState.extra--> manifest: configuration, vocabulary
                     --each rank loads its own ranges--> Teacher

A stage loads other weights once, at its beginning (``stage_weights``), but needs its teachers until its end. So a run
that resumes inside a stage requires the same teacher checkpoint, identified by the checksum of its manifest, even if
the teacher's run has written newer ones since.

A reference model and the tower of a perceptual loss are found and recorded in the same way. If the reference is the
model at the beginning of the stage (``preference.reference: start``), the checkpoint of the previous stage is linked to
``RUN/references/STAGE``, because ``checkpoint.keep_last`` removes it from the run's checkpoints. If the data hold the
log-probabilities of the reference (``template.stored_reference``), the stage only compares its checksum and does not
load it.

Source: the setting is that of Llama 3.2 1B and 3B, with the logits of 8B and 70B (Meta 2024, model card).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from data_pipeline.media_spec import MediaSpec, ModalitySpec
from mmscale.checkpoint import TrainState
from mmscale.checkpoint.load import fill_frozen
from mmscale.checkpoint.manifest import (
    Manifest,
    checkpoints_of,
    folder_name,
    is_whole,
    manifest_checksum,
    missing_or_truncated,
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
from mmscale.models.build import TowerAlone, TrainedModel, build_unset, build_weights, media_spec
from mmscale.models.config import ModelConfig, TokenizerConfig, TowerConfig
from mmscale.models.multimodal import MultimodalModel
from mmscale.objectives.perceptual import PerceptualTower
from mmscale.objectives.teacher import Teacher
from mmscale.optim.stages import DistillConfig
from mmscale.run.config import RunConfig
from mmscale.run.folder import CHECKPOINTS, REFERENCES
from mmscale.run.perceptual_tower import perceptual_loss, perceptual_model, unfit_tower
from mmscale.run.stage_weights import newest_on_rank_0

_KEY = "teachers"
"""Key of ``TrainState.extra``. Its value maps a configured path to (checkpoint, checksum of its manifest)."""
_STORED = "stored"
"""Key for the checksum of a reference whose log-probabilities the data hold; it has no checkpoint."""

_Recorded = Mapping[str, tuple[str, str]]


def teacher_sources(config: RunConfig, number: int) -> tuple[DistillConfig, ...]:
    """Return the frozen models that stage ``number`` loads: teachers, the reference of preferences, or a tower."""
    if (perceptual := perceptual_loss(config, number)) is not None:
        return (DistillConfig(checkpoint=perceptual.tower, ema=perceptual.ema),)
    if config.stored_reference(number) is not None:
        return ()
    return reference_source(config, number) if config.stages[number].preference else config.stages[number].distill


def reference_source(config: RunConfig, number: int) -> tuple[DistillConfig, ...]:
    """Return the reference of the preference loss of stage ``number``, loaded or not; empty without a reference."""
    stage = config.stages[number]
    assert stage.preference is not None, "the caller checked it"
    reference = stage.preference.reference
    if isinstance(reference, Path):
        return (DistillConfig(checkpoint=reference),)
    if reference == "none":
        return ()
    if stage.weights:
        return tuple(DistillConfig(checkpoint=source.checkpoint, ema=source.ema) for source in stage.weights)
    return (DistillConfig(checkpoint=config.run_dir / REFERENCES / stage.name),)


def reference_is_previous(config: RunConfig, number: int) -> bool:
    """Return whether the reference of stage ``number`` is the end of the stage before, so that no file exists yet."""
    preference = config.stages[number].preference
    return preference is not None and preference.reference == "start" and not config.stages[number].weights


def _links_start(config: RunConfig, number: int) -> bool:
    """Return whether the stage keeps the end of the stage before as its reference."""
    return reference_is_previous(config, number) and config.stored_reference(number) is None


def reference_checksum(path: Path, ema: bool) -> str:
    """Return the checksum of a reference model, as ``template.stored_reference`` names it.

    Args:
        path: The checkpoint.
        ema: Whether its averaged weights are the reference.

    Raises:
        CheckpointError: it has no manifest.
    """
    return _reference_name(manifest_checksum(path), ema)


def _reference_name(checksum: str, ema: bool) -> str:
    """Return the text for a configuration. Without the prefix, YAML would read 12345678 or 1234e567 as a number."""
    return f"crc32:{checksum}" + ("-ema" if ema else "")


def _other_reference(config: RunConfig, number: int, state: TrainState, *, begins: bool) -> str | None:
    """Return why the stored log-probabilities of stage ``number`` are not of its reference; None if they are.

    Args:
        config: The run.
        number: The stage.
        state: The state of the run.
        begins: Whether the stage begins now, so that the run's newest checkpoint can be its reference.
    """
    stored = config.stored_reference(number)
    if stored is None:
        return None
    (source,) = reference_source(config, number)
    if number == state.stage_index and state.stage_step:
        # A stage that began with a loaded reference recorded the checksum of its checkpoint alone.
        recorded = _recorded(state).items()
        began = [
            checksum if key == _STORED else _reference_name(checksum, source.ema) for key, (_, checksum) in recorded
        ]
        reason = f"template.stored_reference={stored}, but this stage began with the reference model {''.join(began)}"
        return None if began in ([], [stored]) else reason
    path = source.checkpoint
    if reference_is_previous(config, number):
        if not begins:
            return None  # The reference does not exist yet.
        path = config.run_dir / CHECKPOINTS / folder_name(state.step)
    try:
        found = reference_checksum(newest_of(path), source.ema)
    except CheckpointError as error:
        return str(error)
    if found == stored:
        return None
    return (
        f"template.stored_reference={stored}, but the reference model {path} has the checksum {found}; compute its "
        "log-probabilities with: mmscale data reference"
    )


def check_teachers(config: RunConfig, world: World, state: TrainState) -> None:
    """Check the teachers of the current and of all later stages. Reads no weights. All ranks must call.

    Args:
        config: The run.
        world: This rank.
        state: The state that the run resumes from.

    Raises:
        ConfigError: a teacher is missing or incomplete, is not the one that the stage began with, or does not fit the
            stage's model; every rank raises.
    """
    raise_on_any_rank(world, next(_problems(config, state), None), ConfigError)


def _problems(config: RunConfig, state: TrainState) -> Iterator[str]:
    is_over = state.stage_step == config.stages[state.stage_index].steps
    for number, stage in config.stages_from(state.stage_index + is_over):
        if (other := _other_reference(config, number, state, begins=False)) is not None:
            yield f"stages.{number}.preference.reference: {other}"
        if _links_start(config, number) and not (number == state.stage_index and state.stage_step):
            continue
        for index, source in enumerate(teacher_sources(config, number)):
            try:
                path = _find(source, _recorded(state) if number == state.stage_index else {})
                manifest = read_manifest(path)
                reason = missing_or_truncated(path, manifest) or _unfit(config, number, source, manifest, path)
            except CheckpointError as error:
                reason = str(error)
            if reason is not None:
                key = f"distill.{index}.checkpoint" if stage.distill else "preference.reference"
                key = key if perceptual_loss(config, number) is None else "reconstruction.perceptual.tower"
                yield f"stages.{number}.{key}={source.checkpoint}: {reason}"


def record_teachers(config: RunConfig, world: World, state: TrainState) -> TrainState:
    """Return the state with the checkpoints of its stage's teachers in ``extra``. All ranks must call.

    A resumed run then uses the same teachers.

    Raises:
        CheckpointError: a teacher is missing, or the reference cannot be linked.
    """
    raise_on_any_rank(world, _other_reference(config, state.stage_index, state, begins=True), CheckpointError)
    if _links_start(config, state.stage_index) and not state.stage_step:
        _link_start(config, world, state)
    stored = config.stored_reference(state.stage_index)
    chosen = {} if stored is None else {_STORED: ("", stored)}
    for source in teacher_sources(config, state.stage_index):
        key = str(source.checkpoint)
        recorded = _recorded(state)
        path = _find(source, recorded) if key in recorded else newest_on_rank_0(world, source.checkpoint)
        chosen[key] = (str(path), manifest_checksum(path))
    extra = {key: value for key, value in state.extra.items() if key != _KEY}
    return replace(state, extra={**extra, _KEY: chosen} if chosen else extra)


def _link_start(config: RunConfig, world: World, state: TrainState) -> None:
    """Link the files of the newest checkpoint of the run to the folder of the stage's reference."""
    message = None
    if world.is_main:
        source = config.run_dir / CHECKPOINTS / folder_name(state.step)
        target = config.run_dir / REFERENCES / config.stages[state.stage_index].name
        partial_folder = target.with_name(f"{target.name}.partial")
        try:
            for old in (partial_folder, target):
                if old.exists():
                    shutil.rmtree(old)
            shutil.copytree(source, partial_folder, copy_function=_link_or_copy)
            partial_folder.rename(target)
        except OSError as error:
            message = f"{target}: cannot hold the reference model of the stage: {error}"
    raise_on_any_rank(world, message, CheckpointError)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # The file system has no hard links.
        shutil.copy2(source, target)


def open_teachers(config: RunConfig, world: World, state: TrainState) -> list[Teacher] | list[PerceptualTower]:
    """Build the teachers of the state's stage and load their weights. All ranks must call.

    Args:
        config: The run.
        world: This rank.
        state: The state that ``record_teachers`` returned.

    Raises:
        CheckpointError: a teacher is damaged; every rank raises.
    """
    number = state.stage_index
    sources = [
        (source, Path(state.extra[_KEY][str(source.checkpoint)][0])) for source in teacher_sources(config, number)
    ]
    perceptual, model = perceptual_loss(config, number), config.stage_model(number)
    if perceptual is not None and isinstance(model, TokenizerConfig):
        ((source, path),) = sources
        tower = _open(config, world, source, path, perceptual_model(perceptual, read_manifest(path), path))
        return [PerceptualTower(cast(TowerAlone, tower), model.image_size)]
    whole = [_open(config, world, source, path, _configuration(read_manifest(path), path)) for source, path in sources]
    return [
        Teacher(cast(MultimodalModel, teacher), source.weight, source.temperature)
        for teacher, (source, _) in zip(whole, sources, strict=True)
    ]


def _open(
    config: RunConfig, world: World, source: DistillConfig, path: Path, model: ModelConfig | TowerConfig
) -> TrainedModel | TowerAlone:
    verify_together(world, path)
    precision = choose_precision(config.engine, world.device)
    build = partial(build_unset, model, attention=config.engine.attention, dtype=precision.dtype)
    fill = partial(fill_frozen, path=path, zero_stage=config.engine.zero_stage, world=world, ema=source.ema)
    # Convert before loading. Below stage 3 DeepSpeed would convert the loaded weights, at twice the memory.
    return construct(lambda: build().to(precision.dtype), config.engine, world, fill)


def teacher_models(config: RunConfig, number: int) -> list[ModelConfig]:
    """Return the model configurations of the ``teacher_sources`` of stage ``number``, which it loads.

    A perceptual tower is left out. The reference of a stage that begins with it has the configuration of that model,
    also if its checkpoint is missing.

    Raises:
        CheckpointError: a teacher is missing, or cannot teach.
    """
    preference = config.stages[number].preference
    if perceptual_loss(config, number) is not None:
        return []
    if preference is not None and preference.reference == "start" and config.stored_reference(number) is None:
        return [config.decoder_model(max(number - 1, 0))]
    paths = [newest_of(source.checkpoint) for source in teacher_sources(config, number)]
    return [_configuration(read_manifest(path), path) for path in paths]


def _recorded(state: TrainState) -> _Recorded:
    """Return the teachers that the stage began with; none at the beginning of a stage."""
    return state.extra.get(_KEY, {}) if state.stage_step else {}


def _find(source: DistillConfig, recorded: _Recorded) -> Path:
    """Return the checkpoint that the stage began with, or the newest one if the teacher is not recorded."""
    if str(source.checkpoint) not in recorded:
        return newest_of(source.checkpoint)
    begun, checksum = recorded[str(source.checkpoint)]
    for path in checkpoints_of(source.checkpoint):
        if is_whole(path) and manifest_checksum(path) == checksum:
            return path
    raise CheckpointError(
        f"this stage began with the teacher {begun} (checksum {checksum}), which is gone or has changed; put it back, "
        "or begin the stage again"
    )


def _configuration(manifest: Manifest, path: Path) -> ModelConfig:
    """Return the model configuration in a teacher's checkpoint.

    Raises:
        CheckpointError: the checkpoint records no configuration, or its model predicts no tokens.
    """
    model = model_config_of(manifest, path)
    if not isinstance(model, ModelConfig) or not model.predicts_tokens:
        raise CheckpointError(f"{path} holds towers, which predict no tokens, so it cannot be a teacher")
    return model


def _unfit(config: RunConfig, number: int, source: DistillConfig, manifest: Manifest, path: Path) -> str | None:
    """Return why the checkpoint cannot be a frozen model of stage ``number``, or None."""
    perceptual, model = perceptual_loss(config, number), config.stage_model(number)
    if perceptual is not None and isinstance(model, TokenizerConfig):
        return unfit_tower(perceptual, model, manifest, path)
    distills = bool(config.stages[number].distill)
    return unfit(manifest, path, config.decoder_model(number), source, distills=distills)


def unfit(manifest: Manifest, path: Path, student: ModelConfig, source: DistillConfig, *, distills: bool) -> str | None:
    """Return why the checkpoint cannot teach ``student``, or None."""
    teacher = _configuration(manifest, path)
    if source.ema and not manifest.ema:
        return f"{path} holds no average of the weights: it was saved without stages.*.ema"
    if not (report := match(build_weights(teacher), manifest)).complete:
        return f"{path} does not hold the weights of its own model configuration: {report}"
    if distills and student.decoder.separate_image_tokens is not None:
        return (
            "the student has model.decoder.image_tokens.kind=separate, whose head has no distillation loss; leave out "
            "distill in stages that draw"
        )
    theirs, mine = (model.decoder.vocab_size + model.decoder.predicted_rows for model in (teacher, student))
    if theirs != mine:
        return (
            f"the teacher has logits for {theirs} token ids and the student for {mine}; distillation needs one "
            "vocabulary for both"
        )
    if teacher.decoder.num_ids < student.decoder.num_ids:
        return (
            f"the teacher embeds {teacher.decoder.num_ids} token ids, the student's data have {student.decoder.num_ids}"
        )
    differences = list(_differences(media_spec(teacher), media_spec(student)))
    if differences:
        return f"teacher and student read the same batches, but do not take images alike: {'; '.join(differences)}"
    return None


def _without_cost(value: Any) -> Any:
    """Return the inputs of videos or of a further modality without their cost; other values as they are."""
    if not isinstance(value, ModalitySpec | MediaSpec):
        return value
    inputs: Any = value
    return replace(inputs, **{each.name: 0.0 for each in fields(inputs) if each.name.startswith("cost")})


def _differences(theirs: MediaSpec, mine: MediaSpec) -> Iterator[str]:
    for field in fields(MediaSpec):
        there, here = (_without_cost(getattr(spec, field.name)) for spec in (theirs, mine))
        if there != here and field.name != "cost_per_patch":  # Only packing uses it, with the student's value.
            yield f"{field.name} is {there} of the teacher, {here} of the student"
