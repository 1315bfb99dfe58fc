"""Template for images that the model learns to draw: a text, then the image as tokens, or in the other order."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.order.randomness import Rng
from data_pipeline.sample import ImagePart, Sample
from data_pipeline.text.templates.base import (
    DrawnPiece,
    DroppableText,
    EndPiece,
    Piece,
    TextPiece,
    draw,
    fill,
    images_of,
    parse,
    text,
)
from data_pipeline.text.templates.caption import CaptionTemplate, check_answer

_CAPTIONS = CaptionTemplate()


class DrawingTemplate(DroppableText):
    """A text, then one image as tokens of the decoder (``data.image_tokens``); or the image, then the text.

    Source: Emu3 (arXiv 2409.18869), sections 2.2 and 2.4: loss weight 0.5 for images, and a part of the data with the
    caption after the image. Janus (arXiv 2410.13848), section 3.3: loss on the image alone, and 10 % of the texts
    dropped.
    """

    takes_images: ClassVar[bool] = False
    no_pair: ClassVar[str | None] = "an image as tokens"
    draws: ClassVar[bool] = True
    kind: Literal["drawing"] = "drawing"
    prompts: tuple[str, ...] = ("{caption}",)
    """Format strings with the sample's fields, of which one is drawn for each sample and epoch. ``{caption}`` is one of
    ``captions`` if the sample has them, also drawn. Janus: ``"User: {caption}\\n\\nAssistant:"``."""
    text_weight: float = Field(default=1.0, ge=0, le=1e6)
    """Loss weight of each token of the text; 0 reads the text without learning it (Janus)."""
    image_weight: float = Field(default=1.0, ge=0, le=1e6)
    """Loss weight of each code of the image: 0.5 in the pre-training of Emu3. 0 reads the image without learning it."""
    mark_weight: float = Field(default=0.0, ge=0, le=1e6)
    """Loss weight of the marks around the image, such as row ends. 0 suits a generator that inserts the marks
    itself."""
    caption_last: float = Field(default=0.0, ge=0, le=1)
    """Probability, 0 to 1, that the text follows the image. The sample RNG decides in each epoch."""
    text_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability, 0 to below 1, of dropping a text that precedes its image, for classifier-free guidance: 0.1 (Janus).
    The sample RNG decides in each epoch. The image is still learned."""
    dropped_text: Literal["empty", "pad"] = "empty"
    """Replacement of a dropped text: nothing (``empty``), or one padding token for each token (``pad``, Janus)."""

    @field_validator("prompts")
    @classmethod
    def _check_formats(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        if not formats:
            raise ValueError("expected at least one format string")
        for one in formats:
            parse(one)
        return formats

    def pieces(self, sample: Sample, rng: Rng | None) -> list[Piece]:
        """Return text and image. With ``rng`` None, the first prompt and caption, nothing dropped, the text first.

        With ``caption_last`` 1 the image is always first.

        Raises:
            SampleError: the sample does not have exactly one image, a field is missing, or the text is empty.
        """
        image = self._image(sample)
        words = self._text(sample, rng)
        image_first = self.caption_last == 1 or (
            self.caption_last > 0 and rng is not None and bool(rng.random() < self.caption_last)
        )
        drawn = DrawnPiece(image, self.image_weight, self.mark_weight)
        if image_first:
            return [drawn, *text(words, self.text_weight), EndPiece(self.text_weight)]
        if self.drops(rng):
            padding = [TextPiece(words, 0.0, is_padding=True)] if self.dropped_text == "pad" else []
            return [*padding, drawn, EndPiece(self.mark_weight)]
        return [*text(words, self.text_weight), drawn, EndPiece(self.mark_weight)]

    def prompt(self, sample: Sample) -> list[Piece]:
        """Return the text before the image. ``DrawnImages.opening`` gives the marks between text and codes."""
        return [*text(self._text(sample, None))]

    def _text(self, sample: Sample, rng: Rng | None) -> str:
        prompt, fields = draw(self.prompts, rng), sample.fields
        if any(name == "caption" for _, name in parse(prompt)):
            fields = {**fields, "caption": draw(_CAPTIONS.stored_answers(sample), rng)}
        words = fill(prompt, fields)
        check_answer(words)
        return words

    def _image(self, sample: Sample) -> ImagePart:
        images = images_of(sample)
        if len(images) != 1:
            raise SampleError(
                f"{len(images)} images, but template.kind=drawing takes exactly one",
                kind=FaultKind.DOCUMENT if images else FaultKind.NO_IMAGE,
            )
        return images[0]
