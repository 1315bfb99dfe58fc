"""Read held-out sets and turn their samples into prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.document import Document, MediaItem
from data_pipeline.errors import DataPipelineError, SampleError
from data_pipeline.media_spec import IMAGE, MediaSpec, Placement
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import Sample
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader, read_samples
from data_pipeline.text.templates import CaptionTemplate, TemplateConfig
from data_pipeline.text.tokenizer import Tokenizer
from mmscale.dist import World, lowest_rank_error
from mmscale.errors import ConfigError
from mmscale.evaluate.config import (
    ChoiceSet,
    DrawingSet,
    EvaluationConfig,
    EvaluationSet,
    GenerationSet,
    HeldOutSet,
    PerplexitySet,
)
from mmscale.evaluate.drawings import DrawingContext
from mmscale.evaluate.likelihood import ScoredModel

T = TypeVar("T")


@dataclass(frozen=True)
class EvaluationContext:
    """Model, settings and ranks of an evaluation; the same for all sets.

    Attributes:
        model: Model to score. If ``spec.placement`` is ``PAIR``, it is a ``ContrastiveModel``.
        config: Gives ``tokens_per_forward`` and ``rows_per_head``.
        data: Gives the default transform and the default length of documents.
        tokenizer: Tokenizer of the model.
        spec: Media that the model accepts.
        world: Ranks that share the work.
        drawing: Inputs of sets of kind ``drawings``; None draws as ``data`` says.
        answers_folder: Folder to which sets of kinds ``generation`` and ``drawings`` write their answers and drawings;
            None: they write none.
    """

    model: ScoredModel
    config: EvaluationConfig
    data: DataConfig
    tokenizer: Tokenizer
    spec: MediaSpec
    world: World
    drawing: DrawingContext | None = None
    answers_folder: Path | None = None


@dataclass(frozen=True)
class ImageQuestions:
    """The questions of one set of kind ``images`` or ``drawings``.

    Attributes:
        config: The set.
        samples: Samples that are scored.
        answers: Right answer of each sample.
        pool: Values that may be candidates, with repetitions.
    """

    config: HeldOutSet | DrawingSet
    samples: list[Sample]
    answers: list[str]
    pool: list[str]

    @classmethod
    def read(cls, config: HeldOutSet | DrawingSet, limit: int | None = None) -> ImageQuestions:
        """Read at most ``limit`` samples of a set, or ``config.limit`` if None, and the values of its candidates.

        Raises:
            ConfigError: the set is empty, or a sample lacks the field ``config.field``.
            ManifestError, ShardError, SampleError: a file is missing or damaged.
        """
        reader = SampleReader(Manifest.open(config.manifest), config.name)
        try:
            samples = [reader.read(number) for number in draw_samples(config, reader.manifest.num_samples, limit)]
        finally:
            reader.close()
        answers = [right_answer(sample, config) for sample in samples]
        others = read_samples(config.candidates_from or config.manifest, config.name, images=False)
        return cls(config, samples, answers, [right_answer(sample, config) for sample in others])


def candidate_ids(held: HeldOutSet, value: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the token ids of a candidate, with the end-of-text token if ``held.ends``.

    Raises:
        ConfigError: the candidate has no tokens.
    """
    ids = tokenizer.encode(held.template.format(value=value))
    if held.ends:
        ids = [*ids, tokenizer.eos_id]
    if not ids:
        raise ConfigError(f"evaluation set {held.name}: the answer {value!r} has no tokens")
    return tuple(ids)


