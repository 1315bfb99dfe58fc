"""Log-likelihoods of answers to prompts, computed in parallel by all ranks.

    (sample, answer) pairs --chunks within the token budget--> ranks --log-likelihoods--> one value per pair

The chunks do not depend on the number of ranks, and neither do the values. All ranks make the same number of forward
and head calls, as ZeRO-3 requires: a rank without a chunk of its own repeats the last chunk and discards the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.batch import MultimodalBatch
from data_pipeline.sample import Sample
from mmscale.dist import World, all_reduce_sum_list
from mmscale.evaluate.config import EvaluationSet
from mmscale.evaluate.continuations import Continuation, continue_prompts
from mmscale.evaluate.heldout import EvaluationContext, PromptBuilder, call_on_all_ranks
from mmscale.evaluate.likelihood import log_likelihoods


@dataclass(frozen=True)
class Pair:
    """The number of a sample, and an answer to its prompt as token ids."""

    sample: int
    answer: tuple[int, ...]


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
    prompts: PromptBuilder

    def run(self, pairs: Sequence[Pair]) -> npt.NDArray[np.float64]:
        """Return one log-likelihood per pair in nats, the same on every rank. All ranks must call.

        Raises:
            DataPipelineError: a sample is damaged. Every rank raises.
        """
        chunks = list(self._chunks(pairs))
        rows = max(sum(len(pair.answer) for pair in pairs[start:end]) for start, end in chunks)
        head_calls = -(-rows // self.context.config.rows_per_head)
        values = np.zeros(len(pairs))
        for is_own, (start, end) in chunks_of_rank(chunks, self.context.world):
            batch = self._batch(pairs[start:end])
            found = log_likelihoods(
                self.context.model, batch, rows_per_head=self.context.config.rows_per_head, head_calls=head_calls
            )
            if is_own:
                values[start:end] = found[: end - start]
        return np.array(all_reduce_sum_list(self.context.world, values.tolist()))

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
