"""Find before a run starts what would end its evaluation: absent files, fields that samples lack, too many choices.

An evaluation comes after the last step, so a mistake that it alone found would cost the whole run its scores.
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
from data_pipeline.shards.mistaken import refuse_no_manifest
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from mmscale.errors import ConfigError
from mmscale.evaluate.choice import question_of
from mmscale.evaluate.config import EvaluationConfig, EvaluationSet, HeldOutSet, Normalise, PerplexitySet
from mmscale.evaluate.heldout import answer_of, candidate_ids, document_builder, draw, not_asked, template_of
from mmscale.evaluate.questions import deal

_MOST_READ = 10_000
"""Samples of a manifest that are read; a larger set is checked as far as these tell."""


def check_sets(config: EvaluationConfig, data: DataConfig, spec: MediaSpec) -> None:
    """Check all that can be known of the sets before a run. Reads texts and image sizes, and decodes no image.

    Raises:
        ConfigError: a manifest is missing, a sample lacks a field, the set cannot give so many choices, or the model
            does not score as the set says.
        DataConfigError: a set's transforms do not fit the model, or the tokenizer lacks a token of its template.
        DataPipelineError: a file is damaged, or a sample cannot be asked about.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    for held in config.sets:
        for manifest in (held.manifest, getattr(held, "candidates_from", None)):
            if manifest is None:
                continue
            if not manifest.exists():
                raise ConfigError(f"evaluation set {held.name}: {manifest}: no such file")
            refuse_no_manifest(manifest, str(manifest), f"evaluation set {held.name}: manifest")
        if held in not_asked(config, spec):
            continue
        if spec.placement is Placement.PAIR and isinstance(held, HeldOutSet):
            _check_compared(held)
        try:
            _check_samples(held, data, tokenizer, spec)
        except (DataConfigError, ConfigError) as error:
            raise type(error)(_named(held, error)) from error
        except DataPipelineError as error:
            raise DataPipelineError(_named(held, error)) from error


def _named(held: EvaluationSet, error: Exception) -> str:
    name = f"evaluation set {held.name}: "
    return name + str(error).removeprefix(name)


def _check_compared(held: HeldOutSet) -> None:
    for name, wanted in (("ends", held.ends), ("normalise", held.normalise is not Normalise.TOKENS)):
        if not wanted:
            raise ConfigError(
                f"evaluation set {held.name}: {name}={getattr(held, name)}: the model compares whole texts with images "
                "(connector.kind=contrastive), by one number each; leave it out"
            )


def _check_samples(held: EvaluationSet, data: DataConfig, tokenizer: Tokenizer, spec: MediaSpec) -> None:
    builder = document_builder(held, template_of(held), data, tokenizer, spec)
    num_samples = Manifest.open(held.manifest).num_samples
    asked = draw(held, num_samples)
    is_asked = set(asked)
    answers = []
    for number, sample in enumerate(_outlines(held, held.manifest)):
        if isinstance(held, HeldOutSet):
            answers.append(answer_of(sample, held))
        if number not in is_asked:
            continue
        if isinstance(held, PerplexitySet):
            builder.measure(sample)
            continue
        question = sample if isinstance(held, HeldOutSet) else question_of(sample, held).sample
        document = builder.measure_prompt(question)
        if isinstance(held, HeldOutSet) and not document.items:
            origin = sample.provenance
            raise SampleError("no image: there is nothing to ask about", shard=origin.shard, key=origin.key)
    if isinstance(held, HeldOutSet):
        _check_answers(held, answers, asked, num_samples, tokenizer, spec)


def _check_answers(
    held: HeldOutSet, answers: list[str], asked: list[int], num_samples: int, tokenizer: Tokenizer, spec: MediaSpec
) -> None:
    pool, num_candidates = answers, num_samples
    if held.candidates_from is not None:
        pool = [answer_of(sample, held) for sample in _outlines(held, held.candidates_from)]
        num_candidates = Manifest.open(held.candidates_from).num_samples
    if spec.placement is not Placement.PAIR:
        for value in {*pool, *answers}:
            candidate_ids(held, value, tokenizer)
    if len(answers) == num_samples and len(pool) == num_candidates:
        deal([answers[number] for number in asked], pool, held.choices, held.seed)
    elif held.choices is not None and held.choices > num_samples + num_candidates:
        raise ConfigError(f"choices={held.choices}: the set has {num_samples} samples")


def _outlines(held: EvaluationSet, manifest: Path) -> Iterator[Sample]:
    return islice(read_samples(manifest, held.name, outlines=True), _MOST_READ)
