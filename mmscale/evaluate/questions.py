"""What each sample is asked, and whose image stands in for its own in the control.

The samples are dealt into blocks in which no right answer occurs twice, and all samples of a block get the same
candidates: their right answers, filled up at random. So one matrix of log-likelihoods (images x candidates) answers
both the questions and, with its rows exchanged, the control, and the control costs nothing.

Blocks are as few as the candidates and the most common answer allow, and of equal size to within one. A block of one
sample, whose image nobody could take, appears only where no exchange of images exists at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmscale.errors import ConfigError


@dataclass(frozen=True)
class Block:
    """Samples that are asked the same question.

    Attributes:
        samples: Indices of the samples.
        candidates: The answers to choose from.
        right: For each sample, the place of its answer among the candidates.
        stand_in: For each sample, the place (in ``samples``) of the sample whose image replaces its own in the
            control; nobody keeps an image with its own answer.
    """

    samples: tuple[int, ...]
    candidates: tuple[str, ...]
    right: tuple[int, ...]
    stand_in: tuple[int, ...]


def deal(answers: Sequence[str], pool: Sequence[str], choices: int | None, seed: int) -> list[Block]:
    """Blocks that cover every sample once.

    Args:
        answers: The right answer of each sample.
        pool: Candidates; the answers are added to them.
        choices: Candidates of a question; None for all.
        seed: Of every draw.

    Raises:
        ConfigError: fewer candidates than ``choices``, fewer than two, or no way to exchange the images.
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


def _deal_samples(answers: Sequence[str], choices: int, rng: np.random.Generator) -> list[list[int]]:
    counts: dict[str, int] = {}
    for answer in answers:
        counts[answer] = counts.get(answer, 0) + 1
    most_common = max(counts, key=lambda answer: counts[answer])
    num_blocks = max(-(-len(answers) // choices), counts[most_common])
    if len(answers) < 2 * num_blocks:
        raise ConfigError(
            f"{counts[most_common]} of {len(answers)} samples have the answer {most_common!r} and choices={choices}: "
            f"the control must give every sample an image with another answer; raise choices or score a more even set"
        )
    place = {answer: rank for rank, answer in enumerate(rng.permutation(sorted(counts)).tolist())}
    order = sorted(rng.permutation(len(answers)).tolist(), key=lambda sample: place[answers[sample]])
    # Equal answers are neighbours and no more than there are blocks, so dealing in turn parts them.
    return [order[first::num_blocks] for first in range(num_blocks)]


def _block(
    samples: list[int], answers: Sequence[str], values: Sequence[str], choices: int, rng: np.random.Generator
) -> Block:
    own = [answers[sample] for sample in samples]
    taken = set(own)
    others = [value for value in values if value not in taken]
    fill = rng.permutation(len(others))[: choices - len(own)].tolist()
    candidates = sorted([*own, *(others[number] for number in fill)])
    cycle = rng.permutation(len(samples))
    stand_in = np.empty(len(samples), dtype=np.int64)
    stand_in[cycle] = np.roll(cycle, 1)  # One cycle through all: nobody keeps its own.
    return Block(
        samples=tuple(samples),
        candidates=tuple(candidates),
        right=tuple(candidates.index(answer) for answer in own),
        stand_in=tuple(stand_in.tolist()),
    )
