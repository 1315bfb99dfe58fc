"""Template for images with a text: a prompt that is read, then an answer that is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import field_validator, model_validator

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.order.randomness import Rng
from data_pipeline.sample import Sample
from data_pipeline.text.templates.base import (
    DroppableText,
    EndPiece,
    ImagesRule,
    Piece,
    draw,
    fill,
    look_up,
    media_of,
    parse,
    text,
)


class CaptionTemplate(DroppableText):
    """Images and videos, then a prompt, then an answer that the model learns."""

    kind: Literal["caption"] = "caption"
    images: ImagesRule = "required"
    """``required``: a sample without an image is a bad sample (fault kind ``no_image``). ``optional``: the model learns
    the text of such a sample. A model without a vision tower never requires images."""
    prompts: tuple[str, ...] = ("",)
    """Format strings with the sample's fields: ``"Name the {group}:"``. With ``answers``: one for all of them, or one
    for each. Without ``answers``: any number, of which one is drawn for each sample and epoch."""
    answers: tuple[str, ...] | None = None
    """Format strings, of which one is drawn for each sample and epoch. The items of a list field are joined with
    commas. ``{a.b}`` is field b of the object a. Every sample must have all fields. null uses ``field``."""
    field: str | None = None
    """Field with the answer: a string, or a list of strings of which one is drawn. Excludes ``answers``. If both are
    null, the field is ``captions`` if the sample has it, else ``caption``."""

    @property
    def requires_images(self) -> bool:
        return self.images == "required"

    @field_validator("prompts", "answers")
    @classmethod
    def _check_formats(cls, formats: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if formats is not None and not formats:
            raise ValueError("expected at least one format string")
        for one in formats or ():
            parse(one)
        return formats

    @model_validator(mode="after")
    def _check_pairs(self) -> CaptionTemplate:
        if self.answers is not None and self.field is not None:
            raise ValueError("answers and field exclude each other")
        if self.answers is not None and len(self.prompts) not in (1, len(self.answers)):
            raise ValueError(
                f"{len(self.prompts)} prompts for {len(self.answers)} answers: expected 1, or one for each answer"
            )
        return self

    def pieces(self, sample: Sample, rng: Rng | None) -> list[Piece]:
        """Return images and videos, prompt and answer. ``rng`` None uses the first of every list.

        Raises:
            SampleError: a field is missing, or the answer is empty.
        """
        if self.answers is None:
            answer = draw(self.stored_answers(sample), rng)
            prompt = fill(draw(self.prompts, rng), sample.fields)
        else:
            filled = [fill(one, sample.fields) for one in self.answers]
            choice = draw(range(len(filled)), rng)
            answer = filled[choice]
            prompt = fill(self.prompts[choice if len(self.prompts) > 1 else 0], sample.fields)
        check_answer(answer)
        if self.drops(rng):
            return [*media_of(sample), *text(prompt), EndPiece(0.0)]
        return [*media_of(sample), *text(prompt), *text(answer, 1.0), EndPiece(1.0)]

    def prompt(self, sample: Sample) -> list[Piece]:
        """Return the images and videos and the first prompt."""
        return [*media_of(sample), *text(fill(self.prompts[0], sample.fields))]

    def stored_answers(self, sample: Sample) -> Sequence[str]:
        """Return the answers that are stored in the sample.

        Raises:
            SampleError: the field is missing, or is not a string or a list of strings.
        """
        name = self.field or ("caption" if sample.fields.get("captions") is None else "captions")
        value = look_up(name, sample.fields)
        answers = [value] if isinstance(value, str) else value
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise SampleError(
                f"field {name!r} is {value!r}, expected a string or a list of strings", kind=FaultKind.TEXT
            )
        return answers


def check_answer(answer: str) -> None:
    """Check that an answer is not empty.

    Raises:
        SampleError: the answer is empty, or only white space.
    """
    if not answer.strip():
        raise SampleError("the answer is empty", kind=FaultKind.TEXT)
