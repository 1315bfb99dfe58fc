"""Make a smoke-test run from any run: the same stages with a tiny model on bundled data, which take seconds.

    model        the smoke-test model of every stage (``mmscale.shrink.model``).
    images       smaller, in proportion to the grid of that model.
    data sets    the bundled shards that fit the kind of template; special tokens of a layout or chat format are
                 replaced by ordinary tokens.
    stages       a few steps each, with warm-ups in proportion; no weights of other checkpoints, no upcycling (widths of
                 dense feed-forwards and experts shrink differently), and no teacher or perceptual tower. A
                 discriminator starts at the second step at the latest. The reference of preference optimisation is
                 the end of the stage before; in the first stage there is none.
    lanes        few, with packs of few documents.

A smoke-test run shows that the stages, components, optimizers, data overrides and model changes of a recipe work
together and resume. It does not show whether learning rates and mixtures are good. It omits distillation, because a
smoke-test teacher would have learned nothing. It needs the shards and the tokenizer of examples/emoji, for dialogues of
a text model the shards of examples/text, and for videos and sound those of examples/omni, relative to the working
directory.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig, DatasetConfig, WeightFrom
from data_pipeline.images.tilings import Tiling
from data_pipeline.images.transforms import TilesTransform, TransformConfig
from data_pipeline.images.video import VideoConfig
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.text.templates import (
    AnnotationsTemplate,
    CaptionTemplate,
    DialogueTemplate,
    InterleavedTemplate,
    PreferenceTemplate,
    TemplateConfig,
    TextTemplate,
)
from data_pipeline.text.templates.dialogue import SYSTEM, USER
from mmscale.evaluate import EvaluationConfig
from mmscale.models.build import media_spec
from mmscale.optim.stages import StageConfig
from mmscale.run.config import RunConfig
from mmscale.shrink.model import shrink, shrunk_side

_EMOJI = Path("examples/emoji")
_TALKS = Path("examples/text/shards/talks.manifest")
_PAIRS = Path("examples/text/shards/pairs.manifest")
_CLIPS = Path("examples/omni/shards/clips.manifest")
_SPEECH = Path("examples/omni/shards/speech.manifest")
_MAX_TILES = 4
_LONG_TOKENS = 65_536


def shrink_run(config: RunConfig, *, steps: int = 4, lanes: int = 2, keep_depth: bool = False) -> RunConfig:
    """Return the smoke-test configuration of a run.

    Args:
        config: The run.
        steps: Largest number of steps of each stage.
        lanes: Largest number of lanes of the global batch.
        keep_depth: Keep the number of blocks of each model.
    """
    stages = [_shrink_stage(config, number, steps, lanes, keep_depth) for number in range(len(config.stages))]
    model = shrink(config.model, keep_depth=keep_depth)
    half = max(1, steps // 2)
    return RunConfig.model_validate(
        {
            **config.model_dump(),
            "max_steps": None,
            "data": _shrink_data(config.data, config.media_spec, media_spec(model), lanes),
            "model": model,
            "stages": stages,
            "engine": config.engine.model_copy(
                update={
                    "precision": "auto",
                    "device": "auto",
                    "attention": "auto",
                    "micro_lanes": 1,
                    "expert_parallel": 1,
                }
            ),
            "checkpoint": config.checkpoint.model_copy(update={"every_steps": half, "keep_every": None}),
            "bad_steps": config.bad_steps.model_copy(update={"roll_back_steps": 1}),
            "evaluation": EvaluationConfig(captions=None),
        }
    )


def dropped_settings(config: RunConfig) -> list[str]:
    """Return a line for each weight source, upcycling, teacher, reference and list of sets that the run omits.

    Each line has the key and the value. Other settings that the smoke-test run changes are not listed.
    """
    weights = [
        f"stages.{number}.weights.{index}: {source.checkpoint} ({', '.join(source.components)})"
        for number, stage in enumerate(config.stages)
        for index, source in enumerate(stage.weights)
    ]
    upcycled = [f"stages.{number}.upcycle: true" for number, stage in enumerate(config.stages) if stage.upcycle]
    teachers = [
        f"stages.{number}.distill.{index}: {teacher.checkpoint}"
        for number, stage in enumerate(config.stages)
        for index, teacher in enumerate(stage.distill)
    ]
    teachers += [
        f"stages.{number}.reconstruction.perceptual: {stage.reconstruction.perceptual.tower}"
        for number, stage in enumerate(config.stages)
        if stage.reconstruction is not None and stage.reconstruction.perceptual is not None
    ]
    sets = ", ".join(held.name for held in config.evaluation.sets)
    drawings = [] if config.evaluation.drawings is None else ["evaluation.drawings"]
    references = [
        f"stages.{number}.preference.reference: {stage.preference.reference}"
        for number, stage in enumerate(config.stages)
        if (kept := _shrink_preference(stage, number)) is not None
        and stage.preference is not None
        and kept["reference"] != stage.preference.reference
    ]
    return [*weights, *upcycled, *teachers, *references, *([f"evaluation.sets: {sets}"] if sets else []), *drawings]


def _shrink_stage(config: RunConfig, number: int, steps: int, lanes: int, keep_depth: bool) -> dict[str, Any]:
    """Return a stage, with its complete data and model blocks where it changes them."""
    stage = config.stages[number]
    model = shrink(config.stage_model(number), keep_depth=keep_depth)
    data = _shrink_data(config.stage_data(number), config.stage_media(number), media_spec(model), lanes)
    return {
        **stage.with_steps(min(stage.steps, steps)).model_dump(),
        "weights": (),
        "upcycle": False,
        "distill": (),
        "preference": _shrink_preference(stage, number),
        "reconstruction": _shrink_losses(stage),
        "data": data.model_dump(mode="json") if _changes_data(stage, config, number) else None,
        "model": None if stage.model is None else model.model_dump(mode="json"),
    }


def _shrink_preference(stage: StageConfig, number: int) -> dict[str, Any] | None:
    """Return the preference loss. Its reference is the end of the stage before; the first stage has none."""
    if stage.preference is None:
        return None
    has_reference = stage.preference.reference != "none" and number > 0
    return {**stage.preference.model_dump(), "reference": "start" if has_reference else "none"}


def _shrink_losses(stage: StageConfig) -> dict[str, Any] | None:
    """Return the losses of an image tokenizer without a perceptual tower, and with an early start of both players."""
    if stage.reconstruction is None:
        return None
    losses = {**stage.reconstruction.model_dump(), "perceptual": None}
    if (game := losses["discriminator"]) is not None:
        losses["discriminator"] = {**game, "start_step": min(game["start_step"], 1)}
    return losses


def _changes_data(stage: StageConfig, config: RunConfig, number: int) -> bool:
    """Whether a stage changes the data block, or the image sizes of the model."""
    return stage.data is not None or config.stage_media(number) != config.media_spec


def _shrink_data(data: DataConfig, old: MediaSpec, new: MediaSpec, lanes: int) -> DataConfig:
    # A stage of long contexts still differs from the stages before it.
    tokens = 4096 if data.packing.max_tokens <= _LONG_TOKENS else 8192
    packing = data.packing.model_copy(
        update={
            "max_tokens": tokens,
            "max_cost": None,
            "max_documents": 2,
            "look_ahead": min(data.packing.look_ahead, 4),
        }
    )
    return DataConfig.model_validate(
        {
            **data.model_dump(include={"order", "prefetch"}),
            "tokenizer": {"kind": "sentencepiece", "path": _EMOJI / "tokenizer.model"},
            "datasets": [_shrink_dataset(dataset, old, new) for dataset in data.datasets],
            "lanes": min(data.lanes, lanes),
            "packing": packing,
        }
    )


def _shrink_dataset(dataset: DatasetConfig, old: MediaSpec, new: MediaSpec) -> DatasetConfig:
    manifest, template = _bundled(dataset.template, new.placement)
    video = None if dataset.video is None else _shrink_video(dataset.video, old, new)
    audio = None
    if dataset.audio is not None:
        audio = dataset.audio.model_copy(update={"start": None, "end": None, "placeholder": None})
        manifest, template = _SPEECH, _answers(dataset.template, "transcript", "voice")
    if video is not None:
        manifest, template = _CLIPS, _answers(dataset.template, "motion", "name")
    if (video or audio) and Path(str(dataset.manifest)).is_relative_to("examples"):
        # Every data set of such a recipe may have both blocks, and its own bundled shards have pictures or one of both.
        manifest, template = Path(str(dataset.manifest)), dataset.template
    weight = dataset.weight
    if isinstance(weight, tuple):
        weight = tuple(WeightFrom(from_step=n, weight=each.weight) for n, each in enumerate(weight))
    return DatasetConfig(
        name=dataset.name,
        manifest=manifest,
        weight=weight,
        repeats=dataset.repeats,
        template=template,
        transforms=_shrink_transforms(dataset.transforms, old, new),
        video=video,
        audio=audio,
    )


def _bundled(template: TemplateConfig, placement: Placement) -> tuple[Path, TemplateConfig]:
    """Return bundled shards, and a template of the same kind that fits them."""
    match template:
        case DialogueTemplate() if placement is Placement.NONE:
            return _TALKS, _dialogue(template)
        case PreferenceTemplate():
            return _preference(template, placement)
        case _ if placement is Placement.NONE:
            return _emoji("text"), TextTemplate()
        case TextTemplate():
            return _emoji("text"), template
        case InterleavedTemplate() | DialogueTemplate() if placement is Placement.PAIR:
            # The bundled pages and dialogues have several images each.
            return _bundled(CaptionTemplate(), placement)
        case InterleavedTemplate():
            return _emoji("interleaved"), template
        case DialogueTemplate():
            return _emoji("dialogues"), _dialogue(template)
        case AnnotationsTemplate(each=DialogueTemplate() as dialogue):
            changes: dict[str, Any] = {"field": "annotations", "each": _dialogue(dialogue)}
            return _emoji("dialogues"), template.model_copy(update=changes)
        case AnnotationsTemplate():
            each = CaptionTemplate(prompts=("Say: ",), answers=("{caption}",), loss_weight=template.loss_weight)
            return _emoji("quick"), template.model_copy(update={"field": "captions", "each": each})
        case _:  # Captions, and kinds without bundled shards.
            captions = {"prompts": ("", "group:"), "answers": ("{name}", " {group}")}
            return _emoji("quick"), CaptionTemplate(**captions, loss_weight=template.loss_weight)


def _preference(template: PreferenceTemplate, placement: Placement) -> tuple[Path, PreferenceTemplate]:
    """Return bundled pairs and their template: those of the text data, or the name of an image against its group."""
    each: CaptionTemplate | DialogueTemplate
    if isinstance(template.each, DialogueTemplate):
        each = _dialogue(template.each)
    else:
        each = CaptionTemplate(prompts=("Say: ",), answers=("{answer}",), images="optional")
    if placement is Placement.NONE:
        return _PAIRS, PreferenceTemplate(each=each, learn_special=template.learn_special)
    fields = {"prompt_field": "style", "chosen": "name", "rejected": "group"}
    return _emoji("quick"), PreferenceTemplate(**fields, each=each, learn_special=template.learn_special)


def _answers(template: TemplateConfig, chosen: str, rejected: str) -> TemplateConfig:
    """Return the template of bundled clips or speech: a dialogue, one field, or a pair of two, as ``template`` is."""
    if isinstance(template, DialogueTemplate):
        return _dialogue(template)
    if not isinstance(template, PreferenceTemplate):
        return CaptionTemplate(answers=(f"{{{chosen}}}",), loss_weight=template.loss_weight)
    each = CaptionTemplate(prompts=("Say: ",), answers=("{answer}",), images="optional")
    return PreferenceTemplate(chosen=chosen, rejected=rejected, each=each, learn_special=template.learn_special)


def _emoji(name: str) -> Path:
    return _EMOJI / "shards" / f"train-{name}.manifest"


def _dialogue(template: DialogueTemplate) -> DialogueTemplate:
    """Return the same format for the bundled turns of ``user`` and ``assistant``, which it maps to its own roles."""
    learned = [name for name, role in template.roles.items() if role.weight]
    others = [name for name in template.roles if name not in (*learned, SYSTEM)]
    assistant = "assistant" if "assistant" in learned else learned[0]
    user = USER if USER in others else (others or learned)[0]
    changes = {"field": None, "special_tokens": (), "aliases": {USER: user, "assistant": assistant}}
    return template.model_copy(update=changes)


def _shrink_transforms(transforms: TransformConfig, old: MediaSpec, new: MediaSpec) -> TransformConfig:
    """Return the same transforms with image sizes scaled in proportion to the grid of the smoke-test model."""

    side = partial(_shrunk_side, old=old, new=new)
    changes: dict[str, Any] = {}
    for name in ("size", "longest", "longer", "shorter", "max_height", "max_width", "min_pixels", "max_pixels"):
        value = getattr(transforms, name, None)
        if value is not None:
            changes[name] = _shrunk_area(value, old, new) if name.endswith("pixels") else side(value)
    if isinstance(transforms, TilesTransform):
        tile = changes.get("size") or (new.fixed_grid or (1, 1))[0] * new.patch_size
        changes["tiling"] = _shrink_tiling(transforms.tiling, tile, new)
    split = getattr(transforms, "split", None)
    if split is not None:
        few = tuple(grid for grid in split.grids if math.prod(grid) <= _MAX_TILES)
        cell = {"cell": side(split.cell)} if hasattr(split, "cell") else {}
        changes["split"] = split.model_copy(update={"grids": few or split.grids[:1], **cell})
    if transforms.layout is not None:
        changes["layout"] = transforms.layout.model_copy(update={"spell": True})
    return transforms.model_copy(update=changes)


def _shrunk_side(pixels: int, old: MediaSpec, new: MediaSpec) -> int:
    return shrunk_side(pixels // old.patch_size, new.merge) * new.patch_size


def _shrunk_area(pixels: int, old: MediaSpec, new: MediaSpec) -> int:
    return max(new.size_multiple**2, pixels * new.patch_size**2 // (4 * old.patch_size) ** 2)


def _shrink_video(video: VideoConfig, old: MediaSpec, new: MediaSpec) -> VideoConfig:
    """Return the same frames of fewer pixels, without special tokens."""
    sizes: dict[str, Any] = {
        name: _shrunk_area(getattr(video, name), old, new) for name in ("min_pixels", "max_pixels")
    }
    if video.scaled is not None:
        sides = {name: _shrunk_side(value, old, new) for name, value in video.scaled.model_dump().items()}
        sizes["scaled"] = video.scaled.model_copy(update=sides)
    if video.tiling is not None:
        sizes["tile_size"] = None
        sizes["tiling"] = _shrink_tiling(video.tiling, (new.fixed_grid or (1, 1))[0] * new.patch_size, new)
    return video.model_copy(update={**sizes, "start": None, "end": None, "placeholder": None})


def _shrink_tiling(tiling: Tiling, tile: int, new: MediaSpec) -> Tiling:
    """Return the same tiling with few tiles of ``tile`` pixels."""
    sizes = {"longest_side": 2 * tile}
    sizes |= {name: min(getattr(tiling, name, _MAX_TILES), _MAX_TILES) for name in ("min_tiles", "max_tiles")}
    sizes["margin"] = new.merge * math.ceil(getattr(tiling, "margin", 1) / (4 * new.merge))
    return tiling.model_copy(update={name: size for name, size in sizes.items() if name in type(tiling).model_fields})
