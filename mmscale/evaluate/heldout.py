"""The samples of a held-out set, the right answers of those that show images, and prompts as documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.errors import DataPipelineError, SampleError
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder, null_document
from data_pipeline.packing.packer import Pack
from data_pipeline.sample import Sample
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.text.templates import CaptionTemplate, TemplateConfig
from data_pipeline.text.tokenizer import Tokenizer
from mmscale.dist import World, first_complaint
from mmscale.errors import ConfigError
from mmscale.evaluate.config import ChoiceSet, EvaluationConfig, EvaluationSet, HeldOutSet, PerplexitySet
from mmscale.evaluate.likelihood import ScoredModel

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """Who is asked, and by what: the same for all sets.

    Attributes:
        model: As ``ScoredModel``; where ``spec`` says so a ``ContrastiveModel`` in its place.
        config: Budgets.
        data: Gives the default transform and the length of documents.
        tokenizer: Text to ids.
        spec: What the model takes.
        world: The ranks that take part.
    """

    model: ScoredModel
    config: EvaluationConfig
    data: DataConfig
    tokenizer: Tokenizer
    spec: MediaSpec
    world: World


@dataclass(frozen=True)
class Questions:
    """A set, read.

    Attributes:
        config: What is asked.
        samples: The chosen samples.
        answers: The right answer of each.
        pool: Values that may be candidates.
    """

    config: HeldOutSet
    samples: list[Sample]
    answers: list[str]
    pool: list[str]

    @classmethod
    def read(cls, config: HeldOutSet, limit: int | None = None) -> Questions:
        """Reads the manifests; at most ``limit`` samples if given, else ``config.limit``.

        Raises:
            ConfigError: the set is empty, or a sample lacks the field.
            ManifestError, ShardError, SampleError: a file is missing or damaged.
        """
        samples = list(read_samples(config.manifest, config.name))
        values = [answer_of(sample, config) for sample in samples]
        pool = values
        if config.candidates_from is not None:
            others = read_samples(config.candidates_from, config.name, outlines=True)
            pool = [answer_of(sample, config) for sample in others]
        chosen = draw(config, len(samples), limit)
        return cls(config, [samples[i] for i in chosen], [values[i] for i in chosen], pool)


def candidate_ids(held: HeldOutSet, value: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids of a candidate, with the end token if the set asks for it.

    Raises:
        ConfigError: the tokenizer makes nothing of it.
    """
    ids = tokenizer.encode(held.template.format(value=value))
    if held.ends:
        ids = [*ids, tokenizer.eos_id]
    if not ids:
        raise ConfigError(f"evaluation set {held.name}: the answer {value!r} has no tokens")
    return tuple(ids)


def answer_of(sample: Sample, config: HeldOutSet) -> str:
    """Return the right answer of a sample.

    Raises:
        ConfigError: the field is missing or no text.
    """
    value: Any = sample.fields
    for name in config.field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, str) or not value.strip():
        origin = sample.provenance
        raise ConfigError(
            f"evaluation set {config.name}: field {config.field!r} of {origin.shard}/{origin.key} is {value!r}, "
            f"expected a text; the sample has the fields {', '.join(sorted(sample.fields)) or 'none'}"
        )
    return value


class PromptBuilder:
    """Makes prompts as the training data's documents are made.

    Args:
        builder: Of the set's documents.
        needs_images: Whether a prompt without an image is refused.
    """

    def __init__(self, builder: DocumentBuilder, *, needs_images: bool = False) -> None:
        self._builder = builder
        self._needs_images = needs_images
        self._null = null_document(builder.spec, builder.tokenizer.pad_id)

    @classmethod
    def of_images(
        cls, held: HeldOutSet, data: DataConfig, tokenizer: Tokenizer, spec: MediaSpec, prompt: str | None = None
    ) -> PromptBuilder:
        """For a set that asks about images, with ``prompt`` in place of its own if given."""
        template = template_of(held) if prompt is None else CaptionTemplate(prompts=(prompt,))
        return cls(document_builder(held, template, data, tokenizer, spec), needs_images=True)

    def num_tokens(self, sample: Sample) -> int:
        """Tokens of the prompt; nothing is decoded.

        Raises:
            SampleError: as a call would, save for damaged pixels.
        """
        return self._builder.measure_prompt(sample).num_tokens

    def __call__(self, samples: Sequence[Sample]) -> MultimodalBatch:
        """The prompts of the samples, in order, then one null document, so that every module of the model runs.

        Raises:
            SampleError: an image is damaged or does not fit the model.
        """
        documents = [self._builder.build_prompt(sample) for sample in samples]
        for document in documents:
            if self._needs_images and not document.items:
                origin = document.provenance
                place = ("?", "?") if origin is None else (origin.shard, origin.key)
                raise SampleError("no image: there is nothing to ask about", shard=place[0], key=place[1])
        return collate([Pack((*documents, self._null), lane=-1)], self._builder.spec)


def document_builder(
    held: EvaluationSet, template: TemplateConfig, data: DataConfig, tokenizer: Tokenizer, spec: MediaSpec
) -> DocumentBuilder:
    """Makes documents of a held-out set by a template, with the set's transforms or those of the first data set.

    Raises:
        DataConfigError: the transforms do not fit the model, or the tokenizer lacks a token of the template.
    """
    transforms = held.transforms or data.datasets[0].transforms
    dataset = DatasetConfig(name=held.name, manifest=held.manifest, template=template, transforms=transforms)
    return DocumentBuilder(dataset, tokenizer, spec)


def template_of(held: EvaluationSet) -> TemplateConfig:
    """How the documents of a set, or the prompts of its questions, are made."""
    if isinstance(held, PerplexitySet):
        return held.template
    if isinstance(held, ChoiceSet) and held.dialogue is not None:
        return held.dialogue
    return CaptionTemplate(prompts=(held.prompt,))


def not_asked(config: EvaluationConfig, spec: MediaSpec) -> tuple[EvaluationSet, ...]:
    """Sets that a model cannot answer: of images without a tower, of anything else if it compares images with texts."""
    if spec.placement is Placement.NONE:
        return config.image_sets
    return tuple(held for held in config.sets if spec.placement is Placement.PAIR and held not in config.image_sets)


def draw(held: EvaluationSet, num_samples: int, limit: int | None = None) -> list[int]:
    """Numbers of the samples that take part: at most ``limit`` if given, else the set's own.

    Raises:
        ConfigError: there is none.
    """
    if not num_samples:
        raise ConfigError(f"evaluation set {held.name}: {held.manifest} holds no samples")
    order: list[int] = np.random.default_rng([held.seed, num_samples]).permutation(num_samples).tolist()
    return order[: limit or held.limit or num_samples]


def together(world: World, held: EvaluationSet, make: Callable[[], T]) -> T:
    """What ``make`` gives, or an error on all ranks: one that left alone would leave the others waiting in a forward.

    All ranks must call.

    Raises:
        DataPipelineError: ``make`` raised it or a ``ConfigError`` on some rank.
    """
    complaint, made = None, list[T]()
    try:
        made.append(make())
    except (DataPipelineError, ConfigError) as error:
        complaint = str(error)
    complaint = first_complaint(world, complaint)
    if complaint is not None or not made:
        raise DataPipelineError(f"evaluation set {held.name}: {complaint}")
    return made[0]
