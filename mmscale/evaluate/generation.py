"""Score generated answers: the model continues each prompt, and a metric compares the text with reference answers.

    samples --prompts--> chunks --ranks, key-value cache--> answers --metric--> value, answers/NAME.jsonl

Chunks do not depend on the number of ranks, and neither do answers and values. All ranks run equally many forward
passes: after each token they exchange one flag, and they continue while any of them has an unfinished answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from data_pipeline.batch import MultimodalBatch
from data_pipeline.errors import DataPipelineError, FaultKind, SampleError
from data_pipeline.io.atomic import as_utf8, write_whole
from data_pipeline.sample import Sample
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.text.templates.base import fill, look_up
from data_pipeline.text.tokenizer import Tokenizer
from mmscale.dist import World, any_rank, broadcast_bytes, gather_bytes
from mmscale.errors import ConfigError
from mmscale.evaluate.answer_media import MOST_SHOWN, copy_media
from mmscale.evaluate.answer_metrics import LEAST_REFERENCES, TITLES, MetricValues, caption_words, score_answers
from mmscale.evaluate.config import GenerationSet
from mmscale.evaluate.heldout import (
    EvaluationContext,
    PromptBuilder,
    call_on_all_ranks,
    document_builder,
    draw_samples,
    template_of,
)
from mmscale.evaluate.pairs import Prompts, chunk_ranges, chunks_of_rank
from mmscale.evaluate.result import GenerationResult
from mmscale.models.generation import generate
from mmscale.models.sampling import SamplingConfig


@dataclass(frozen=True)
class OpenQuestion:
    """A question without given choices.

    Attributes:
        sample: Sample with the fields that the set's template expects.
        prompt: The text of the question; None if the turns of the sample ask it.
        references: Reference answers, at least one.
    """

    sample: Sample
    prompt: str | None
    references: tuple[str, ...]


def score_generation(context: EvaluationContext, held: GenerationSet) -> GenerationResult:
    """Score one set, and write its answers to ``context.answers_folder``. All ranks must call.

    Raises:
        ConfigError: the package of the metric is missing.
        DataPipelineError: the set is empty, a sample is damaged, lacks a field or does not fit the model, or a file
            cannot be written. Every rank raises.
    """
    questions = call_on_all_ranks(context.world, held, lambda: _read_questions(held))
    samples = [question.sample for question in questions]
    template = template_of(held) or context.data.prompts.template
    prompts = PromptBuilder(document_builder(held, template, context.data, context.tokenizer, context.spec))
    answers = generate_answers(context, held, prompts, template.closing, samples)
    answers = [answer.strip() for answer in answers]
    references = [question.references for question in questions]
    values = _scored(held, answers, references)
    if context.answers_folder is not None:
        call_on_all_ranks(context.world, held, lambda: _write_answers(context, held, questions, answers, values))
    result = GenerationResult(score=values.score, n=len(questions), metric=TITLES[held.metric], error=values.error)
    if not held.control:
        return result
    cycle = np.random.default_rng([held.seed, len(questions)]).permutation(len(questions))
    other = np.empty_like(cycle)
    other[cycle] = np.roll(cycle, 1)  # A single cycle has no fixed point.
    control = _scored(held, [answers[number] for number in other], references)
    chance = _scored(held, [references[number][0] for number in other], references)
    return replace(result, control=control.score, control_error=control.error, chance=chance.score)


def _scored(held: GenerationSet, answers: Sequence[str], references: Sequence[tuple[str, ...]]) -> MetricValues:
    ignore = ("case", "punctuation") if held.ignore is None else held.ignore
    return score_answers(held.metric, answers, references, ignore)


def _read_questions(held: GenerationSet) -> list[OpenQuestion]:
    reader = SampleReader(Manifest.open(held.manifest), held.name)
    try:
        chosen = draw_samples(held, reader.manifest.num_samples)
        check_control(held, len(chosen))
        return [make_open_question(reader.read(number), held) for number in chosen]
    finally:
        reader.close()


def check_control(held: GenerationSet, num_questions: int) -> None:
    """Require two questions of a set with a control.

    Raises:
        ConfigError: there is one question.
    """
    if held.control and num_questions < 2:
        raise ConfigError(f"{held.manifest} has one sample; control=true permutes answers, so it needs at least 2")


def make_open_question(sample: Sample, held: GenerationSet) -> OpenQuestion:
    """Convert a sample to a question.

    Raises:
        SampleError: the sample lacks a field, or a field has a value that the set does not expect.
    """
    try:
        references = _references(sample, held)
        if held.prompt is None:
            return OpenQuestion(sample, None, references)
        prompt = fill(held.prompt, sample.fields)
        if held.dialogue is not None:
            sample = replace(sample, fields=held.dialogue.question(prompt))
        return OpenQuestion(sample, prompt, references)
    except SampleError as error:
        raise error.located(sample.provenance.shard, sample.provenance.key) from error


def _references(sample: Sample, held: GenerationSet) -> tuple[str, ...]:
    value = look_up(held.answers, sample.fields)
    listed = (
        [one.get("answer") if isinstance(one, dict) else one for one in value] if isinstance(value, list) else [value]
    )
    texts = tuple(str(one) for one in listed if isinstance(one, str | int | float) and not isinstance(one, bool))
    least = LEAST_REFERENCES.get(held.metric, 1)
    has_words = all(caption_words(text) if held.metric == "cider" else text.strip() for text in texts)
    if len(texts) < len(listed) or len(texts) < least or not has_words:
        expected = "a text or a list of texts" if least == 1 else f"a list of at least {least} texts"
        reason = f"field {held.answers!r} is {value!r:.80}, expected {expected} for metric={held.metric}"
        raise SampleError(reason, kind=FaultKind.TEXT)
    return texts


def check_length(sample: Sample, num_tokens: int, held: GenerationSet, longest: int | None) -> None:
    """Check that prompt and answer fit into the model's positions. ``longest`` is ``MediaSpec.max_document_tokens``.

    Raises:
        SampleError: they do not.
    """
    if longest is not None and num_tokens + held.max_new_tokens > longest:
        reason = (
            f"a prompt of {num_tokens} tokens with max_new_tokens={held.max_new_tokens} exceeds the model's {longest} "
            "positions; shorten the prompt or lower max_new_tokens"
        )
        raise SampleError(reason, shard=sample.provenance.shard, key=sample.provenance.key)


def generate_answers(
    context: EvaluationContext,
    held: GenerationSet,
    prompts: Prompts,
    closing: Sequence[str],
    samples: Sequence[Sample],
) -> list[str]:
    """Continue the prompt of each sample; return the texts, the same on every rank. All ranks must call.

    Args:
        context: Model, settings and ranks.
        held: Gives the length of an answer, the sampling and the texts that end it, and the name for messages.
        prompts: Builds the prompts of samples.
        closing: Names of tokens that end an answer.
        samples: The samples.

    Raises:
        DataPipelineError: a sample is damaged or too long. Every rank raises.
    """
    world = context.world

    def size(sample: Sample) -> int:
        num_tokens = prompts.num_tokens(sample)
        check_length(sample, num_tokens, held, context.spec.max_document_tokens)
        return num_tokens + held.max_new_tokens

    sizes = call_on_all_ranks(world, held, lambda: [size(sample) for sample in samples])
    # Sort by size: the cache has room for the longest prompt of a chunk in each of its rows.
    order = sorted(range(len(samples)), key=lambda number: -sizes[number])
    chunks = list(chunk_ranges([sizes[number] for number in order], context.config.tokens_per_forward))
    writer = AnswerWriter(context.model, context.tokenizer, closing, held.stop, world)  # type: ignore[arg-type]
    own: dict[int, str] = {}
    for is_own, (start, end) in chunks_of_rank(chunks, world):
        chosen = order[start:end]
        batch = call_on_all_ranks(world, held, lambda: prompts([samples[number] for number in chosen]))  # noqa: B023  called at once
        # Chunks have different seeds: with the same one, their first samples would draw the same random numbers.
        sampling = held.sampling.model_copy(update={"seed": held.sampling.seed + start})
        texts = writer(batch.to(world.device), held.max_new_tokens, sampling)
        if is_own:
            own.update(zip(chosen, texts, strict=True))
    return _gathered(world, own, len(samples))


@dataclass(frozen=True)
class AnswerWriter:
    """Generates texts for batches of prompts.

    Attributes:
        model: ``MultimodalModel`` or an engine's ``model``, in evaluation mode.
        tokenizer: Tokenizer of the model.
        closing: Names of tokens that end an answer, in addition to the end token.
        stop: Texts that end an answer.
        world: Ranks that generate together.
        show: Called after each token with the number of the answer and its text so far.
    """

    model: nn.Module
    tokenizer: Tokenizer
    closing: Sequence[str] = ()
    stop: Sequence[str] = ()
    world: World | None = None
    show: Callable[[int, str], None] | None = None

    def __call__(self, batch: MultimodalBatch, max_new_tokens: int, sampling: SamplingConfig) -> list[str]:
        """Return one text for each prompt, with its white space. If ``world`` has several ranks, all must call."""
        answers = generate(
            self.model,  # type: ignore[arg-type]
            batch,
            max_new_tokens,
            self.tokenizer.eos_id,
            sampling,
            stop_ids=[self.tokenizer.special_id(name, "template.special_tokens") for name in self.closing],
            watch=self._watch if self.stop or self.show is not None else None,
            any_running=bool if self.world is None else partial(any_rank, self.world),
        )
        return [self._before_stop(self.tokenizer.decode(tokens)) for tokens in answers]

    def _watch(self, number: int, tokens: list[int]) -> bool:
        text = self.tokenizer.decode(tokens)
        if self.show is not None:
            self.show(number, self._before_stop(text))
        return any(end in text for end in self.stop)

    def _before_stop(self, text: str) -> str:
        positions = [position for end in self.stop if (position := text.find(end)) >= 0]
        return text[: min(positions)] if positions else text


def _gathered(world: World, own: dict[int, str], count: int) -> list[str]:
    """Return the texts of all ranks in order. All ranks must call."""
    parts = gather_bytes(world, json.dumps(list(own.items())).encode())
    found = dict(pair for part in parts for pair in json.loads(part))  # Empty on ranks other than 0.
    joined = json.dumps([found[number] for number in range(count)]).encode() if world.is_main else b""
    texts: list[str] = json.loads(broadcast_bytes(world, joined))
    return texts


def _write_answers(
    context: EvaluationContext,
    held: GenerationSet,
    questions: Sequence[OpenQuestion],
    answers: Sequence[str],
    values: MetricValues,
) -> None:
    """Write one JSON object per sample, and the media of the first ones, on rank 0."""
    assert context.answers_folder is not None
    if not context.world.is_main:
        return
    lines, path = list[str](), context.answers_folder / f"{held.name}.jsonl"
    try:
        for number, (question, answer, value) in enumerate(zip(questions, answers, values.each, strict=True)):
            origin = question.sample.provenance
            line: dict[str, Any] = {"shard": origin.shard, "key": origin.key, "prompt": question.prompt}
            line |= {"answer": answer, "references": question.references, "score": value}
            shown = number < MOST_SHOWN
            if shown and (media := copy_media(context.answers_folder, held.name, number, question.sample)):
                line["media"] = media
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        write_whole(path, as_utf8("".join(lines)), parents=True)
    except OSError as error:
        raise DataPipelineError(f"{path}: {error.strerror}") from error
