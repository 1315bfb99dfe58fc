"""What templates have in common: what each states about itself, weights of tokens, and leaving a sample's text out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from data_pipeline.io.strict import StrictConfig
from data_pipeline.order.randomness import Draws
from data_pipeline.sample import Sample
from data_pipeline.text.templates.pieces import Piece

LossWeight = Literal["token", "sqrt", "sample"]

ImagesRule = Literal["required", "optional"]
"""Whether a sample must have an image to be trained on."""


class TemplateBase(StrictConfig, ABC):
    """A kind of template. A kind has a field ``kind``, and ``loss_weight`` as a field or property."""

    takes_images: ClassVar[bool] = True
    """Whether documents can hold images."""
    no_pair: ClassVar[str | None] = None
    """Why a document is not one image and one text, in a few words (``no image``); None: it can be."""

    @abstractmethod
    def pieces(self, sample: Sample, rng: Draws | None) -> list[Piece]:
        """Return the document of a sample; ``rng`` None takes the first of every list.

        Raises:
            SampleError: the sample lacks what the template needs.
        """

    @abstractmethod
    def prompt(self, sample: Sample) -> list[Piece]:
        """Return the pieces before the answer."""

    @property
    def requires_images(self) -> bool:
        """Whether a sample without an image is a bad sample."""
        return False

    @property
    def named_tokens(self) -> tuple[str, ...]:
        """Names of tokens that the template writes; each must be a token of the tokenizer."""
        return ()

    @property
    def closing(self) -> tuple[str, ...]:
        """Names of tokens that end an answer, besides the tokenizer's end token."""
        return ()


class LearnedText(TemplateBase):
    """Base of templates whose tokens weigh by one rule."""

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
