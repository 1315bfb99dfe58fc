"""Check held-out sets before a run starts: missing files, missing fields of samples, too many choices.

The evaluation runs after the last step. An error that only appears there would cost the run its scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataConfigError, DataPipelineError, SampleError
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.sample import Sample
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.manifest_check import reject_non_manifest
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from mmscale.errors import ConfigError
from mmscale.evaluate.choice import make_question
from mmscale.evaluate.config import EvaluationConfig, EvaluationSet, HeldOutSet, Normalise, PerplexitySet
from mmscale.evaluate.heldout import (
    candidate_ids,
    document_builder,
    draw_samples,
    right_answer,
    template_of,
    unanswerable_sets,
)
from mmscale.evaluate.questions import make_blocks

_MOST_READ = 10_000
"""Samples that are read per manifest. The rest of a larger set is not checked."""


def check_sets(config: EvaluationConfig, data: DataConfig, spec: MediaSpec) -> None:
    """Check the held-out sets. Reads texts and image headers of up to 10,000 samples per manifest; decodes no image.

    A set that the model cannot answer is checked for its files only.

    Raises:
        ConfigError: a manifest is missing, a sample lacks a field, the set has fewer candidates than ``choices``, or a
            contrastive model cannot score as the set configures.
        DataConfigError: a set's transforms do not fit the model, or the tokenizer lacks a token of its template.
        DataPipelineError: a file is damaged, or a sample does not fit the set's template.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    for held in config.sets:
        for manifest in (held.manifest, getattr(held, "candidates_from", None)):
            if manifest is None:
                continue
            if not manifest.exists():
                raise ConfigError(f"evaluation set {held.name}: {manifest}: no such file")
            reject_non_manifest(manifest, str(manifest), f"evaluation set {held.name}: manifest")
        if held in unanswerable_sets(config, spec):
            continue
        if spec.placement is Placement.PAIR and isinstance(held, HeldOutSet):
            _check_contrastive(held)
        try:
            _check_samples(held, data, tokenizer, spec)
        except (DataConfigError, ConfigError) as error:
            raise type(error)(_named(held, error)) from error
        except DataPipelineError as error:
            raise DataPipelineError(_named(held, error)) from error


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


def _check_samples(held: EvaluationSet, data: DataConfig, tokenizer: Tokenizer, spec: MediaSpec) -> None:
    builder = document_builder(held, template_of(held), data, tokenizer, spec)
    num_samples = Manifest.open(held.manifest).num_samples
    chosen = draw_samples(held, num_samples)
    is_chosen = set(chosen)
    answers = []
    for number, sample in enumerate(_without_images(held, held.manifest)):
        if isinstance(held, HeldOutSet):
            answers.append(right_answer(sample, held))
        if number not in is_chosen:
            continue
        if isinstance(held, PerplexitySet):
            builder.dry_run(sample)
            continue
        question = sample if isinstance(held, HeldOutSet) else make_question(sample, held).sample
        document = builder.dry_run_prompt(question)
        if isinstance(held, HeldOutSet) and not document.items:
            origin = sample.provenance
            raise SampleError("no image: a set of kind images asks about images", shard=origin.shard, key=origin.key)
    if isinstance(held, HeldOutSet):
        _check_answers(held, answers, chosen, num_samples, tokenizer, spec)


def _check_answers(
    held: HeldOutSet, answers: list[str], chosen: list[int], num_samples: int, tokenizer: Tokenizer, spec: MediaSpec
) -> None:
    pool, num_candidates = answers, num_samples
    if held.candidates_from is not None:
        pool = [right_answer(sample, held) for sample in _without_images(held, held.candidates_from)]
        num_candidates = Manifest.open(held.candidates_from).num_samples
    if spec.placement is not Placement.PAIR:
        for value in {*pool, *answers}:
            candidate_ids(held, value, tokenizer)
    if len(answers) == num_samples and len(pool) == num_candidates:
        make_blocks([answers[number] for number in chosen], pool, held.choices, held.seed)
    elif held.choices is not None and held.choices > num_samples + num_candidates:
        raise ConfigError(f"choices={held.choices}: the set has {num_samples} samples")


def _without_images(held: EvaluationSet, manifest: Path) -> Iterator[Sample]:
    return islice(read_samples(manifest, held.name, images=False), _MOST_READ)
