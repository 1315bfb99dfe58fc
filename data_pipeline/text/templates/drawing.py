"""Template for images and videos that the model learns to draw: a text, then the tokens, or in the other order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.order.randomness import Rng
from data_pipeline.sample import AudioPart, ImagePart, Provenance, Sample, VideoPart
from data_pipeline.text.templates.base import (
    DrawnPiece,
    DroppableText,
    EndPiece,
    OpeningPiece,
    Piece,
    TextPiece,
    draw,
    fill,
    media_of,
    parse,
    text,
)
from data_pipeline.text.templates.caption import CaptionTemplate, check_answer

_CAPTIONS = CaptionTemplate()


class DrawingTemplate(DroppableText):
    """A text, then one image or video as tokens of the decoder (``data.image_tokens``); or the image, then the text.

    Source: Emu3 (arXiv 2409.18869), sections 2.2 and 2.4: loss weight 0.5 for images, and a part of the data with the
    caption after the image. Janus (arXiv 2410.13848), section 3.3: loss on the image alone, and 10 % of the texts
    dropped.
    """

    no_pair: ClassVar[str | None] = "an image as tokens"
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

    @property
    def takes_images(self) -> bool:
        return False

    @property
    def draws(self) -> bool:
        return True

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
            SampleError: the sample does not have exactly one image or video, a field is missing, or the text is empty.
        """
        image = self._image(sample)
        words = self.words(sample, rng)
        image_first = self.caption_last == 1 or (
            self.caption_last > 0 and rng is not None and bool(rng.random() < self.caption_last)
        )
        drawn, end = self.drawn(image)
        if image_first:
            return [drawn, *text(words, self.text_weight), EndPiece(self.text_weight)]
        if self.drops(rng):
            return [*self._dropped(words), drawn, end]
        return [*text(words, self.text_weight), drawn, end]

    def prompt(self, sample: Sample) -> list[Piece]:
        """Return the text before the image, without the marks between text and codes."""
        return [*text(self.words(sample, None))]

    def drawn(self, image: ImagePart | VideoPart) -> list[Piece]:
        """Return an image or a video and the end of its document."""
        return [DrawnPiece(image, self.image_weight, self.mark_weight), EndPiece(self.mark_weight)]

    def text_to_draw(self, given: str | Mapping[str, Any]) -> str:
        """Return the first prompt with a user's text in its field.

        Args:
            given: The text; it replaces the whole prompt if the prompt has no field or several. Or the prompt's fields.

        Raises:
            SampleError: a field is missing, or the text is empty.
        """
        fields: Any = given
        if isinstance(given, str):
            if not given.strip():
                raise SampleError("the text to draw is empty", kind=FaultKind.TEXT)
            names = {name for _, name in parse(self.prompts[0]) if name is not None}
            if len(names) != 1:
                return given
            for key in reversed(names.pop().split(".")):
                fields = {key: fields}
        return self.words(Sample((), fields, Provenance("text", "", "", 0)), None)

    def drawing_prompt(
        self, words: str, rows: int, columns: int, *, drop_text: bool = False
    ) -> list[Piece | OpeningPiece]:
        """Return the pieces before the first code of an image to draw: a text of ``text_to_draw``, and the marks.

        Args:
            words: The text.
            rows: Rows of codes.
            columns: Columns of codes.
            drop_text: Replace the text as ``dropped_text`` does in training, for classifier-free guidance.
        """
        return [*(self._dropped(words) if drop_text else text(words)), OpeningPiece(rows, columns)]

    def _dropped(self, words: str) -> list[Piece]:
        return [TextPiece(words, 0.0, is_padding=True)] if self.dropped_text == "pad" else []

    def num_captions(self, sample: Sample) -> int:
        """Return the number of captions of a sample among which ``words`` draws.

        Raises:
            SampleError: a prompt has ``{caption}``, and the sample has none.
        """
        reads_captions = any(name == "caption" for prompt in self.prompts for _, name in parse(prompt))
        return len(_CAPTIONS.stored_answers(sample)) if reads_captions else 1

    def words(self, sample: Sample, rng: Rng | None) -> str:
        """Return the text of a sample, drawn with ``rng``.

        Raises:
            SampleError: a field is missing, or the text is empty.
        """
        prompt, fields = draw(self.prompts, rng), sample.fields
        if any(name == "caption" for _, name in parse(prompt)):
            fields = {**fields, "caption": draw(_CAPTIONS.stored_answers(sample), rng)}
        words = fill(prompt, fields)
        check_answer(words)
        return words

    def _image(self, sample: Sample) -> ImagePart | VideoPart:
        media = [part for part in media_of(sample) if not isinstance(part, AudioPart)]
        if len(media) != 1:
            num_videos = sum(isinstance(part, VideoPart) for part in media)
            raise SampleError(
                f"{len(media) - num_videos} images and {num_videos} videos, but template.kind=drawing takes exactly "
                "one image or video",
                kind=FaultKind.DOCUMENT if media else FaultKind.NO_IMAGE,
            )
        return media[0]
