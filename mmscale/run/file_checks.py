"""Check a configuration against the files that it names, before a run starts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from data_pipeline.config import DatasetConfig
from data_pipeline.errors import DataConfigError
from data_pipeline.io.missing import no_such_file
from data_pipeline.loader.first_look import FirstLook, look_at
from data_pipeline.loader.front_to_back import expand_shards
from data_pipeline.loader.sample_source import with_image_tokenizer
from data_pipeline.media_spec import VIDEO, MediaSpec
from data_pipeline.packing.config import PackingConfig
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Budget
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.manifest_check import reject_non_manifest
from data_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from mmscale.dist import World
from mmscale.errors import ConfigError
from mmscale.evaluate import check_best, check_sets
from mmscale.metrics.trackers.config import check_trackers
from mmscale.models.config import ModelConfig, TokenizerConfig
from mmscale.models.image_tokens import TOKENIZER
from mmscale.optim.stages import ALL, StageConfig
from mmscale.run.config import RunConfig, require_training
from mmscale.run.drawings import check_drawings, drawing_context, undrawable_sets


def check_files(config: RunConfig) -> list[str]:
    """Check the configuration against the files that it names. Reads the text of some samples, and decodes no image.

    Returns:
        Warnings: one sentence for each stage whose model has a vision tower and whose samples have no image, and for
        a first stage that encodes images with a random tokenizer.

    Raises:
        ConfigError: ``run_dir`` cannot be created, a manifest is missing, or there is no stage or no data set.
        ConfigError: the package of a tracker is not installed.
        ConfigError: the tokenizer has more ids than the model has embeddings.
        ConfigError: a stage that trains the tower or the connector has no image, or a held-out set does not fit its
            configuration.
        DataConfigError: a streamed shard is missing, the tokenizer cannot be loaded, the transforms do not fit the
            model of a stage, or a data set has no usable sample.
        ConfigError: ``evaluation.drawings`` does not fit the model or the data.
        DataPipelineError: a manifest or a held-out sample is damaged.
    """
    require_training(config)
    _check_run_dir(config.run_dir)
    check_trackers(config.metrics.trackers)
    notes = []
    for number, stage in enumerate(config.stages):
        data, model = config.stage_data(number), config.stage_model(number)
        place = f"stages.{number}.data" if stage.data else "data"
        for index, dataset in enumerate(data.datasets):
            expand_shards(dataset.shards)
            if isinstance(dataset.manifest, Path):
                key = f"{place if 'datasets' in (stage.data or {}) else 'data'}.datasets.{index}.manifest"
                if not dataset.manifest.exists():
                    raise ConfigError(
                        f"{key}={dataset.manifest}: {no_such_file(dataset.manifest)}; "
                        f"make it with `mmscale data ingest` or `mmscale data index`"
                    )
                reject_non_manifest(dataset.manifest, str(dataset.manifest), key)
        try:
            tokenizer = load_tokenizer(data.tokenizer)
        except DataConfigError as error:
            key = f"{place if 'tokenizer' in (stage.data or {}) else 'data'}.tokenizer.path"
            raise DataConfigError(f"{key}={data.tokenizer.path}: {error}") from error
        tokens, rows = tokenizer.vocab_size, 0 if isinstance(model, TokenizerConfig) else model.decoder.num_ids
        if not isinstance(model, TokenizerConfig) and tokens > rows:
            extra = model.decoder.extra_tokens
            read = f"{rows}" if extra is None else f"{rows - extra.rows}, extra_tokens.rows={extra.rows}"
            raise ConfigError(
                f"model.decoder.vocab_size={read}: the tokenizer of stage {stage.name} has {tokens} ids; "
                f"set at least {tokens} rows"
            )
        spec = config.stage_media(number)
        looks = [_look_at(dataset, data.packing, tokenizer, model, spec, stage) for dataset in data.datasets]
        if model.vision is not None and not any(look is None or look.holds_images for look in looks):
            notes.append(_without(config, number, "image", "a vision tower", ("vision", "connector")))
        if spec.videos is not None and not any(look is None or VIDEO in look.modalities for look in looks):
            notes.append(_without(config, number, VIDEO, "a projector for videos", ("video_connector",)))
        for name in spec.modalities:
            if not any(look is None or name in look.modalities for look in looks):
                notes.append(_without(config, number, name, f"the block {name}", (name, f"{name}_connector")))
        if spec.code_size is not None and not number and not _loads_tokenizer(stage):
            notes.append(
                f"stages.{number} ({stage.name}): encodes images in each step, and no checkpoint of its weights gives "
                f"the image tokenizer, whose values are random; name one: weights: [{{checkpoint: RUN, components: "
                f"[{TOKENIZER}]}}]"
            )
    _check_evaluation(config)
    return notes


def _check_evaluation(config: RunConfig) -> None:
    """Check the held-out sets for the model at the end, and if they are scored during training, of each stage.

    Stages that do not draw are not scored on sets of kind ``drawings``, but each such set must be scored in some stage.
    """
    evaluation, reached = config.evaluation, [number for number, _ in config.stages_from(0)]
    last = reached[-1]
    blocks = [(last, evaluation)]
    if evaluation.every_steps is not None:
        blocks += [(number, evaluation.during_training) for number in reversed(reached)]
    undrawn = [undrawable_sets(config, number, block) for number, block in blocks]
    scored = {
        held.name
        for (_, block), left_out in zip(blocks, undrawn, strict=True)
        for held in block.sets
        if held not in left_out
    }
    names = {held.name for held in undrawn[0]}
    check_best(evaluation, config.stage_media(last), config.evaluation_data(last), names)
    check_drawings(config)
    checked: list[object] = []
    for (number, block), left_out in zip(blocks, undrawn, strict=True):
        data, spec, model = config.evaluation_data(number), config.stage_media(number), config.stage_model(number)
        kept = tuple(held for held in block.sets if held not in left_out or held.name not in scored)
        block = block.model_copy(update={"sets": kept})
        if (block, data, model) not in checked:
            checked.append((block, data, model))
            drawing = drawing_context(config, number, block, World(0, 1, 0, torch.device("cpu")))
            check_sets(block, data, spec, drawing=drawing, model=model)


def _check_run_dir(run_dir: Path) -> None:
    """Create and remove a folder in the nearest existing parent of ``run_dir``: mode bits alone are not sufficient."""
    path = Path(os.path.abspath(run_dir))
    parent = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not os.path.isdir(parent):
        raise ConfigError(f"run_dir={run_dir}: {parent} is not a folder; set a folder that no other run uses")
    try:
        with tempfile.TemporaryDirectory(prefix=".mmscale-", dir=parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"run_dir={run_dir}: cannot create a folder in {parent} ({error.strerror}); choose a folder with write "
            "permission"
        ) from error


def _look_at(
    dataset: DatasetConfig,
    packing: PackingConfig,
    tokenizer: Tokenizer,
    model: ModelConfig | TokenizerConfig,
    spec: MediaSpec,
    stage: StageConfig,
) -> FirstLook | None:
    """Inspect some samples of a data set. Return None for a streamed or remote one, which takes longer to read."""
    try:
        if isinstance(dataset.manifest, Path):
            dataset = with_image_tokenizer(dataset, Manifest.open(dataset.manifest))
        builder = DocumentBuilder(dataset, tokenizer, spec)
        budget = Budget(packing, spec, dummy_document(spec, tokenizer.pad_id))
        if not isinstance(dataset.manifest, Path):
            return None
        look = look_at(dataset, builder, budget)
    except DataConfigError as error:
        raise DataConfigError(f"stage {stage.name}, data set {dataset.name}: {error}") from error
    if look.unusable == look.looked_at:
        raise DataConfigError(
            f"stage {stage.name}, data set {dataset.name}: none of the {look.looked_at} inspected samples can be used; "
            f"the first: {look.reason}"
        )
    if isinstance(model, TokenizerConfig):
        return look
    _check_image_ids(dataset, model, stage)
    logits = model.decoder.vocab_size + model.decoder.predicted_rows
    if model.predicts_tokens and look.highest_label >= logits and look.highest_label not in model.decoder.image_ids:
        raise ConfigError(
            f"model.decoder.extra_tokens.predicted=false: stage {stage.name}, data set {dataset.name} teaches "
            f"token {look.highest_label}, and the model has logits for the ids below {logits}; set predicted: true, or "
            "learn no such token"
        )
    return look


def _check_image_ids(dataset: DatasetConfig, model: ModelConfig, stage: StageConfig) -> None:
    """Require that the codes of a data set's images have the ids that the decoder gives them."""
    tokens, decoder = dataset.image_tokens, model.decoder
    if tokens is None:
        return
    first, where = tokens.first_id, f"stage {stage.name}, data set {dataset.name}"
    ids = tokens.ids or (() if first is None else range(first, first + tokens.codebook_size))
    if decoder.image_tokens is not None and list(ids) != list(decoder.image_ids):
        raise ConfigError(
            f"image_tokens: {where} uses other ids for the codes of images than model.decoder.image_tokens; set "
            f"first_id={decoder.image_ids.start} and codebook_size={len(decoder.image_ids)}"
        )
    if decoder.image_tokens is None and tokens.num_ids > decoder.num_ids:
        raise ConfigError(
            f"model.decoder.vocab_size={decoder.num_ids}: {where} uses the ids up to {tokens.num_ids - 1} for codes "
            f"of images (image_tokens); set at least {tokens.num_ids} rows, or model.decoder.image_tokens"
        )


def _loads_tokenizer(stage: StageConfig) -> bool:
    return any(name in (ALL, TOKENIZER) for source in stage.weights for name in source.components)


def _without(config: RunConfig, number: int, noun: str, part: str, components: tuple[str, ...]) -> str:
    """Return a note that the data lack inputs of which the model has a part.

    Raises:
        ConfigError: the stage trains one of the ``components`` of that part.
    """
    stage = config.stages[number]
    names = ", ".join(dataset.name for dataset in config.stage_data(number).datasets)
    what = f"stages.{number} ({stage.name}): the model has {part}, and no {noun} was found in its data ({names})"
    known = config.stage_model(number).components
    trained = [name for name in components if name in known and (name in stage.train or ALL in stage.train)]
    if trained:
        inputs = "images" if noun == "image" else f"{noun} and the block data.{noun}"
        parts = {"image": "model.vision and model.connector", VIDEO: "model.connector.video_projector"}
        nulls = parts.get(noun, f"model.{noun}")
        raise ConfigError(
            f"{what}, so {' and '.join(trained)} would learn nothing; add data with {inputs}, "
            f"or remove {'both' if len(components) > 1 else 'it'} from stages.*.train, or set {nulls} to null"
        )
    return what
