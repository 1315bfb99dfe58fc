"""What templates with learned text have in common: how much the tokens of a sample weigh, and leaving its text out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from data_pipeline.io.strict import StrictConfig
from data_pipeline.order.sample_rng import Draws

LossWeight = Literal["token", "sqrt", "sample"]

ImagesRule = Literal["required", "optional"]
"""Whether a sample must have an image to be trained on."""


class LearnedText(StrictConfig):
    """Base of templates."""

    loss_weight: LossWeight = "token"
    """How much the n learned tokens of a sample weigh: each 1 (``token``: long texts count more), ``1 / sqrt(n)``
    (``sqrt``: between the two) or ``1 / n`` (``sample``: all samples count alike). Weights of tokens are multiplied."""


class DroppableText(LearnedText):
    """Base of templates whose text may be left out."""

    text_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a sample is shown without its text in an epoch: what generation guided by text is trained with.
    Images and prompt stay. Decided by the sample's own generator: the same at any number of ranks and after a resume.
    Such a document has no learned token, so next-token loss takes nothing from it; leave it at 0 for captioning."""

    def drops(self, rng: Draws | None) -> bool:
        """Whether this sample goes without text; never without a generator."""
        return self.text_dropout > 0 and rng is not None and bool(rng.random() < self.text_dropout)


def share_weights(weights: Sequence[float], branches: Sequence[int], rule: LossWeight) -> npt.NDArray[np.float64]:
    """Weights of tokens under a rule; each branch is a sample of its own.

    Args:
        weights: Of each token of a document, 0 for those that are only read.
        branches: First token of each branch.
        rule: See ``LearnedText.loss_weight``.

    Source: InternVL 2.5 (arXiv 2412.05271), loss reweighting: token, square and sample averaging.
    """
    shared = np.array(weights, dtype=np.float64)
    if rule == "token":
        return shared
    for part in np.split(shared, branches):  # Views: written in place.
        count = max(1.0, float(np.count_nonzero(part)))
        part /= math.sqrt(count) if rule == "sqrt" else count
    return shared