def right_answer(sample: Sample, config: HeldOutSet | DrawingSet) -> str:
    """Return the right answer of a sample.

    Raises:
        ConfigError: the field is missing, empty or not a text.
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
    """Builds prompts in the same way as the documents of training.

    Args:
        builder: Builder of the set's documents.
        needs_images: Whether a prompt without an image, video or sound raises.
        shuffle_seed: Seed of the order of the frames of each video; None keeps their order.
    """

    def __init__(
        self, builder: DocumentBuilder, *, needs_images: bool = False, shuffle_seed: int | None = None
    ) -> None:
        self._builder = builder
        self._needs_images = needs_images
        self._shuffle_seed = shuffle_seed
        self._dummy = dummy_document(builder.spec, builder.tokenizer.pad_id)

    @classmethod
    def of_images(
        cls, held: HeldOutSet, data: DataConfig, tokenizer: Tokenizer, spec: MediaSpec, prompt: str | None = None
    ) -> PromptBuilder:
        """Return the builder for a set of kind ``images``; ``prompt`` replaces the set's prompt if given."""
        template = template_of(held) if prompt is None else CaptionTemplate(prompts=(prompt,))
        builder = document_builder(held, template, data, tokenizer, spec)
        return cls(builder, needs_images=True, shuffle_seed=held.seed if held.shuffle_frames else None)

    def num_tokens(self, sample: Sample) -> int:
        """Return the number of tokens of the prompt without decoding images.

        Raises:
            SampleError: the sample does not fit the template or the model.
        """
        return self._builder.dry_run_prompt(sample).num_tokens

    def __call__(self, samples: Sequence[Sample]) -> MultimodalBatch:
        """Return one batch with the prompts of the samples, in order, and a dummy document at the end.

        The dummy document makes every module of the model run.

        Raises:
            SampleError: an image is missing, damaged or does not fit the model, or there are no frames to shuffle.
        """
        documents = [self._builder.build_prompt(sample) for sample in samples]
        if self._shuffle_seed is not None:
            seed = self._shuffle_seed
            documents = [shuffle_frames(document, self._builder.spec, seed) for document in documents]
        for document in documents:
            if self._needs_images and not document.images:
                origin = document.provenance
                shard, key = ("?", "?") if origin is None else (origin.shard, origin.key)
                raise SampleError("no image, video or sound: a set of kind images asks about one", shard=shard, key=key)
        return collate([Pack((*documents, self._dummy), lane=-1)], self._builder.spec)


def shuffle_frames(document: Document, spec: MediaSpec, seed: int) -> Document:
    """Return a document with the used frames of each of its videos in a random order that is not theirs.

    The order depends on the seed and the number of the sample in its data set.

    Raises:
        SampleError: the document has no video with at least two used frames in one item.
    """
    require_frames(document, spec)
    origin = document.provenance
    rng = np.random.default_rng([seed, 0 if origin is None else origin.index])
    return replace(document, items=tuple(_with_shuffled_frames(item, spec, rng) for item in document.items))


def require_frames(document: Document, spec: MediaSpec) -> None:
    """Check that a document, which need not be decoded, has frames to shuffle.

    Raises:
        SampleError: it has no video with at least two used frames in one item.
    """
    origin = document.provenance
    if all(_num_frames(item, spec) < 2 for item in document.items):
        shard, key = ("?", "?") if origin is None else (origin.shard, origin.key)
        raise SampleError(
            "shuffle_frames: no video with at least two frames in one item; with data.video.timestamps or tiling each "
            "frame is an item of its own, so leave shuffle_frames out",
            shard=shard,
            key=key,
        )


def _num_frames(item: MediaItem, spec: MediaSpec) -> int:
    """Return the frames of an item; 0 if it is no image or video."""
    per_group = 1 if item.later_values is None else spec.frames_per_patch
    return item.grid[0] * per_group if item.modality == IMAGE else 0


def _with_shuffled_frames(item: MediaItem, spec: MediaSpec, rng: np.random.Generator) -> MediaItem:
    time, later, num_frames = item.grid[0], item.later_values, _num_frames(item, spec)
    if num_frames < 2:
        return item
    per_group = num_frames // time
    order = rng.permutation(num_frames)
    while (order == np.arange(num_frames)).all():
        order = rng.permutation(num_frames)
    # (group, patch, frame in its group, value) -> (frame, patch, value)
    stored = item.values if later is None else np.concatenate([item.values, later], axis=1)
    frames = stored.reshape(time, -1, per_group, spec.patch_dim).swapaxes(1, 2)
    shuffled = frames.reshape(num_frames, -1, spec.patch_dim)[order]
    patches = shuffled.reshape(time, per_group, -1, spec.patch_dim).swapaxes(1, 2).reshape(len(item.values), -1)
    if later is None:
        return replace(item, values=patches)
    return replace(item, values=patches[:, : spec.patch_dim].copy(), later_values=patches[:, spec.patch_dim :].copy())


