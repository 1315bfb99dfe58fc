"""Group samples into blocks with common candidates, and permute their images for the control.

In a block every sample has a different right answer. The candidates of a block are these answers and random others. One
matrix of log-likelihoods (images x candidates) therefore gives the score and, with its rows permuted, the control: the
control needs no further forward pass.

The number of blocks is the smallest that the number of candidates and the most common answer allow. Block sizes differ
by at most one, and every block has at least two samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmscale.errors import ConfigError
from mmscale.evaluate.choice import credit

Table = npt.NDArray[np.float64]
"""Values of one block, ``(samples, candidates)``."""


@dataclass(frozen=True)
class QuestionBlock:
    """Samples with the same candidates.

    Attributes:
        samples: Indices of the samples.
        candidates: Answers to choose from, sorted.
        right: For each sample, the index of its right answer in ``candidates``.
        control_sample: For each sample, the index in ``samples`` of the sample whose image replaces its own in the
            control. No sample keeps its image, so no image in the control shows the right answer.
    """

    samples: tuple[int, ...]
    candidates: tuple[str, ...]
    right: tuple[int, ...]
    control_sample: tuple[int, ...]


def make_blocks(answers: Sequence[str], pool: Sequence[str], choices: int | None, seed: int) -> list[QuestionBlock]:
    """Return blocks that contain every sample exactly once.

    Args:
        answers: Right answer of each sample.
        pool: Further candidates; may repeat values.
        choices: Number of candidates per question; None for all values.
        seed: Seed of the random choices: samples of each block, further candidates, and control.

    Raises:
        ConfigError: there are fewer values than ``choices`` or fewer than two, or a block would have one sample.
    """
    values = sorted(set(pool) | set(answers))
    choices = len(values) if choices is None else choices
    if not 2 <= choices <= len(values):
        raise ConfigError(
            f"choices={choices}: the set offers {len(values)} different answers; "
            + (f"ask for 2 to {len(values)}, or null for all" if len(values) >= 2 else "a question needs at least 2")
        )
    rng = np.random.default_rng([seed, len(answers)])
    groups = _deal_samples(answers, choices, rng)
    return [_block(group, answers, values, choices, rng) for group in groups]


def accuracies(tables: Sequence[Table], blocks: Sequence[QuestionBlock]) -> tuple[float, float]:
    """Return the share of right choices, and that of the control. ``tables`` has the values of each block."""
    n = sum(len(block.samples) for block in blocks)
    score = control = 0.0
    for table, block in zip(tables, blocks, strict=True):
        for row, right in enumerate(block.right):
            score += credit(table[row], right)
            control += credit(table[block.control_sample[row]], right)
    return score / n, control / n


def _deal_samples(answers: Sequence[str], choices: int, rng: np.random.Generator) -> list[list[int]]:
    counts: dict[str, int] = {}
    for answer in answers:
        counts[answer] = counts.get(answer, 0) + 1
    most_common = max(counts, key=lambda answer: counts[answer])
    num_blocks = max(-(-len(answers) // choices), counts[most_common])
    if len(answers) < 2 * num_blocks:
        raise ConfigError(
            f"{counts[most_common]} of {len(answers)} samples have the answer {most_common!r} and choices={choices}: "
            f"the control must give every sample an image with another answer; raise choices or use a more balanced set"
        )
    rank = {answer: number for number, answer in enumerate(rng.permutation(sorted(counts)).tolist())}
    order = sorted(rng.permutation(len(answers)).tolist(), key=lambda sample: rank[answers[sample]])
    # Equal answers are adjacent, and no answer is more frequent than there are blocks: round-robin separates them.
    return [order[first::num_blocks] for first in range(num_blocks)]


def _block(
    samples: list[int], answers: Sequence[str], values: Sequence[str], choices: int, rng: np.random.Generator
) -> QuestionBlock:
    own = [answers[sample] for sample in samples]
    right_answers = set(own)
    others = [value for value in values if value not in right_answers]
    fill = rng.permutation(len(others))[: choices - len(own)].tolist()
    candidates = sorted([*own, *(others[number] for number in fill)])
    cycle = rng.permutation(len(samples))
    control_sample = np.empty(len(samples), dtype=np.int64)
    control_sample[cycle] = np.roll(cycle, 1)  # A single cycle has no fixed point.
    return QuestionBlock(
        samples=tuple(samples),
        candidates=tuple(candidates),
        right=tuple(candidates.index(answer) for answer in own),
        control_sample=tuple(control_sample.tolist()),
    )
