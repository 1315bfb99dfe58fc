"""Check held-out sets before a run starts: files, fields, answers, images, lengths, captions.

The evaluation runs after the last step, or long after the first one. An error that only appears there would cost the
run its scores.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataConfigError, DataPipelineError, SampleError
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.sample import Sample
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.manifest_check import reject_non_manifest
from data_pipeline.shards.sample_reader import SampleReader, read_samples
from data_pipeline.text.templates import PreferenceTemplate
from data_pipeline.text.templates.base import fill
from data_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from mmscale.errors import ConfigError
from mmscale.evaluate.answer_metrics import require_metric
from mmscale.evaluate.choice import ChoiceQuestion, answer_ids, make_question
from mmscale.evaluate.config import (
    CaptionsConfig,
    ChoiceSet,
    DrawingSet,
    EvaluationConfig,
    EvaluationSet,
    GenerationSet,
    HeldOutSet,
    Normalise,
    PerplexitySet,
)
from mmscale.evaluate.drawing_scores import check_drawing_set
from mmscale.evaluate.drawings import DrawingContext
from mmscale.evaluate.generation import OpenQuestion, check_control, check_length, make_open_question
from mmscale.evaluate.heldout import (
    PromptBuilder,
    candidate_ids,
    document_builder,
    draw_samples,
    require_frames,
    right_answer,
    template_of,
    unanswerable_sets,
)
from mmscale.evaluate.perplexity import Documents
from mmscale.evaluate.questions import make_blocks
from mmscale.evaluate.similarity import PAIR_TEMPLATE
from mmscale.models.config import ModelConfig, TokenizerConfig

_AskedSet = HeldOutSet | PerplexitySet | ChoiceSet | GenerationSet
_MOST_READ = 10_000
"""Samples that are read per manifest. The rest of a larger set is not checked."""
_MOST_DECODED = 16
"""Samples per set whose images are decoded too. A kind of image that cannot be decoded is then found at once."""


def check_sets(
    config: EvaluationConfig,
    data: DataConfig,
    spec: MediaSpec,
    *,
    drawing: DrawingContext | None = None,
    model: ModelConfig | TokenizerConfig | None = None,
) -> None:
    """Check the held-out sets and the captions.

    Reads texts and image headers of up to 10,000 samples per manifest, and decodes the images of 16 samples per set. A
    set that the model cannot answer is checked for its files only.

    Args:
        config: The sets and the captions.
        data: Data block of the model.
        spec: Media that the model accepts.
        drawing: Inputs of sets of kind ``drawings``; None draws as ``data`` says.
        model: The model, for sets of kind ``drawings``.

    Raises:
        ConfigError: a manifest is missing, a sample lacks a field, the set has fewer candidates than ``choices``, a
            question with an answer or a caption exceeds the positions of the model, or a contrastive model cannot score
            as the set configures.
        DataConfigError: a set's transforms do not fit the model, or the tokenizer lacks a token of its template.
        DataPipelineError: a file is damaged, or a sample does not fit the set's template.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    captions = config.captions if spec.placement is not Placement.PAIR else None
    for held in config.sets:
        for manifest in (held.manifest, getattr(held, "candidates_from", None), getattr(held, "train", None)):
            if manifest is None:
                continue
            if not manifest.exists():
                raise ConfigError(f"evaluation set {held.name}: {manifest}: no such file")
            reject_non_manifest(manifest, str(manifest), f"evaluation set {held.name}: manifest")
        if held in unanswerable_sets(config, spec, data):
            continue
        if spec.placement is Placement.PAIR and isinstance(held, HeldOutSet):
            _check_contrastive(held)
        try:
            if isinstance(held, DrawingSet):
                check_drawing_set(held, drawing or DrawingContext(data), spec, model)
                continue
            _check_samples(held, data, tokenizer, spec)
            if captions is not None and isinstance(held, HeldOutSet) and held.name in (captions.sets or (held.name,)):
                _check_captions(held, captions, data, tokenizer, spec)
        except (DataConfigError, ConfigError) as error:
            raise type(error)(_named(held, error)) from error
        except DataPipelineError as error:
            raise DataPipelineError(_named(held, error)) from error


