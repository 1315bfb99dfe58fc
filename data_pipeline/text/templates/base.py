"""Common parts of all templates: pieces, base classes, format strings and token weights.

    sample --template--> pieces --packing/document_builder--> document

A format string may contain the fields of a sample as ``{name}`` and ``{name.inner}``, and no other placeholders.
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
from data_pipeline.order.randomness import Rng
from data_pipeline.sample import ImagePart, MediaPart, Sample, TextPart, VideoPart

T = TypeVar("T")
AnyPiece = TypeVar("AnyPiece")


@dataclass(frozen=True)
class TextPiece:
    """Text of a document. ``weight`` is the loss weight of each of its tokens; weight 0 is read, not learned.

    ``is_padding`` replaces each of its tokens by the padding token.
    """

    text: str
    weight: float
    is_padding: bool = False


@dataclass(frozen=True)
class TokenPiece:
    """One token of the tokenizer, given by name: ``<|im_start|>``."""

    name: str
    weight: float


@dataclass(frozen=True)
class EndPiece:
    """The end token of the tokenizer."""

    weight: float


@dataclass(frozen=True)
class BranchPiece:
    """Beginning of a branch, which extends to the next ``BranchPiece``.

    A branch attends itself and the pieces before the first branch, but no other branch. With ``repeats_last`` the last
    token before the first branch becomes the first token of every branch instead, so a branch may begin with learned
    text: that token predicts it. All branches of a document have the same value.
    """

    repeats_last: bool = False


@dataclass(frozen=True)
class DrawnPiece:
    """An image or a video as tokens of the decoder.

    Attributes:
        image: The image or video.
        weight: Loss weight of each of its codes.
        mark_weight: Loss weight of each mark around them.
    """

    image: ImagePart | VideoPart
    weight: float
    mark_weight: float


Piece = TextPiece | TokenPiece | EndPiece | BranchPiece | MediaPart | DrawnPiece


@dataclass(frozen=True)
class OpeningPiece:
    """The marks before the codes of an image of ``rows`` x ``columns`` codes that the model is to draw.

    No document of training has it.
    """

    rows: int
    columns: int


def images_of(sample: Sample) -> list[ImagePart]:
    """Return the images of a sample in reading order."""
    return [part for part in sample.parts if isinstance(part, ImagePart)]


def media_of(sample: Sample) -> list[MediaPart]:
    """Return the images, videos and sounds of a sample in reading order."""
    return [part for part in sample.parts if not isinstance(part, TextPart)]


def text(content: str, weight: float = 0.0) -> list[TextPiece]:
    """Return a list with one piece; an empty list for an empty text."""
    return [TextPiece(content, weight)] if content else []


def joined_texts(pieces: Sequence[AnyPiece]) -> list[AnyPiece | TextPiece]:
    """Return the pieces with neighbouring texts of equal weight joined."""
    joined: list[AnyPiece | TextPiece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, TextPiece) and isinstance(last, TextPiece) and last.weight == piece.weight:
            joined[-1] = TextPiece(last.text + piece.text, piece.weight)
        else:
            joined.append(piece)
    return joined


def draw(options: Sequence[T], rng: Rng | None) -> T:
    """Draw one of the options; return the first if ``rng`` is None. A single option does not advance ``rng``."""
    return options[0 if rng is None or len(options) == 1 else int(rng.random() * len(options))]


LossWeight = Literal["token", "sqrt", "sample"]

ImagesRule = Literal["required", "optional"]
"""Whether training requires an image or a video in each sample."""


class TemplateBase(StrictConfig, ABC):
    """Base class of templates. A subclass has a field ``kind``, and ``loss_weight`` as a field or property."""

    no_pair: ClassVar[str | None] = None
    """Reason why documents cannot be pairs of one image and one text (``no image``); None if they can."""

    @abstractmethod
    def pieces(self, sample: Sample, rng: Rng | None) -> list[Piece]:
        """Return the document of a sample. ``rng`` draws from lists of options; None uses the first of each list.

        Raises:
            SampleError: the sample lacks what the template needs.
        """

    @abstractmethod
    def prompt(self, sample: Sample) -> list[Piece]:
        """Return the pieces before the answer."""

    @property
    def takes_images(self) -> bool:
        """Whether documents can hold images that a tower encodes or that the model reads."""
        return True

    @property
    def draws(self) -> bool:
        """Whether documents hold images as tokens, which needs ``data.image_tokens``."""
        return False

    @property
    def requires_images(self) -> bool:
        """Whether a sample without an image is a bad sample."""
        return False

    @property
    def named_tokens(self) -> tuple[str, ...]:
        """Names of the tokens that the template, or that of its branches, inserts; each a token of the tokenizer."""
        return () if self.branch_template is self else self.branch_template.named_tokens

    @property
    def closing(self) -> tuple[str, ...]:
        """Names of the tokens that end an answer, in addition to the tokenizer's end token."""
        return () if self.branch_template is self else self.branch_template.closing

    @property
    def branch_template(self) -> TemplateBase:
        """The template of a single text: this one, or that of each branch if documents have branches."""
        return self

    def question(self, words: str) -> dict[str, Any] | None:
        """Return the fields of a sample whose prompt is ``words``; None if the template has no such prompt."""
        return None


