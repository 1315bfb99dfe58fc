"""Log-likelihoods of answers to prompts, computed in parallel by all ranks.

    (sample, answer) pairs --chunks within the token budget--> ranks --log-likelihoods--> one value per pair

The chunks do not depend on the number of ranks, and neither do the values. All ranks make the same number of forward
and head calls, as ZeRO-3 requires: a rank without a chunk of its own repeats the last chunk and discards the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from data_pipeline.batch import MultimodalBatch
from data_pipeline.sample import Sample
from mmscale.dist import World, all_reduce_sum_list
from mmscale.evaluate.config import EvaluationSet
from mmscale.evaluate.continuations import Continuation, continue_prompts
from mmscale.evaluate.heldout import EvaluationContext, call_on_all_ranks
from mmscale.evaluate.likelihood import by_segment, label_likelihoods


@dataclass(frozen=True)
class Pair:
    """The number of a sample, and an answer to its prompt as token ids."""

    sample: int
    answer: tuple[int, ...]


class PairValues(NamedTuple):
    """Log-likelihood of each pair's answer in nats, and whether greedy decoding would give this answer."""

    likelihoods: npt.NDArray[np.float64]
    is_greedy: npt.NDArray[np.bool_]


class Prompts(Protocol):
    """Builds prompts from samples; ``heldout.PromptBuilder`` is one."""

    def num_tokens(self, sample: Sample) -> int:
        """Return the number of tokens of a sample's prompt."""

    def __call__(self, samples: Sequence[Sample]) -> MultimodalBatch:
        """Return one batch with the prompts of the samples, in order, and a dummy document at the end."""


@dataclass(frozen=True)
class PairScorer:
    """Computes the log-likelihoods of answers on all ranks.

    Attributes:
        context: Model, settings and ranks.
        held: The set, for messages.
        samples: Samples that ``Pair.sample`` indexes.
        prompts: Builds the prompts of samples.
    """

    context: EvaluationContext
    held: EvaluationSet
    samples: Sequence[Sample]
    prompts: Prompts

    def run(self, pairs: Sequence[Pair]) -> PairValues:
        """Return the values of each pair, the same on every rank. All ranks must call.

        Raises:
            DataPipelineError: a sample is damaged. Every rank raises.
        """
        chunks = list(self._chunks(pairs))
        rows = max(sum(len(pair.answer) for pair in pairs[start:end]) for start, end in chunks)
        head_calls = -(-rows // self.context.config.rows_per_head)
        values = np.zeros((2, len(pairs)))  # Likelihoods, and the number of tokens that are not the likeliest.
        for is_own, (start, end) in chunks_of_rank(chunks, self.context.world):
            batch = self._batch(pairs[start:end])
            found = label_likelihoods(
                self.context.model, batch, rows_per_head=self.context.config.rows_per_head, head_calls=head_calls
            )
            if is_own:
                values[0, start:end] = by_segment(batch, found.rows, found.values)[: end - start]
                values[1, start:end] = by_segment(batch, found.rows, 1.0 - found.is_best.astype(np.float64))[
                    : end - start
                ]
        summed = np.array(all_reduce_sum_list(self.context.world, values.ravel().tolist())).reshape(values.shape)
        return PairValues(summed[0], summed[1] == 0)

    def _chunks(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, int]]:
        """Yield ranges of pairs within the token budget. Each pair counts its prompt's tokens and its answer's."""
        samples = dict.fromkeys(pair.sample for pair in pairs)
        prompts = call_on_all_ranks(
            self.context.world, self.held, lambda: {one: self.prompts.num_tokens(self.samples[one]) for one in samples}
        )
        return chunk_ranges(
            [prompts[pair.sample] + len(pair.answer) for pair in pairs], self.context.config.tokens_per_forward
        )

    def _batch(self, pairs: Sequence[Pair]) -> MultimodalBatch:
        samples = list(dict.fromkeys(pair.sample for pair in pairs))
        segment = {sample: number for number, sample in enumerate(samples)}
        prompts = call_on_all_ranks(
            self.context.world, self.held, lambda: self.prompts([self.samples[sample] for sample in samples])
        )
        if prompts.uncoded is not None:  # Before the prompts are copied, so that each image is encoded once.
            prompts = self.context.model.with_codes(prompts.to(self.context.world.device)).to("cpu")
        continuations = [Continuation(segment[pair.sample], pair.answer) for pair in pairs]
        return continue_prompts(prompts, continuations).to(self.context.world.device)


def chunk_ranges(sizes: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of consecutive ranges whose sizes sum to at most ``budget``. A larger item is alone in one."""
    start = total = 0
    for number, size in enumerate(sizes):
        if number > start and total + size > budget:
            yield start, number
            start, total = number, 0
        total += size
    if sizes:
        yield start, len(sizes)


def chunks_of_rank(chunks: Sequence[tuple[int, int]], world: World) -> Iterator[tuple[bool, tuple[int, int]]]:
    """Yield (flag, chunk), equally often on every rank. The flag is False for a filler whose result is discarded."""
    for first in range(0, len(chunks), world.world_size):
        own = first + world.rank
        yield own < len(chunks), chunks[min(own, len(chunks) - 1)]
