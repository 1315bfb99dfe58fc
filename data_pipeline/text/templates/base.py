"""What all templates share: the pieces that they make, their base classes, format strings, weights of tokens.

    sample --template--> pieces --packing/document_builder--> document

Format strings take the fields of a sample: ``{name}`` and ``{name.inner}``, nothing else.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.io.strict import StrictConfig
from data_pipeline.order.randomness import Draws
from data_pipeline.sample import ImagePart, Sample

T = TypeVar("T")


@dataclass(frozen=True)
class TextPiece:
    """Text of a document. ``weight`` is the loss weight of each of its tokens: 0 is read only, above 0 is learned."""

    text: str
    weight: float


@dataclass(frozen=True)
class TokenPiece:
    """One token of the tokenizer by its name, ``<|im_start|>``."""

    name: str
    weight: float


@dataclass(frozen=True)
class EndPiece:
    """The end token of the tokenizer."""

    weight: float


@dataclass(frozen=True)
class BranchPiece:
    """A branch begins: up to the next one, what follows sees itself and what stands before the first branch."""


Piece = TextPiece | TokenPiece | EndPiece | BranchPiece | ImagePart


def images_of(sample: Sample) -> list[ImagePart]:
    """The images of a sample in reading order."""
    return [part for part in sample.parts if isinstance(part, ImagePart)]


def text(content: str, weight: float = 0.0) -> list[TextPiece]:
    """A piece, or none for an empty text."""
    return [TextPiece(content, weight)] if content else []


def draw(options: Sequence[T], rng: Draws | None) -> T:
    """One of the options; the first if nothing is drawn. Where there is no choice, nothing is drawn either."""
    return options[0 if rng is None or len(options) == 1 else int(rng.random() * len(options))]


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

    @property
    def branch_template(self) -> TemplateBase:
        """The template that words one text of a document: another one where a document has branches."""
        return self

    def question(self, words: str) -> dict[str, Any] | None:
        """Return fields of a sample whose prompt asks ``words``; None: this kind has no place for a question."""
        return None


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


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> tuple[tuple[str, str | None], ...]:
    """Literal text and field name pairs.

    Raises:
        ValueError: unbalanced braces, an unnamed field, a conversion or a format specification.
    """
    parsed = []
    for literal, name, specification, conversion in Formatter().parse(text):
        if name is not None and (not name.replace(".", "").replace("_", "").isalnum() or specification or conversion):
            raise ValueError(f"format string {text!r}: expected {{name}} or {{name.inner}}, nothing else in braces")
        parsed.append((literal, name))
    return tuple(parsed)


def look_up(name: str, fields: Mapping[str, Any]) -> Any:
    """The value of a field; ``a.b`` is field b of the object a.

    Raises:
        SampleError: there is none, or it is null.
    """
    value: Any = fields
    for key in name.split("."):
        if not isinstance(value, Mapping) or value.get(key) is None:
            raise SampleError(
                f"field {name!r} is missing; the sample has {', '.join(sorted(fields)) or 'no fields'}",
                kind=FaultKind.TEXT,
            )
        value = value[key]
    return value


def fill(text: str, fields: Mapping[str, Any]) -> str:
    """The format string with its fields filled in; a list is joined with commas.

    Raises:
        SampleError: a field is missing.
    """
    out = []
    for literal, name in parse(text):
        out.append(literal)
        if name is not None:
            value = look_up(name, fields)
            out.append(", ".join(map(str, value)) if isinstance(value, list) else str(value))
    return "".join(out)


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
