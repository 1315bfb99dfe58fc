"""Documents as they are stored: text and images in turn, or text alone."""

from __future__ import annotations

from typing import ClassVar, Literal

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.order.randomness import Draws
from data_pipeline.sample import ImagePart, Sample, TextPart
from data_pipeline.text.templates.base import (
    DroppableText,
    EndPiece,
    ImagesRule,
    LearnedText,
    Piece,
    TextPiece,
    images_of,
    text,
)


class InterleavedTemplate(DroppableText):
    """Images and text as stored; all text is learned, with the weight that a part names (``"weight": 0.5``)."""

    kind: Literal["interleaved"] = "interleaved"
    images: ImagesRule = "optional"
    """``required``: a page without an image is a bad sample (fault kind ``no_image``)."""
    separator: str = ""
    """Put after every text but the last part: MMC4 stores sentences without the space or line break between them."""

    @property
    def requires_images(self) -> bool:
        return self.images == "required"

    def pieces(self, sample: Sample, rng: Draws | None) -> list[Piece]:
        """Parts in stored order.

        Raises:
            SampleError: there is no text.
        """
        pieces: list[Piece] = []
        for number, part in enumerate(sample.parts, start=1):
            if isinstance(part, ImagePart):
                pieces.append(part)
            else:
                last = number == len(sample.parts)
                pieces.extend(text(part.text if last else part.text + self.separator, part.weight))
        if not any(isinstance(piece, TextPiece) for piece in pieces):
            raise SampleError("no text among its parts: there is nothing to learn", kind=FaultKind.TEXT)
        images = images_of(sample)
        if images and self.drops(rng):  # A text without images would be nothing at all: it stays.
            return [*images, EndPiece(0.0)]
        return [*pieces, _end(pieces[-1])]

    def prompt(self, sample: Sample) -> list[Piece]:
        """Parts up to the last text, which is the answer."""
        pieces = self.pieces(sample, None)
        last = max(i for i, piece in enumerate(pieces) if isinstance(piece, TextPiece))
        return pieces[:last]


class TextTemplate(LearnedText):
    """Text alone; all of it is learned, with the weight that a part names."""

    takes_images: ClassVar[bool] = False
    no_pair: ClassVar[str | None] = "no image"
    kind: Literal["text"] = "text"

    def pieces(self, sample: Sample, rng: Draws | None) -> list[Piece]:
        """The text parts.

        Raises:
            SampleError: the sample has images, which this template would drop, or has no text.
        """
        if any(isinstance(part, ImagePart) for part in sample.parts):
            raise SampleError(
                "has images, and template.kind=text would drop them; use interleaved or caption", kind=FaultKind.TEXT
            )
        pieces = [
            piece for part in sample.parts if isinstance(part, TextPart) for piece in text(part.text, part.weight)
        ]
        if not pieces:
            raise SampleError("no text: there is nothing to learn", kind=FaultKind.TEXT)
        return [*pieces, _end(pieces[-1])]

    def prompt(self, sample: Sample) -> list[Piece]:
        """Nothing: a text is continued from its beginning."""
        return []


def _end(last: Piece) -> EndPiece:
    """The end is learned as what it ends; an image does not tell that nothing follows."""
    return EndPiece(last.weight if isinstance(last, TextPiece) else 0.0)