def check_best(
    config: EvaluationConfig, spec: MediaSpec, data: DataConfig, undrawn: Collection[str] = frozenset()
) -> None:
    """Check that a model gives the value of ``best.metric``; ``undrawn``: names of sets whose texts it does not draw.

    Raises:
        ConfigError: the model cannot answer the set, or its results of this set lack the value.
    """
    if config.best is None:
        return
    held = next(held for held in config.sets if held.name == config.best.set)
    missing = None
    if held in unanswerable_sets(config, spec, data):
        missing = f"the model of the last stage cannot answer set {held.name}"
    elif held.name in undrawn:
        missing = f"the last stage draws no images for set {held.name}"
    elif spec.placement is Placement.PAIR and config.best.value != "score":
        missing = f"a contrastive model gives no {config.best.value}"
    if missing is not None:
        raise ConfigError(f"evaluation.best.metric={config.best.metric}: {missing}; choose another value")


def _named(held: EvaluationSet, error: Exception) -> str:
    name = f"evaluation set {held.name}: "
    return name + str(error).removeprefix(name)


def _check_contrastive(held: HeldOutSet) -> None:
    for name, supported in (("ends", held.ends), ("normalise", held.normalise is not Normalise.TOKENS)):
        if not supported:
            raise ConfigError(
                f"evaluation set {held.name}: {name}={getattr(held, name)}: not supported by a model that compares "
                "whole texts with images (connector.kind=contrastive); remove this key"
            )


def _check_samples(held: _AskedSet, data: DataConfig, tokenizer: Tokenizer, spec: MediaSpec) -> None:
    builder = document_builder(held, template_of(held), data, tokenizer, spec)
    if isinstance(held, PerplexitySet) and isinstance(builder.dataset.template, PreferenceTemplate):
        raise ConfigError(
            f"evaluation set {held.name}: template.kind=preference has a rejected answer, whose likelihood is no "
            "score; give the set the template of one answer"
        )
    if isinstance(held, GenerationSet):
        require_metric(held.metric)
    with closing(SampleReader(Manifest.open(held.manifest), held.name)) as reader:
        chosen = draw_samples(held, reader.manifest.num_samples)[:_MOST_READ]
        if isinstance(held, GenerationSet):
            check_control(held, len(chosen))
        if isinstance(held, PerplexitySet):
            Documents.of(held, data, tokenizer, spec, reader).plan(chosen)
            for number in chosen[:_MOST_DECODED]:
                builder(reader.read(number))
            return
        samples = []
        for place, number in enumerate(chosen):
            is_decoded = place < _MOST_DECODED
            sample = reader.read(number) if is_decoded else reader.read_without_images(number)
            question = _question(sample, held)
            asked = sample if question is None else question.sample
            document = builder.build_prompt(asked) if is_decoded else builder.dry_run_prompt(asked)
            if isinstance(held, HeldOutSet) and not document.images:
                origin = sample.provenance
                raise SampleError(
                    "no image, video or sound: a set of kind images asks about one", shard=origin.shard, key=origin.key
                )
            if isinstance(held, HeldOutSet) and held.shuffle_frames:
                require_frames(document, spec)
            if isinstance(held, ChoiceSet) and isinstance(question, ChoiceQuestion):
                answers = [answer_ids(held, choice, tokenizer) for choice in question.choices]
                _check_length(sample, document.num_tokens, max(map(len, answers)) - 1, spec)
            if isinstance(held, GenerationSet):
                check_length(sample, document.num_tokens, held, spec.max_document_tokens)
            samples.append(sample)
    if isinstance(held, HeldOutSet):
        _check_answers(held, samples, data, tokenizer, spec)


