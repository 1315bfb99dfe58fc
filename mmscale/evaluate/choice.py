"""Multiple choice: which of a sample's own choices does the model find likeliest behind its question?

sample --fields--> question, choices, right one --pairs--> log-likelihoods --compared in four ways--> shares
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
from mmscale.evaluate.heldout import Asked, PromptBuilder, document_builder, draw, template_of, together
from mmscale.evaluate.pairs import Pair, PairScorer
from mmscale.evaluate.result import ChoiceResult, binomial_error


@dataclass(frozen=True)
class Question:
    """One sample of a set.

    Attributes:
        sample: As the set's template takes it.
        choices: What there is to choose from.
        right: The number of the right one.
    """

    sample: Sample
    choices: tuple[str, ...]
    right: int


def score_choices(asked: Asked, held: ChoiceSet) -> ChoiceResult:
    """Scores a set. All ranks must call.

    Raises:
        DataPipelineError: a sample is damaged, or lacks what the set needs; every rank raises.
    """
    questions = together(asked.world, held, lambda: read_questions(held))
    pairs = [
        Pair(number, answer_ids(held, choice, asked.tokenizer))
        for number, question in enumerate(questions)
        for choice in question.choices
    ]
    prompts = PromptBuilder(document_builder(held, template_of(held), asked.data, asked.tokenizer, asked.spec))
    values = PairScorer(asked, held, [question.sample for question in questions], prompts).run(pairs)
    ends = np.cumsum([len(question.choices) for question in questions])[:-1]
    tokens = np.split(np.array([len(pair.answer) for pair in pairs]), ends)
    return _result(held, questions, np.split(values, ends), tokens)


def read_questions(held: ChoiceSet) -> list[Question]:
    """The chosen samples of a set.

    Raises:
        ConfigError: the set is empty.
        ManifestError, ShardError, SampleError: a file is missing or damaged, or a sample lacks what the set needs.
    """
    reader = SampleReader(Manifest.open(held.manifest), held.name)
    try:
        return [question_of(reader.read(number), held) for number in draw(held, reader.manifest.num_samples)]
    finally:
        reader.close()


def question_of(sample: Sample, held: ChoiceSet) -> Question:
    """What a sample asks.

    Raises:
        SampleError: it lacks a field, or a field is not what the set expects.
    """
    try:
        choices = _choices(sample, held)
        right = _right(sample, held, choices)
        if held.dialogue is not None:
            words = fill(held.prompt, sample.fields)
            sample = replace(sample, fields=held.dialogue.question(words))
        return Question(sample, choices, right)
    except SampleError as error:
        raise error.located(sample.provenance.shard, sample.provenance.key) from error


def _choices(sample: Sample, held: ChoiceSet) -> tuple[str, ...]:
    listed = look_up(held.choices, sample.fields) if isinstance(held.choices, str) else list(held.choices)
    texts = isinstance(listed, list) and all(isinstance(one, str) and one.strip() for one in listed)
    if not texts or len(listed) < 2:
        reason = f"field {held.choices!r} is {listed!r:.80}, expected a list of two texts at least"
        raise SampleError(reason, kind=FaultKind.TEXT)
    return tuple(listed)


def _right(sample: Sample, held: ChoiceSet, choices: Sequence[str]) -> int:
    said = look_up(held.answer, sample.fields)
    place: object = said
    if held.answer_as == "letter":
        letters = string.ascii_uppercase[: len(choices)]
        place = letters.find(said.upper()) if isinstance(said, str) and len(said) == 1 else None
    elif held.answer_as == "text":
        place = choices.index(said) if choices.count(said) == 1 else None
    if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < len(choices):
        expected = {
            "index": f"a number from 0 to {len(choices) - 1}",
            "letter": f"a letter from A to {string.ascii_uppercase[min(len(choices), 26) - 1]}",
            "text": "one of the choices, which stands among them once",
        }[held.answer_as]
        raise SampleError(f"field {held.answer!r} is {said!r:.80}, expected {expected}", kind=FaultKind.TEXT)
    return place


def answer_ids(held: ChoiceSet, choice: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids that are scored for a choice."""
    ids = tokenizer.encode(held.template.format(value=choice))
    if held.ends:
        closing = held.dialogue.closing if held.dialogue is not None else ()
        ids += [tokenizer.special_id(name, "dialogue.special_tokens") for name in closing] or [tokenizer.eos_id]
    return tuple(ids)


def _result(
    held: ChoiceSet,
    questions: Sequence[Question],
    values: Sequence[npt.NDArray[np.float64]],
    tokens: Sequence[npt.NDArray[np.int64]],
) -> ChoiceResult:
    n = len(questions)
    shares: dict[str, float] = dict.fromkeys(("none", "tokens", "characters", "bytes"), 0.0)
    for question, likelihoods, counts in zip(questions, values, tokens, strict=True):
        for how, compared in compared_by(likelihoods, counts, question.choices).items():
            shares[how] += credit(compared, question.right) / n
    sizes = sorted({len(question.choices) for question in questions})
    among = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    score = min(shares[held.normalise], 1.0)  # Sums of 1 / n may pass it by a rounding.
    return ChoiceResult(
        score=score,
        chance=sum(1 / len(question.choices) for question in questions) / n,
        n=n,
        metric=f"right choice among {among}",
        error=binomial_error(score, n),
        scores={how: min(share, 1.0) for how, share in shares.items()},
    )


def compared_by(
    likelihoods: npt.NDArray[np.float64], tokens: npt.NDArray[np.int64], choices: Sequence[str]
) -> dict[str, npt.NDArray[np.float64]]:
    """What the choices of a question are compared by, in each of the ways.

    Source: lm-evaluation-harness, where ``none`` is called acc and ``characters`` acc_norm.
    """
    return {
        "none": likelihoods,
        "tokens": likelihoods / tokens,
        "characters": likelihoods / np.array([len(choice) for choice in choices]),
        "bytes": likelihoods / np.array([len(choice.encode()) for choice in choices]),
    }


def credit(values: npt.NDArray[np.float64], right: int) -> float:
    """1 for the right choice; where several are equally likely, the share that a blind pick among them would get."""
    best = values == values.max()
    return float(best[right]) / int(best.sum())
