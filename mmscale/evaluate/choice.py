"""Score multiple-choice questions: the model chooses the answer with the highest log-likelihood after the question.

sample --fields--> question, choices, right choice --pairs--> log-likelihoods --four normalisations--> accuracies
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.sample import Sample
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.text.templates.base import fill, look_up
from data_pipeline.text.tokenizer import Tokenizer
from mmscale.evaluate.config import ChoiceSet
from mmscale.evaluate.heldout import (
    EvaluationContext,
    PromptBuilder,
    call_on_all_ranks,
    document_builder,
    draw_samples,
    template_of,
)
from mmscale.evaluate.pairs import Pair, PairScorer
from mmscale.evaluate.result import ChoiceResult, binomial_error


@dataclass(frozen=True)
class ChoiceQuestion:
    """One multiple-choice question.

    Attributes:
        sample: Sample with the fields that the set's template expects.
        choices: Texts to choose from.
        right: Index of the right choice.
    """

    sample: Sample
    choices: tuple[str, ...]
    right: int


def score_choices(context: EvaluationContext, held: ChoiceSet) -> ChoiceResult:
    """Score one set. All ranks must call.

    Raises:
        DataPipelineError: the set is empty, or a sample is damaged or lacks a field that the set needs. Every rank
            raises.
    """
    questions = call_on_all_ranks(context.world, held, lambda: read_questions(held))
    pairs = [
        Pair(number, answer_ids(held, choice, context.tokenizer))
        for number, question in enumerate(questions)
        for choice in question.choices
    ]
    prompts = PromptBuilder(document_builder(held, template_of(held), context.data, context.tokenizer, context.spec))
    values = PairScorer(context, held, [question.sample for question in questions], prompts).run(pairs).likelihoods
    ends = np.cumsum([len(question.choices) for question in questions])[:-1]
    tokens = np.split(np.array([len(pair.answer) for pair in pairs]), ends)
    return _result(held, questions, np.split(values, ends), tokens)


def read_questions(held: ChoiceSet) -> list[ChoiceQuestion]:
    """Read the questions of a set, at most ``held.limit`` of them.

    Raises:
        ConfigError: the set is empty.
        ManifestError, ShardError, SampleError: a file is missing or damaged, or a sample lacks a field.
    """
    reader = SampleReader(Manifest.open(held.manifest), held.name)
    try:
        return [make_question(reader.read(number), held) for number in draw_samples(held, reader.manifest.num_samples)]
    finally:
        reader.close()


def make_question(sample: Sample, held: ChoiceSet) -> ChoiceQuestion:
    """Convert a sample to a question.

    Raises:
        SampleError: the sample lacks a field, or a field has a value that the set does not expect.
    """
    try:
        choices = _choices(sample, held)
        right = _right(sample, held, choices)
        if held.dialogue is not None:
            words = fill(held.prompt, sample.fields)
            sample = replace(sample, fields=held.dialogue.question(words))
        return ChoiceQuestion(sample, choices, right)
    except SampleError as error:
        raise error.located(sample.provenance.shard, sample.provenance.key) from error


def _choices(sample: Sample, held: ChoiceSet) -> tuple[str, ...]:
    listed = look_up(held.choices, sample.fields) if isinstance(held.choices, str) else list(held.choices)
    texts = isinstance(listed, list) and all(isinstance(one, str) and one.strip() for one in listed)
    if not texts or len(listed) < 2:
        reason = f"field {held.choices!r} is {listed!r:.80}, expected a list of at least two texts"
        raise SampleError(reason, kind=FaultKind.TEXT)
    return tuple(listed)


def _right(sample: Sample, held: ChoiceSet, choices: Sequence[str]) -> int:
    value = look_up(held.answer, sample.fields)
    index: object = value
    if held.answer_as == "letter":
        letters = string.ascii_uppercase[: len(choices)]
        index = letters.find(value.upper()) if isinstance(value, str) and len(value) == 1 else None
    elif held.answer_as == "text":
        index = choices.index(value) if choices.count(value) == 1 else None
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(choices):
        expected = {
            "index": f"a number from 0 to {len(choices) - 1}",
            "letter": f"a letter from A to {string.ascii_uppercase[min(len(choices), 26) - 1]}",
            "text": "the text of exactly one choice",
        }[held.answer_as]
        raise SampleError(f"field {held.answer!r} is {value!r:.80}, expected {expected}", kind=FaultKind.TEXT)
    return index


def answer_ids(held: ChoiceSet, choice: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the token ids that are scored for a choice, with the closing tokens if ``held.ends``."""
    ids = tokenizer.encode(held.template.format(value=choice))
    if held.ends:
        closing = held.dialogue.closing if held.dialogue is not None else ()
        ids += [tokenizer.special_id(name, "dialogue.special_tokens") for name in closing] or [tokenizer.eos_id]
    return tuple(ids)


def _result(
    held: ChoiceSet,
    questions: Sequence[ChoiceQuestion],
    values: Sequence[npt.NDArray[np.float64]],
    tokens: Sequence[npt.NDArray[np.int64]],
) -> ChoiceResult:
    n = len(questions)
    shares: dict[str, float] = dict.fromkeys(("none", "tokens", "characters", "bytes"), 0.0)
    for question, likelihoods, counts in zip(questions, values, tokens, strict=True):
        for how, compared in normalised_likelihoods(likelihoods, counts, question.choices).items():
            shares[how] += credit(compared, question.right) / n
    right = [float(likelihoods[question.right]) for question, likelihoods in zip(questions, values, strict=True)]
    num_tokens = sum(int(counts[question.right]) for question, counts in zip(questions, tokens, strict=True))
    sizes = sorted({len(question.choices) for question in questions})
    among = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    score = min(shares[held.normalise], 1.0)  # A sum of 1 / n may exceed 1 by rounding.
    return ChoiceResult(
        score=score,
        chance=sum(1 / len(question.choices) for question in questions) / n,
        n=n,
        metric=f"right choice among {among}",
        error=binomial_error(score, n),
        scores={how: min(share, 1.0) for how, share in shares.items()},
        loss=-sum(right) / num_tokens,
    )


def normalised_likelihoods(
    likelihoods: npt.NDArray[np.float64], tokens: npt.NDArray[np.int64], choices: Sequence[str]
) -> dict[str, npt.NDArray[np.float64]]:
    """Return the values that choices are compared by, for each normalisation.

    Source: lm-evaluation-harness, where ``none`` is called acc and ``characters`` acc_norm.
    """
    return {
        "none": likelihoods,
        "tokens": likelihoods / tokens,
        "characters": likelihoods / np.array([len(choice) for choice in choices]),
        "bytes": likelihoods / np.array([len(choice.encode()) for choice in choices]),
    }


def credit(values: npt.NDArray[np.float64], right: int) -> float:
    """Return 1 if the right answer has the largest value, 1 / k if it shares it with k - 1 others, else 0."""
    best = values == values.max()
    return float(best[right]) / int(best.sum())
