"""The drawings of a run for its report: which texts, when, and by which image tokenizer.

At an evaluation all ranks draw all texts in lock-step, as ZeRO-3 requires; rank 0 writes them. With dozens of texts,
sharing them among the ranks would save little.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataPipelineError, SampleError
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from mmscale.dist import World, raise_on_any_rank
from mmscale.errors import ConfigError, MMScaleError
from mmscale.evaluate.config import DrawingsConfig, DrawingSet, EvaluationConfig
from mmscale.evaluate.drawings import (
    DrawingContext,
    DrawingPrompts,
    Text,
    check_model,
    draw_images,
    pixels_of_a_code,
)
from mmscale.evaluate.heldout import draw_samples
from mmscale.metrics.metrics_file import cut_back
from mmscale.metrics.run_log import NullLog, RunLog
from mmscale.metrics.sample_images import CaptionedImage
from mmscale.models.config import ModelConfig
from mmscale.models.image_tokenizer import ImageTokenizer
from mmscale.report.drawings import DRAWINGS_FILE, save_drawings
from mmscale.run.config import RunConfig
from mmscale.run.image_tokens import tokenizer_of_data


class RunDrawings:
    """Draws the texts of ``evaluation.drawings``. All ranks must create one and make the same calls.

    The constructor removes the records of steps after ``start_step``.

    Args:
        config: The run.
        world: This rank.
        log: Receives the images.
        start_step: Finished steps at the beginning of this start.
    """

    def __init__(self, config: RunConfig, world: World, log: RunLog | NullLog, start_step: int) -> None:
        self._config, self._world, self._log = config, world, log
        self._drawn_step: int | None = None
        if world.is_main:
            cut_back(config.run_dir / DRAWINGS_FILE, start_step)

    def draw(self, model: nn.Module, stage: int, step: int) -> None:
        """Draw with the model of an evaluation, unless this step is drawn already. All ranks must call.

        Does nothing without ``evaluation.drawings``, and in a stage that draws no images.

        Raises:
            ConfigError, DataPipelineError, MMScaleError: the texts cannot be drawn. Every rank raises.
        """
        drawings = self._config.evaluation.drawings
        if drawings is None or step == self._drawn_step or not _draws(self._config, stage):
            return
        problem, plan = None, None
        try:
            plan = _Plan.open(self._config, stage, drawings, self._world.device)
        except (DataPipelineError, MMScaleError) as error:
            problem = f"evaluation.drawings: {error}"
        raise_on_any_rank(self._world, problem, ConfigError)
        assert plan is not None, "an error was raised on every rank"
        drawn = draw_images(
            model,
            plan.data,
            self._config.stage_media(stage),
            plan.texts,
            size=drawings.size,
            sampling=drawings.sampling,
            guidance=drawings.guidance,
            image_tokenizer=plan.tokenizer,
            device=self._world.device,
        )
        self._drawn_step = step
        if self._world.is_main:
            images = [CaptionedImage(each.pixels, words) for each, words in zip(drawn, plan.captions, strict=True)]
            save_drawings(self._config.run_dir, step, [(one.caption, one.pixels) for one in images])
            self._log.drawings(step, images)


@dataclass(frozen=True)
class _Plan:
    """What to draw in a stage: texts, the captions that show them, and a tokenizer that is no part of the model."""

    data: DataConfig
    texts: list[Text]
    captions: list[str]
    tokenizer: ImageTokenizer | None

    @classmethod
    def open(cls, config: RunConfig, stage: int, drawings: DrawingsConfig, device: torch.device) -> _Plan:
        data, model = config.drawing_data(stage), check_model(config.stage_model(stage), drawings.sampling, 1.0)
        tokenizer = None if drawings.tokenizer is None else tokenizer_of_data(drawings.tokenizer, data, device)
        own = model.image_tokenizer
        stride = pixels_of_a_code(None if own is None else own.stride, tokenizer)
        texts = _texts(config.evaluation, drawings)
        prompts = DrawingPrompts.open(data, config.stage_media(stage), drawings.size, stride)
        prompts.check(texts)
        captions = [text if isinstance(text, str) else prompts.words(text) for text in texts]
        return cls(data, texts, captions, tokenizer)


def drawing_context(config: RunConfig, stage: int, evaluation: EvaluationConfig, world: World) -> DrawingContext:
    """Return the inputs of the sets of kind ``drawings``, and load their image tokenizers. All ranks must call.

    Raises:
        ConfigError: an image tokenizer is missing, damaged, or not the one that encoded the data. Every rank raises.
    """
    data, tokenizers, problem = config.drawing_data(stage), dict[Path, ImageTokenizer](), None
    for held in evaluation.sets:
        if isinstance(held, DrawingSet) and held.tokenizer is not None and problem is None:
            try:
                tokenizers[held.tokenizer] = tokenizer_of_data(held.tokenizer, data, world.device)
            except (DataPipelineError, MMScaleError) as error:
                problem = f"evaluation set {held.name}: tokenizer={held.tokenizer}: {error}"
    raise_on_any_rank(world, problem, ConfigError)
    return DrawingContext(data, tokenizers)


def undrawable_sets(config: RunConfig, stage: int, evaluation: EvaluationConfig) -> tuple[DrawingSet, ...]:
    """Return the sets of kind ``drawings`` if the stage draws no images; else none."""
    return () if _draws(config, stage) else tuple(held for held in evaluation.sets if isinstance(held, DrawingSet))


def _texts(evaluation: EvaluationConfig, drawings: DrawingsConfig) -> list[Text]:
    """Return the texts, then the fields of some samples of each set."""
    texts = list[Text](drawings.prompts)
    for held in (held for name in drawings.sets for held in evaluation.sets if held.name == name):
        reader = SampleReader(Manifest.open(held.manifest), held.name)
        try:
            numbers = draw_samples(held, reader.manifest.num_samples, drawings.num_images)
            texts += [reader.read(number).fields for number in numbers]
        finally:
            reader.close()
    return texts


def _draws(config: RunConfig, stage: int) -> bool:
    """Return whether a stage draws images: its model can, and a data set of ``drawing_data`` says how."""
    model, data = config.stage_model(stage), config.drawing_data(stage)
    can_draw = isinstance(model, ModelConfig) and bool(model.decoder.image_ids)
    return can_draw and any(dataset.template.draws for dataset in data.datasets or (data.prompts,))


def check_drawings(config: RunConfig) -> None:
    """Check ``evaluation.drawings`` before a run starts, for each stage that draws and is evaluated.

    Raises:
        ConfigError: no such stage draws, a text or the size does not fit, or the image tokenizer is missing or another
            one than that of the data.
        DataPipelineError: a file of a set is missing or damaged.
    """
    drawings, stages = config.evaluation.drawings, [number for number, _ in config.stages_from(0)]
    if drawings is None:
        return
    evaluated = stages if config.evaluation.every_steps is not None else stages[-1:]
    drawn = [number for number in evaluated if _draws(config, number)]
    if not drawn:
        raise ConfigError(
            "evaluation.drawings: no evaluated stage draws images, which needs model.decoder.image_tokens and a data "
            "set with template.kind: drawing; leave this key out"
        )
    for number in drawn:
        try:
            _Plan.open(config, number, drawings, torch.device("cpu"))
        except (MMScaleError, SampleError) as error:
            raise ConfigError(f"evaluation.drawings, stage {config.stages[number].name}: {error}") from error
