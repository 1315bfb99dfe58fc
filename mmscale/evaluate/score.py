"""Score the held-out sets on all ranks.

images       read -> blocks -> (image, candidate) pairs -> log-likelihoods or similarities -> accuracy
choice       read -> (question, choice) pairs -> log-likelihoods -> accuracy    (``choice``)
perplexity   documents -> log-likelihoods -> mean                               (``perplexity``)
generation   read -> prompts -> generated answers -> metric                     (``generation``)
drawings     texts -> drawings -> names by a classifier, Frechet distance, copies  (``drawing_scores``)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from data_pipeline.config import DataConfig
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.dist import World
from mmscale.evaluate.choice import score_choices
from mmscale.evaluate.config import (
    ChoiceSet,
    DrawingSet,
    EvaluationConfig,
    EvaluationSet,
    GenerationSet,
    HeldOutSet,
    Normalise,
    PerplexitySet,
)
from mmscale.evaluate.drawing_scores import score_drawings
from mmscale.evaluate.drawings import DrawingContext
from mmscale.evaluate.generation import score_generation
from mmscale.evaluate.heldout import (
    EvaluationContext,
    ImageQuestions,
    PromptBuilder,
    call_on_all_ranks,
    candidate_ids,
    unanswerable_sets,
)
from mmscale.evaluate.likelihood import ScoredModel
from mmscale.evaluate.pairs import Pair, PairScorer
from mmscale.evaluate.perplexity import score_perplexity
from mmscale.evaluate.questions import QuestionBlock, Table, accuracies, make_blocks
from mmscale.evaluate.result import HeldOutResult, SetResult, binomial_error
from mmscale.evaluate.similarity import similarities
from mmscale.models.contrastive import ContrastiveModel


def evaluate(
    model: ScoredModel | ContrastiveModel,
    config: EvaluationConfig,
    data_config: DataConfig,
    spec: MediaSpec,
    world: World,
    *,
    drawing: DrawingContext | None = None,
    answers_folder: Path | None = None,
) -> dict[str, HeldOutResult]:
    """Score every held-out set that the model can answer. All ranks must call; all get the same result.

    Sets of ``unanswerable_sets`` are left out of the result.

    Args:
        model: ``MultimodalModel``, ``ContrastiveModel`` or an engine's ``model``. The caller sets evaluation mode.
        config: Gives the sets and the memory limits.
        data_config: Gives the tokenizer, the transform of the first data set and the length of documents.
        spec: Media that the model accepts.
        world: Ranks that share the work.
        drawing: Inputs of sets of kind ``drawings``; None draws as ``data_config`` says.
        answers_folder: Folder to which sets of kinds ``generation`` and ``drawings`` write their answers and drawings,
            ``NAME.jsonl``; None: none.

    Raises:
        ConfigError: a set is empty, or its samples cannot give ``choices`` or the control.
        DataPipelineError: a file is missing or damaged.
    """
    tokenizer = load_tokenizer(data_config.tokenizer)
    context = EvaluationContext(
        cast(ScoredModel, model), config, data_config, tokenizer, spec, world, drawing, answers_folder
    )
    left_out = unanswerable_sets(config, spec, data_config)
    return {held.name: _score(context, held) for held in config.sets if held not in left_out}


def _score(context: EvaluationContext, held: EvaluationSet) -> HeldOutResult:
    if isinstance(held, PerplexitySet):
        return score_perplexity(context, held)
    if isinstance(held, GenerationSet):
        return score_generation(context, held)
    if isinstance(held, DrawingSet):
        return score_drawings(context, held)
    return score_choices(context, held) if isinstance(held, ChoiceSet) else _score_images(context, held)


def _score_images(context: EvaluationContext, held: HeldOutSet) -> SetResult:
    questions = call_on_all_ranks(context.world, held, lambda: ImageQuestions.read(held))
    blocks = make_blocks(questions.answers, questions.pool, held.choices, held.seed)
    if context.spec.placement is Placement.PAIR:
        asks = [(sample, value) for block in blocks for sample in block.samples for value in block.candidates]
        tables = list(_tables(similarities(context, held, questions.samples, asks), blocks))
        return _result(_normalised(tables, blocks, [], held.normalise), blocks, questions, None)
    ids = {value: candidate_ids(held, value, context.tokenizer) for block in blocks for value in block.candidates}
    pairs = [Pair(sample, ids[value]) for block in blocks for sample in block.samples for value in block.candidates]
    prompts = PromptBuilder.of_images(held, context.data, context.tokenizer, context.spec)
    values = PairScorer(context, held, questions.samples, prompts).run(pairs).likelihoods
    tables = list(_tables(values, blocks))
    lengths = [np.array([len(ids[value]) for value in block.candidates]) for block in blocks]
    loss = _loss(tables, lengths, blocks)
    tables = _normalised(tables, blocks, lengths, held.normalise)
    return _result(tables, blocks, questions, loss)


def _tables(values: Table, blocks: Sequence[QuestionBlock]) -> Iterator[Table]:
    start = 0
    for block in blocks:
        shape = (len(block.samples), len(block.candidates))
        yield values[start : start + shape[0] * shape[1]].reshape(shape)
        start += shape[0] * shape[1]


def _normalised(
    tables: list[Table], blocks: Sequence[QuestionBlock], lengths: list[npt.NDArray[np.int64]], how: Normalise
) -> list[Table]:
    if how is Normalise.TOKENS:
        return [table / length for table, length in zip(tables, lengths, strict=True)]
    if how is Normalise.PRIOR:
        return _without_prior(tables, blocks)
    return tables


def _without_prior(tables: list[Table], blocks: Sequence[QuestionBlock]) -> list[Table]:
    """Subtract from each value the mean of its candidate over all *other* images scored with that candidate."""
    total: dict[str, float] = {}
    count: dict[str, int] = {}
    for table, block in zip(tables, blocks, strict=True):
        for candidate, column in zip(block.candidates, table.T, strict=True):
            total[candidate] = total.get(candidate, 0.0) + float(column.sum())
            count[candidate] = count.get(candidate, 0) + len(column)
    shifted = []
    for table, block in zip(tables, blocks, strict=True):
        totals = np.array([total[candidate] for candidate in block.candidates])
        counts = np.array([count[candidate] for candidate in block.candidates])
        shifted.append(table - (totals - table) / (counts - 1))
    return shifted


def _loss(tables: Sequence[Table], lengths: Sequence[npt.NDArray[np.int64]], blocks: Sequence[QuestionBlock]) -> float:
    """Return the mean loss over all tokens of the right answers, nats."""
    whole, tokens = 0.0, 0
    for table, length, block in zip(tables, lengths, blocks, strict=True):
        for row, right in enumerate(block.right):
            whole -= float(table[row, right])
            tokens += int(length[right])
    return whole / tokens


def _result(
    tables: Sequence[Table], blocks: Sequence[QuestionBlock], questions: ImageQuestions, loss: float | None
) -> SetResult:
    n, choices = len(questions.samples), len(blocks[0].candidates)
    score, control = accuracies(tables, blocks)
    return SetResult(
        score=score,
        control=control,
        chance=1 / choices,
        n=n,
        metric=f"{questions.config.field} among {choices}",
        error=binomial_error(score, n),
        control_error=binomial_error(control, n),
        loss=loss,
    )
