"""A trained model answers: to a person with a prompt and files, and about held-out images for the report of a run.

prompt, image files --as in training--> generate, with a cache --> text
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.errors import SampleError
from data_pipeline.images.decode import Pixels, decode_image
from data_pipeline.io.untrusted import UntrustedError, read_bytes
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder, null_document
from data_pipeline.packing.packer import Pack
from data_pipeline.sample import ImagePart, Provenance, Sample
from data_pipeline.text.templates import LITERAL, CaptionTemplate
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.dist import World
from mmscale.errors import ConfigError, MMScaleError
from mmscale.evaluate import CaptionsConfig, EvaluationConfig, HeldOutSet
from mmscale.evaluate.heldout import PromptBuilder, Questions
from mmscale.models.generation import generate
from mmscale.models.sampling import SamplingConfig

_MOST_IMAGE_BYTES = 1 << 28
_IMAGE_PLACE = re.compile(r"<image(?:-(\d+))?>")
_PICTURE_PIXELS = 256
"""Longest side of an image in the report."""


class Captioned(NamedTuple):
    """A held-out image with what is true of it and what the model says; ``save_captions`` takes a list of these."""

    set: str
    pixels: Pixels
    expected: str
    generated: str


def respond(
    model: nn.Module,
    data: DataConfig,
    spec: MediaSpec,
    *,
    images: Sequence[Path] = (),
    prompt: str | None = None,
    num: int = 1,
    max_new_tokens: int = 32,
    sampling: SamplingConfig = SamplingConfig(),
    stop: Sequence[str] = (),
    show: Callable[[str], None] | None = None,
) -> list[str]:
    """What a whole model, in this process, says to a prompt with images or without.

    Args:
        model: In evaluation mode, on the CPU or a CUDA device.
        data: Tokenizer, and template and transform of the first data set.
        spec: What the model takes.
        images: JPEG, PNG or WebP files.
        prompt: Text before the answer, of a dialogue what the user says. Images stand where it says ``<image>`` (the
            next one) or ``<image-2>`` (the second); where it says neither, before it. None takes the first prompt of
            the template.
        num: Answers, each drawn anew.
        max_new_tokens: Longest answer, tokens.
        sampling: How tokens are chosen.
        stop: Texts that end an answer and are no part of it.
        show: Called with the first answer as it grows, after each token.

    Raises:
        ConfigError: the model has no image tower or writes no text, or the prompt of the template needs what is not
            given.
        SampleError: a file is no such image, or images and places for them differ.
    """
    if spec.placement is Placement.PAIR:
        raise ConfigError(
            "this model compares images with texts (connector.kind=contrastive) and writes none; `mmscale eval` tells "
            "which text it finds nearest to an image"
        )
    tokenizer = load_tokenizer(data.tokenizer)
    dataset, sample = _question(data.datasets[0], images, prompt, spec)
    document = DocumentBuilder(dataset, tokenizer, spec).build_prompt(sample)
    null = null_document(spec, tokenizer.pad_id)
    device = next(model.parameters()).device
    batch = collate([Pack((*[document] * num, null), lane=-1)], spec).to(device)

    def watch(number: int, tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens)
        if show is not None and number == 0:
            show(_until(text, stop))
        return any(end in text for end in stop)

    stop_ids = [tokenizer.special_id(name, "template.special_tokens") for name in dataset.template.closing]
    watched = watch if stop or show is not None else None
    answers = generate(
        model,  # type: ignore[arg-type]
        batch,
        max_new_tokens,
        tokenizer.eos_id,
        sampling,
        stop_ids=stop_ids,
        watch=watched,
    )
    return [_until(tokenizer.decode(tokens), stop).strip() for tokens in answers]


def _until(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop texts in it."""
    places = [place for end in stop if (place := text.find(end)) >= 0]
    return text[: min(places)] if places else text


def _question(
    dataset: DatasetConfig, images: Sequence[Path], prompt: str | None, spec: MediaSpec
) -> tuple[DatasetConfig, Sample]:
    """A sample of these images, and how it is put to the model."""
    if images and spec.placement is Placement.NONE:
        raise ConfigError("this model has no vision tower: it cannot look at an image; leave out --image")
    template = dataset.template.branch_template
    sample = _sample_of(images)
    if prompt is None and images and not template.takes_images:
        prompt = ""  # Its prompt is empty and would leave the images out.
    if prompt is None:
        _check_prompt(dataset, sample)
        return dataset, sample
    if not images and (place := _IMAGE_PLACE.search(prompt)):
        raise ConfigError(
            f"the prompt has a place for an image, {place[0]}, and no image is given; add --image FILE, or write the "
            "prompt without it"
        )
    places = [place[1] for place in _IMAGE_PLACE.finditer(prompt)]
    asked = max([places.count(None), *(int(number) for number in places if number)])
    if asked > len(images):
        raise ConfigError(
            f"the prompt has a place for image number {asked}, and --image gives {len(images)}; add --image FILE, or "
            "write the prompt without that place"
        )
    if (fields := template.question(prompt)) is None:
        template = LITERAL if prompt else CaptionTemplate()
        fields = template.question(prompt)
    if fields is not None:
        sample = replace(sample, fields=fields)
    return dataset.model_copy(update={"template": template}), sample


def _check_prompt(dataset: DatasetConfig, sample: Sample) -> None:
    """Refuses to begin where training has a prompt, or an image, and nothing was given."""
    if not sample.parts and dataset.template.takes_images:
        raise ConfigError(f"data set {dataset.name} begins with an image or a question; give an image or a prompt")
    try:
        dataset.template.prompt(sample)
    except SampleError as error:
        raise ConfigError(
            f"the prompt of data set {dataset.name} cannot be made for a bare image ({error.reason}); give a prompt"
        ) from error


def _sample_of(images: Sequence[Path]) -> Sample:
    """The files as a sample without fields; members are called as in a tar, by number and extension."""
    parts = []
    for number, path in enumerate(images):
        try:
            data = read_bytes(path, most_bytes=_MOST_IMAGE_BYTES)
        except UntrustedError as error:
            raise MMScaleError(f"{path}: {error}") from error
        except OSError as error:
            raise MMScaleError(f"{path}: {error.strerror}") from error
        extension = path.suffix.lstrip(".").lower()
        parts.append(ImagePart(data, extension if len(images) == 1 else f"{number}.{extension}"))
    shown = images[0] if images else Path("prompt")
    return Sample(tuple(parts), {}, Provenance("file", str(shown.parent), ", ".join(path.name for path in images), 0))


def caption_images(
    model: nn.Module, config: EvaluationConfig, data: DataConfig, spec: MediaSpec, world: World
) -> list[Captioned]:
    """Captions some images of each held-out set, for the report. All ranks must call.

    Every rank does the same work in lock-step: a few dozen images are not worth an exchange of texts.

    Returns:
        The same on every rank; empty where ``config.captions`` is null or the model has no image tower or no head.
    """
    captions = config.captions
    if captions is None or spec.placement in (Placement.NONE, Placement.PAIR):
        return []
    chosen = [held for held in config.image_sets if captions.sets is None or held.name in captions.sets]
    return [one for held in chosen for one in _caption_set(model, held, captions, data, spec, world)]


def _caption_set(
    model: nn.Module, held: HeldOutSet, captions: CaptionsConfig, data: DataConfig, spec: MediaSpec, world: World
) -> list[Captioned]:
    tokenizer = load_tokenizer(data.tokenizer)
    questions = Questions.read(held, limit=captions.num_images)
    prompts = PromptBuilder.of_images(held, data, tokenizer, spec, captions.prompt)(questions.samples).to(world.device)
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