class LearnedText(TemplateBase):
    """Base class of templates with a configurable rule for token weights."""

    loss_weight: LossWeight = "token"
    """Weight of each of the n learned tokens of a sample: 1 (``token``: long texts count more), ``1 / sqrt(n)``
    (``sqrt``: in between) or ``1 / n`` (``sample``: all samples count equally). It multiplies other token weights."""


class DroppableText(LearnedText):
    """Base class of templates whose text can be dropped."""

    text_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability, 0 to below 1, of dropping the text of a sample in an epoch, for classifier-free guidance. Images and
    prompt are kept. The sample RNG decides, so the result does not depend on the number of ranks or on resuming. A
    document without its text has no learned token and no next-token loss; use 0 for captioning."""

    def drops(self, rng: Rng | None) -> bool:
        """Draw whether to drop the text of this sample; False if ``rng`` is None."""
        return self.text_dropout > 0 and rng is not None and bool(rng.random() < self.text_dropout)


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> tuple[tuple[str, str | None], ...]:
    """Parse a format string to pairs of literal text and field name (None after the last literal).

    Raises:
        ValueError: it has unbalanced braces, an unnamed field, a conversion or a format specification.
    """
    parsed = []
    for literal, name, specification, conversion in Formatter().parse(text):
        if name is not None and (not name.replace(".", "").replace("_", "").isalnum() or specification or conversion):
            raise ValueError(f"format string {text!r}: only {{name}} and {{name.inner}} are allowed in braces")
        parsed.append((literal, name))
    return tuple(parsed)


def look_up(name: str, fields: Mapping[str, Any]) -> Any:
    """Return the value of a field; ``a.b`` is field b of the object a.

    Raises:
        SampleError: the field is missing or null.
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
    """Return the format string with its fields filled in; the items of a list are joined with commas.

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
    """Return the token weights of a document under a rule, which treats each branch as a separate sample.

    Args:
        weights: Weight of each token; 0 for tokens that are not learned.
        branches: Index of the first token of each branch.
        rule: See ``LearnedText.loss_weight``.

    Source: InternVL 2.5 (arXiv 2412.05271), loss reweighting: token, square and sample averaging.
    """
    shared = np.array(weights, dtype=np.float64)
    if rule == "token":
        return shared
    for part in np.split(shared, branches):  # The parts are views, so this writes to ``shared``.
        count = max(1.0, float(np.count_nonzero(part)))
        part /= math.sqrt(count) if rule == "sqrt" else count
    return shared