def document_builder(
    held: EvaluationSet, template: TemplateConfig | None, data: DataConfig, tokenizer: Tokenizer, spec: MediaSpec
) -> DocumentBuilder:
    """Return the builder of a held-out set's documents, with the set's transforms or those of the first data set.

    The template None is that of the first data set.

    Raises:
        DataConfigError: the transforms do not fit the model, or the tokenizer lacks a token of the template.
    """
    transforms = held.transforms or data.prompts.transforms
    template = template or data.prompts.template
    dataset = DatasetConfig(
        name=held.name,
        manifest=held.manifest,
        template=template,
        transforms=transforms,
        image_tokens=data.prompts.image_tokens,
        video=data.prompts.video,
        **data.prompts.modalities,
    )
    return DocumentBuilder(dataset, tokenizer, spec)


def template_of(held: EvaluationSet) -> TemplateConfig | None:
    """Return the template of a set's documents, or of the prompts of its questions; None for that of training."""
    if isinstance(held, PerplexitySet):
        return held.template
    if isinstance(held, ChoiceSet | GenerationSet) and held.dialogue is not None:
        return held.dialogue
    assert held.prompt is not None, "a set without a prompt has a dialogue"
    return CaptionTemplate(prompts=(held.prompt,))


def reads_images(data: DataConfig, spec: MediaSpec) -> bool:
    """Return whether prompts can hold images: through a vision tower, or as tokens (``data.image_tokens``)."""
    return spec.placement is not Placement.NONE or data.prompts.image_tokens is not None


def unanswerable_sets(config: EvaluationConfig, spec: MediaSpec, data: DataConfig) -> tuple[EvaluationSet, ...]:
    """Return the sets that a model cannot answer.

    A model that reads no images (``reads_images``) and no further modality, such as sound, cannot answer sets of kind
    ``images``; a contrastive model answers only these.
    """
    if not reads_images(data, spec) and not spec.modalities.keys() & data.prompts.modalities.keys():
        return config.image_sets
    return tuple(held for held in config.sets if spec.placement is Placement.PAIR and held not in config.image_sets)


def draw_samples(held: EvaluationSet, num_samples: int, limit: int | None = None) -> list[int]:
    """Choose the samples of a set to score and return their numbers: ``limit``, else ``held.limit``, else all.

    A smaller limit gives a prefix of a larger one.

    Raises:
        ConfigError: the set is empty.
    """
    if not num_samples:
        raise ConfigError(f"evaluation set {held.name}: {held.manifest} has no samples")
    order: list[int] = np.random.default_rng([held.seed, num_samples]).permutation(num_samples).tolist()
    return order[: limit or held.limit or num_samples]


def call_on_all_ranks(world: World, held: EvaluationSet, make: Callable[[], T]) -> T:
    """Return ``make()``, or raise on every rank if it fails on any rank. All ranks must call.

    If one rank raised alone, the others would block in the next forward pass.

    Raises:
        ConfigError, DataPipelineError: ``make`` raised one of these on some rank.
    """
    own: DataPipelineError | ConfigError | None = None
    made = list[T]()
    try:
        made.append(make())
    except (DataPipelineError, ConfigError) as error:
        own = error
    complaint = lowest_rank_error(world, None if own is None else str(own))
    if complaint is not None or not made:
        name = f"evaluation set {held.name}: "
        text = name + (complaint or "").removeprefix(name)
        raise ConfigError(text) if isinstance(own, ConfigError) else DataPipelineError(text)
    return made[0]