def _question(sample: Sample, held: HeldOutSet | ChoiceSet | GenerationSet) -> ChoiceQuestion | OpenQuestion | None:
    """Return the question of a sample; None if the sample itself is the question."""
    if isinstance(held, HeldOutSet):
        return None
    return make_open_question(sample, held) if isinstance(held, GenerationSet) else make_question(sample, held)


def _check_length(sample: Sample, num_tokens: int, num_new_tokens: int, spec: MediaSpec) -> None:
    """Check that a prompt and its continuation fit into the positions of the model."""
    most, origin = spec.max_document_tokens, sample.provenance
    if most is not None and num_tokens + num_new_tokens > most:
        raise ConfigError(
            f"{origin.shard}/{origin.key}: {num_tokens} tokens and {num_new_tokens} more for the answer exceed the "
            f"{most} positions of the model (model.decoder.learned_positions); shorten the prompt, or limit the answer"
        )


def _check_answers(
    held: HeldOutSet, samples: Sequence[Sample], data: DataConfig, tokenizer: Tokenizer, spec: MediaSpec
) -> None:
    """Check the right answers of the samples that are scored, and the candidates."""
    answers = [right_answer(sample, held) for sample in samples]
    source = held.candidates_from or held.manifest
    pool = [right_answer(sample, held) for sample in _without_images(held, source)]
    candidates = {*pool, *answers}
    if spec.placement is Placement.PAIR:
        _check_pairs(held, samples, candidates, data, tokenizer, spec)
    else:
        prompts = PromptBuilder.of_images(held, data, tokenizer, spec)
        longest = max(len(candidate_ids(held, value, tokenizer)) for value in candidates) - 1
        if spec.max_document_tokens is not None:
            for sample in samples:
                _check_length(sample, prompts.num_tokens(sample), longest, spec)
    num_scored = len(draw_samples(held, Manifest.open(held.manifest).num_samples))
    num_candidates = Manifest.open(source).num_samples
    is_whole = len(pool) == num_candidates
    if len(answers) == num_scored and (is_whole or (held.choices or num_candidates) <= len(candidates)):
        make_blocks(answers, pool, held.choices, held.seed)
    elif held.choices is not None and held.choices > num_scored + num_candidates:
        raise ConfigError(
            f"choices={held.choices}: {source} has {num_candidates} samples, so there are fewer different answers"
        )


def _check_pairs(
    held: HeldOutSet,
    samples: Sequence[Sample],
    candidates: set[str],
    data: DataConfig,
    tokenizer: Tokenizer,
    spec: MediaSpec,
) -> None:
    """Check the documents of a contrastive model: each prompt with one candidate, each candidate with one prompt."""
    builder = document_builder(held, PAIR_TEMPLATE, data, tokenizer, spec)
    longest = max(candidates, key=lambda value: len(tokenizer.encode(held.template.format(value=value))))
    for sample, value in [*((sample, longest) for sample in samples), *((samples[0], value) for value in candidates)]:
        fields = {"prompt": fill(held.prompt, sample.fields), "answer": held.template.format(value=value)}
        _check_length(sample, builder.dry_run(replace(sample, fields=fields)).num_tokens, 0, spec)


def _check_captions(
    held: HeldOutSet, captions: CaptionsConfig, data: DataConfig, tokenizer: Tokenizer, spec: MediaSpec
) -> None:
    prompts = PromptBuilder.of_images(held, data, tokenizer, spec, captions.prompt)
    with closing(SampleReader(Manifest.open(held.manifest), held.name)) as reader:
        for number in draw_samples(held, reader.manifest.num_samples, captions.num_images)[:_MOST_READ]:
            sample = reader.read_without_images(number)
            try:
                _check_length(sample, prompts.num_tokens(sample), captions.max_new_tokens, spec)
            except (ConfigError, SampleError) as error:
                raise ConfigError(f"evaluation.captions: {error}") from error


def _without_images(held: EvaluationSet, manifest: Path) -> Iterator[Sample]:
    return islice(read_samples(manifest, held.name, images=False), _MOST_READ)
