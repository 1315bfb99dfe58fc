"""Log-likelihoods of answers to prompts, the work dealt over the ranks.

    (sample, answer) pairs --chunks of about the token budget--> ranks --log-likelihoods--> one value a pair

The chunks do not depend on the number of ranks, so neither do the values. All ranks make the same number of forward
and head calls, as a ZeRO-3 model needs: a rank with nothing left repeats a chunk and forgets the outcome.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.batch import MultimodalBatch
from data_pipeline.sample import Sample
from mmscale.dist import World, all_reduce_sum_list
from mmscale.evaluate.branch import Branch, branch
from mmscale.evaluate.config import EvaluationSet
from mmscale.evaluate.heldout import Asked, PromptBuilder, together
from mmscale.evaluate.likelihood import log_likelihoods


@dataclass(frozen=True)
class Pair:
    """A sample's prompt, by number, with one answer's token ids."""

    sample: int
    answer: tuple[int, ...]


@dataclass(frozen=True)
class PairScorer:
    """Log-likelihoods of the answers of pairs, over all ranks.

    Attributes:
        asked: Who is asked.
        held: The set, for messages.
        samples: What pairs number.
        prompts: How a sample is asked about.
    """

    asked: Asked
    held: EvaluationSet
    samples: Sequence[Sample]
    prompts: PromptBuilder

    def run(self, pairs: Sequence[Pair]) -> npt.NDArray[np.float64]:
        """One value a pair, the same on every rank. All ranks must call.

        Raises:
            DataPipelineError: a sample is damaged; every rank raises.
        """
        chunks = list(self._chunks(pairs))
        rows = max(sum(len(pair.answer) for pair in pairs[start:end]) for start, end in chunks)
        head_calls = -(-rows // self.asked.config.rows_per_head)
        values = np.zeros(len(pairs))
        for mine, (start, end) in dealt(chunks, self.asked.world):
            batch = self._batch(pairs[start:end])
            found = log_likelihoods(
                self.asked.model, batch, rows_per_head=self.asked.config.rows_per_head, head_calls=head_calls
            )
            if mine:
                values[start:end] = found[: end - start]
        return np.array(all_reduce_sum_list(self.asked.world, values.tolist()))

    def _chunks(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, int]]:
        """Stretches of pairs of the token budget at most, or of one pair; each has its prompt's tokens for itself."""
        samples = dict.fromkeys(pair.sample for pair in pairs)
        prompts = together(
            self.asked.world, self.held, lambda: {one: self.prompts.num_tokens(self.samples[one]) for one in samples}
        )
        return stretches(
            [prompts[pair.sample] + len(pair.answer) for pair in pairs], self.asked.config.tokens_per_forward
        )

    def _batch(self, pairs: Sequence[Pair]) -> MultimodalBatch:
        samples = list(dict.fromkeys(pair.sample for pair in pairs))
        segment = {sample: number for number, sample in enumerate(samples)}
        prompts = together(
            self.asked.world, self.held, lambda: self.prompts([self.samples[sample] for sample in samples])
        )
        branches = [Branch(segment[pair.sample], pair.answer) for pair in pairs]
        return branch(prompts, branches).to(self.asked.world.device)


def stretches(sizes: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Start and end of consecutive stretches whose sizes sum to the budget at most; larger ones stand alone."""
    start = total = 0
    for number, size in enumerate(sizes):
        if number > start and total + size > budget:
            yield start, number
            start, total = number, 0
        total += size
    if sizes:
        yield start, len(sizes)


def dealt(chunks: Sequence[tuple[int, int]], world: World) -> Iterator[tuple[bool, tuple[int, int]]]:
    """This rank's chunks, equally many on every rank; the flag is False where one only fills up."""
    for first in range(0, len(chunks), world.world_size):
        mine = first + world.rank
        yield mine < len(chunks), chunks[min(mine, len(chunks) - 1)]
