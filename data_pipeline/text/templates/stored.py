"""Templates for documents as they are stored: interleaved text and images, or text alone."""

from __future__ import annotations

from typing import ClassVar, Literal

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.order.randomness import Rng
from data_pipeline.sample import Sample, TextPart
from data_pipeline.text.templates.base import (
    DroppableText,
    EndPiece,
    ImagesRule,
    LearnedText,
    Piece,
    TextPiece,
    media_of,
    text,
)


class InterleavedTemplate(DroppableText):
    """Images, videos and text in stored order. All text is learned, with the weight of its part (``"weight": 0.5``)."""

    kind: Literal["interleaved"] = "interleaved"
    images: ImagesRule = "optional"
    """``required``: a page without an image is a bad sample (fault kind ``no_image``). ``optional``: it is learned."""
    separator: str = ""
    """Text after every text part that is not the last part of the page. MMC4 stores sentences without separators."""

    @property
    def requires_images(self) -> bool:
        return self.images == "required"

    def pieces(self, sample: Sample, rng: Rng | None) -> list[Piece]:
        """Return the parts in stored order.

        Raises:
            SampleError: there is no text.
        """
        pieces: list[Piece] = []
        for number, part in enumerate(sample.parts, start=1):
            if isinstance(part, TextPart):
                last = number == len(sample.parts)
                pieces.extend(text(part.text if last else part.text + self.separator, part.weight))
            else:
                pieces.append(part)
        if not any(isinstance(piece, TextPiece) for piece in pieces):
            raise SampleError("no text among its parts: there is nothing to learn", kind=FaultKind.TEXT)
        media = media_of(sample)
        if media and self.drops(rng):  # Do not drop the text of a page without images: nothing would be left.
            return [*media, EndPiece(0.0)]
        return [*pieces, _end(pieces[-1])]

    def prompt(self, sample: Sample) -> list[Piece]:
        """Return the parts before the last text, which counts as the answer."""
        pieces = self.pieces(sample, None)
        last = max(i for i, piece in enumerate(pieces) if isinstance(piece, TextPiece))
        return pieces[:last]


class TextTemplate(LearnedText):
    """Text alone. All of it is learned, with the weight of its part."""

    no_pair: ClassVar[str | None] = "no image"
    kind: Literal["text"] = "text"

    @property
    def takes_images(self) -> bool:
        return False

    def pieces(self, sample: Sample, rng: Rng | None) -> list[Piece]:
        """Return the text parts.

        Raises:
            SampleError: the sample has images or videos, which this template would drop, or has no text.
        """
        if media_of(sample):
            raise SampleError(
                "the sample has images or videos, and template.kind=text would drop them; use interleaved or caption",
                kind=FaultKind.TEXT,
            )
        pieces = [
            piece for part in sample.parts if isinstance(part, TextPart) for piece in text(part.text, part.weight)
        ]
        if not pieces:
            raise SampleError("no text: there is nothing to learn", kind=FaultKind.TEXT)
        return [*pieces, _end(pieces[-1])]

    def prompt(self, sample: Sample) -> list[Piece]:
        """Return no pieces: generation starts at the beginning of the text."""
        return []


def _end(last: Piece) -> EndPiece:
    """Return an end piece with the weight of the last text; weight 0 after an image, which cannot predict the end."""
    return EndPiece(last.weight if isinstance(last, TextPiece) else 0.0)
