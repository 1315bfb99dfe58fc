"""A trained model describes images: for a person with a file, and for the report of a run.

image file --prompt as in training--> generate, with a cache --> text
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from data_pipeline.collate import collate
from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.decode.image import Pixels, decode_image
from data_pipeline.documents import DocumentBuilder, null_document
from data_pipeline.errors import SampleError
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing import Pack
from data_pipeline.sample import ImagePart, Provenance, Sample
from data_pipeline.templates import AnnotationsTemplate, CaptionTemplate, DialogueTemplate
from data_pipeline.tokenizer import load_tokenizer
from mmscale.dist import World
from mmscale.errors import ConfigError, MMScaleError
from mmscale.evaluate import CaptionsConfig, EvaluationConfig, HeldOutSet
from mmscale.evaluate.heldout import PromptBuilder, Questions
from mmscale.models.generation import GreedyConfig, NucleusConfig, generate

_PICTURE_PIXELS = 256
"""Longest side of an image in the report."""


class Captioned(NamedTuple):
    """A held-out image with what is true of it and what the model says; ``save_captions`` takes a list of these."""

    set: str
    pixels: Pixels
    expected: str
    generated: str


def describe_image(
    model: nn.Module,
    image: Path,
    data: DataConfig,
    spec: MediaSpec,
    *,
    prompt: str | None = None,
    max_new_tokens: int = 32,
    sampling: GreedyConfig | NucleusConfig = GreedyConfig(),
) -> str:
    """What a whole model, in this process, says about an image file.

    Args:
        model: In evaluation mode, on the CPU or a CUDA device.
        image: JPEG, PNG or WebP.
        data: Tokenizer, and template and transform of the first data set.
        spec: What the model takes.
        prompt: Text between image and answer, of a dialogue what the user says; None takes the first prompt of the
            template.
        max_new_tokens: Longest answer, tokens.
        sampling: How tokens are chosen.

    Raises:
        ConfigError: the model has no image tower, or the prompt of the template needs fields that a file does not have.
        SampleError: the file is no such image.
    """
    if spec.placement is Placement.NONE:
        raise ConfigError("this model has no vision tower: it cannot look at an image")
    tokenizer = load_tokenizer(data.tokenizer)
    dataset = data.datasets[0]
    sample = _sample_of(image)
    template = dataset.template.each if isinstance(dataset.template, AnnotationsTemplate) else dataset.template
    if prompt is not None and isinstance(template, DialogueTemplate):
        dataset = dataset.model_copy(update={"template": template})
        sample = replace(sample, fields=template.question(prompt))
    elif prompt is not None:  # Literal text: braces in it are no fields.
        literal = prompt.replace("{", "{{").replace("}", "}}")
        dataset = dataset.model_copy(update={"template": CaptionTemplate(prompts=(literal,))})
    else:
        _check_prompt(dataset, sample)
    document = DocumentBuilder(dataset, tokenizer, spec).build_prompt(sample)
    null = null_document(spec, tokenizer.pad_id)
    device = next(model.parameters()).device
    batch = collate([Pack((document, null), lane=-1)], spec).to(device)
    (tokens,) = generate(model, batch, max_new_tokens, tokenizer.eos_id, sampling)  # type: ignore[arg-type]
    return tokenizer.decode(tokens).strip()


def _check_prompt(dataset: DatasetConfig, sample: Sample) -> None:
    try:
        dataset.template.prompt(sample)
    except SampleError as error:
        raise ConfigError(
            f"the prompt of data set {dataset.name} cannot be made for a bare image ({error.reason}); give a prompt"
        ) from error


def _sample_of(image: Path) -> Sample:
    try:
        data = image.read_bytes()
    except OSError as error:
        raise MMScaleError(f"{image}: {error.strerror}") from error
    origin = Provenance("file", str(image.parent), image.name, 0)
    return Sample((ImagePart(data, image.suffix.lstrip(".").lower()),), {}, origin)


def caption_images(
    model: nn.Module, config: EvaluationConfig, data: DataConfig, spec: MediaSpec, world: World
) -> list[Captioned]:
    """Captions some images of each held-out set, for the report. All ranks must call.

    Every rank does the same work in lock-step: a few dozen images are not worth an exchange of texts.

    Returns:
        The same on every rank; empty where ``config.captions`` is null or the model has no image tower.
    """
    captions = config.captions
    if captions is None or spec.placement is Placement.NONE:
        return []
    chosen = [held for held in config.sets if captions.sets is None or held.name in captions.sets]
    return [one for held in chosen for one in _caption_set(model, held, captions, data, spec, world)]


def _caption_set(
    model: nn.Module, held: HeldOutSet, captions: CaptionsConfig, data: DataConfig, spec: MediaSpec, world: World
) -> list[Captioned]:
    tokenizer = load_tokenizer(data.tokenizer)
    questions = Questions.read(held, limit=captions.num_images)
    prompts = PromptBuilder(held, data, tokenizer, spec, captions.prompt)(questions.samples).to(world.device)
    answers = generate(
        model,  # type: ignore[arg-type]
        prompts,
        captions.max_new_tokens,
        tokenizer.eos_id,
        captions.sampling,
        lockstep=world.world_size > 1,
    )
    return [
        Captioned(held.name, _picture(sample), expected, tokenizer.decode(tokens).strip())
        for sample, expected, tokens in zip(questions.samples, questions.answers, answers, strict=True)
    ]


def _picture(sample: Sample) -> Pixels:
    """The sample's first image as a person should see it: as stored, at most 256 pixels wide and high."""
    from PIL import Image

    image = next(part for part in sample.parts if isinstance(part, ImagePart))
    picture = Image.fromarray(decode_image(image.data, max_pixels=1 << 26))
    picture.thumbnail((_PICTURE_PIXELS, _PICTURE_PIXELS))
    return np.asarray(picture, dtype=np.uint8)
