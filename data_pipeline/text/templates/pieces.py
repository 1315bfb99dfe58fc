"""What templates make: pieces of a document in reading order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

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
