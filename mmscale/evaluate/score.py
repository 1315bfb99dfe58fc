"""Scores of the held-out sets, the work dealt over the ranks.

    for each set:  read -> deal questions -> (image, candidate) pairs -> chunks -> ranks -> log-likelihoods -> shares

The chunks do not depend on the number of ranks, so neither does the score. All ranks make the same number of forward
and head calls, as a ZeRO-3 model needs: a rank with nothing left repeats a chunk and forgets the outcome.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataPipelineError
from data_pipeline.media_spec import MediaSpec
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from mmscale.dist import World, first_complaint, sum_float
from mmscale.evaluate.branch import Branch, branch
from mmscale.evaluate.config import EvaluationConfig, HeldOutSet, Normalise
from mmscale.evaluate.heldout import PromptBuilder, Questions
from mmscale.evaluate.likelihood import ScoredModel, log_likelihoods
from mmscale.evaluate.questions import Block, deal
from mmscale.report.result import SetResult, binomial_error

Table = npt.NDArray[np.float64]
"""``(samples, candidates)`` of one block."""


def evaluate(
    model: ScoredModel, config: EvaluationConfig, data_config: DataConfig, spec: MediaSpec, world: World
) -> dict[str, SetResult]:
    """Scores every held-out set. All ranks must call; all get the same result.

    Args:
        model: ``MultimodalModel`` or an engine's ``model``, in evaluation mode already if that matters.
        config: The sets.
        data_config: Tokenizer, and the transform of the first data set.
        spec: What the model takes.
        world: The ranks that take part.

    Raises:
        ConfigError: a set cannot be asked as configured.
        DataPipelineError: a file is missing or damaged; every rank raises.
    """
    tokenizer = load_tokenizer(data_config.tokenizer)
    return {held.name: _score_set(model, held, config, data_config, tokenizer, spec, world) for held in config.sets}


@dataclass(frozen=True)
class _Pair:
    """A sample's image with one candidate's token ids."""

    sample: int
    answer: tuple[int, ...]


def _score_set(
    model: ScoredModel,
    held: HeldOutSet,
    config: EvaluationConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    spec: MediaSpec,
    world: World,
) -> SetResult:
    questions = Questions.read(held)
    blocks = deal(questions.answers, questions.pool, held.choices, held.seed)
    ids = {value: questions.answer_ids(value, tokenizer) for block in blocks for value in block.candidates}
    pairs = [_Pair(sample, ids[value]) for block in blocks for sample in block.samples for value in block.candidates]
    prompts = PromptBuilder(held, data, tokenizer, spec)
    runner = _Runner(model, questions, prompts, config, world)
    values = runner.run(pairs)
    tables = list(_tables(values, blocks))
    lengths = [np.array([len(ids[value]) for value in block.candidates]) for block in blocks]
    loss = _loss(tables, lengths, blocks)
    tables = _normalised(tables, blocks, lengths, held.normalise)
    return _result(tables, blocks, questions, loss)


@dataclass(frozen=True)
class _Runner:
    """Log-likelihoods of pairs, over all ranks."""

    model: ScoredModel
    questions: Questions
    prompts: PromptBuilder
    config: EvaluationConfig
    world: World

    def run(self, pairs: Sequence[_Pair]) -> Table:
        """float64, one value a pair, the same on every rank. All ranks must call."""
        chunks = self._chunks(pairs)
        rows = max(sum(len(pair.answer) for pair in pairs[start:end]) for start, end in chunks)
        head_calls = -(-rows // self.config.rows_per_head)
        values = np.zeros(len(pairs))
        rank, world_size = self.world.rank, self.world.world_size
        for first in range(0, len(chunks), world_size):
            mine = first + rank
            start, end = chunks[min(mine, len(chunks) - 1)]
            batch = self._batch(pairs[start:end])
            found = log_likelihoods(self.model, batch, rows_per_head=self.config.rows_per_head, head_calls=head_calls)
            if mine < len(chunks):
                values[start:end] = found[: end - start]
        return np.array(sum_float(self.world, values.tolist()))

    def _chunks(self, pairs: Sequence[_Pair]) -> list[tuple[int, int]]:
        """Stretches of pairs of about the token budget, measured by the first prompt and the longest answer."""
        prompt = self._prompts([pairs[0].sample]).segments.bounds[1]
        size = max(1, self.config.tokens_per_forward // (prompt + max(len(pair.answer) for pair in pairs)))
        return [(start, min(start + size, len(pairs))) for start in range(0, len(pairs), size)]

    def _batch(self, pairs: Sequence[_Pair]) -> MultimodalBatch:
        samples = list(dict.fromkeys(pair.sample for pair in pairs))
        segment = {sample: number for number, sample in enumerate(samples)}
        prompts = self._prompts(samples)
        branches = [Branch(segment[pair.sample], pair.answer) for pair in pairs]
        return branch(prompts, branches).to(self.world.device)

    def _prompts(self, samples: Sequence[int]) -> MultimodalBatch:
        """Fails on all ranks together: a rank that left alone would leave the others waiting in a forward."""
        complaint, batch = None, None
        try:
            batch = self.prompts([self.questions.samples[sample] for sample in samples])
        except DataPipelineError as error:
            complaint = str(error)
        complaint = first_complaint(self.world, complaint)
        if complaint is not None or batch is None:
            raise DataPipelineError(f"evaluation set {self.questions.config.name}: {complaint}")
        return batch


def _tables(values: Table, blocks: Sequence[Block]) -> Iterator[Table]:
    start = 0
    for block in blocks:
        shape = (len(block.samples), len(block.candidates))
        yield values[start : start + shape[0] * shape[1]].reshape(shape)
        start += shape[0] * shape[1]


def _normalised(
    tables: list[Table], blocks: Sequence[Block], lengths: list[npt.NDArray[np.int64]], how: Normalise
) -> list[Table]:
    if how is Normalise.TOKENS:
        return [table / length for table, length in zip(tables, lengths, strict=True)]
    if how is Normalise.PRIOR:
        return _without_prior(tables, blocks)
    return tables


def _without_prior(tables: list[Table], blocks: Sequence[Block]) -> list[Table]:
    """Subtracts from each value the mean of its candidate over all *other* images that were asked about it."""
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


def _loss(tables: Sequence[Table], lengths: Sequence[npt.NDArray[np.int64]], blocks: Sequence[Block]) -> float:
    """Mean over all tokens of the right answers, as training's loss is one over tokens."""
    whole, tokens = 0.0, 0
    for table, length, block in zip(tables, lengths, blocks, strict=True):
        for row, right in enumerate(block.right):
            whole -= float(table[row, right])
            tokens += int(length[right])
    return whole / tokens


def _result(tables: Sequence[Table], blocks: Sequence[Block], questions: Questions, loss: float) -> SetResult:
    n, choices = len(questions.samples), len(blocks[0].candidates)
    score = control = 0.0
    for table, block in zip(tables, blocks, strict=True):
        for row, right in enumerate(block.right):
            score += _credit(table[row], right)
            control += _credit(table[block.stand_in[row]], right)
    return SetResult(
        score=score / n,
        control=control / n,
        chance=1 / choices,
        n=n,
        metric=f"{questions.config.field} among {choices}",
        error=binomial_error(score / n, n),
        control_error=binomial_error(control / n, n),
        loss=loss,
    )


def _credit(values: Table, right: int) -> float:
    """1 for the right choice; where several are equally likely, the share that a blind pick among them would get."""
    best = values == values.max()
    return float(best[right]) / int(best.sum())
