"""Sample to pieces: which text is read, which is learned, where the images stand.

    caption       images, prompt (no loss), answer (loss)
    interleaved   parts as stored, loss on all text
    text          text only, loss on all of it

Not for: token ids (``documents``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import Field, field_validator, model_validator

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.sample import ImagePart, Sample, TextPart
from data_pipeline.strict import StrictConfig

T = TypeVar("T")


@dataclass(frozen=True)
class TextPiece:
    """Text of a document."""

    text: str
    learned: bool
    """Whether its tokens carry loss."""


Piece = TextPiece | ImagePart


class CaptionTemplate(StrictConfig):
    """Images, then a prompt, then an answer that the model learns."""

    kind: Literal["caption"] = "caption"
    prompts: tuple[str, ...] = ("",)
    """Format strings over the sample's fields, ``"Name the {group}:"``. One for all answers, or one for each of
    ``answers``, or, with ``field``, any number of which one is drawn."""
    answers: tuple[str, ...] | None = None
    """Format strings of which one is drawn for each sample and epoch. A list field is joined with commas; ``{a.b}``
    reads field b of the object a. Every field must exist in every sample."""
    field: str | None = None
    """Take the answer from this field instead: a string, or a list of strings of which one is drawn. Neither
    ``answers`` nor ``field``: the field ``captions`` if the sample has it, else ``caption``."""

    @field_validator("prompts", "answers")
    @classmethod
    def _check_formats(cls, formats: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if formats is not None and not formats:
            raise ValueError("expected at least one format string")
        for text in formats or ():
            _parse(text)
        return formats

    @model_validator(mode="after")
    def _check_pairs(self) -> CaptionTemplate:
        if self.answers is not None and self.field is not None:
            raise ValueError("answers and field exclude each other")
        if self.answers is not None and len(self.prompts) not in (1, len(self.answers)):
            raise ValueError(f"{len(self.prompts)} prompts for {len(self.answers)} answers: expected 1 or as many")
        return self

    def pieces(self, sample: Sample, rng: np.random.Generator | None) -> list[Piece]:
        """Images, prompt and answer; ``rng`` None takes the first of every list.

        Raises:
            SampleError: a field is missing, or the answer is empty.
        """
        if self.answers is None:
            answer = _draw(self._stored_answers(sample), rng)
            prompt = _fill(_draw(self.prompts, rng), sample.fields)
        else:
            filled = [_fill(text, sample.fields) for text in self.answers]
            choice = _draw(range(len(filled)), rng)
            answer = filled[choice]
            prompt = _fill(self.prompts[choice if len(self.prompts) > 1 else 0], sample.fields)
        if not answer.strip():
            raise SampleError("the answer is empty", kind=FaultKind.TEXT)
        return [*_images(sample), *_text(prompt, learned=False), TextPiece(answer, learned=True)]

    def prompt(self, sample: Sample) -> list[Piece]:
        """Images and the first prompt."""
        return [*_images(sample), *_text(_fill(self.prompts[0], sample.fields), learned=False)]

    def _stored_answers(self, sample: Sample) -> Sequence[str]:
        name = self.field or ("captions" if "captions" in sample.fields else "caption")
        value = _lookup(name, sample.fields)
        answers = [value] if isinstance(value, str) else value
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise SampleError(
                f"field {name!r} is {value!r}, expected a string or a list of strings", kind=FaultKind.TEXT
            )
        return answers


class InterleavedTemplate(StrictConfig):
    """Images and text as stored; all text is learned."""

    kind: Literal["interleaved"] = "interleaved"

    def pieces(self, sample: Sample, rng: np.random.Generator | None) -> list[Piece]:
        """Parts in stored order."""
        pieces: list[Piece] = []
        for part in sample.parts:
            pieces.extend([part] if isinstance(part, ImagePart) else _text(part.text, learned=True))
        if not any(isinstance(piece, TextPiece) for piece in pieces):
            raise SampleError("no text among its parts: there is nothing to learn", kind=FaultKind.TEXT)
        return pieces

    def prompt(self, sample: Sample) -> list[Piece]:
        """Parts up to the last text, which is the answer."""
        pieces = self.pieces(sample, None)
        last = max(i for i, piece in enumerate(pieces) if isinstance(piece, TextPiece))
        return pieces[:last]


class TextTemplate(StrictConfig):
    """Text alone; all of it is learned."""

    kind: Literal["text"] = "text"

    def pieces(self, sample: Sample, rng: np.random.Generator | None) -> list[Piece]:
        """The text parts.

        Raises:
            SampleError: the sample has images, which this template would drop, or has no text.
        """
        if any(isinstance(part, ImagePart) for part in sample.parts):
            raise SampleError(
                "has images, and template.kind=text would drop them; use interleaved or caption", kind=FaultKind.TEXT
            )
        pieces = [
            piece for part in sample.parts if isinstance(part, TextPart) for piece in _text(part.text, learned=True)
        ]
        if not pieces:
            raise SampleError("no text: there is nothing to learn", kind=FaultKind.TEXT)
        return list(pieces)

    def prompt(self, sample: Sample) -> list[Piece]:
        """Nothing: a text is continued from its beginning."""
        return []


TemplateConfig = Annotated[CaptionTemplate | InterleavedTemplate | TextTemplate, Field(discriminator="kind")]


def _images(sample: Sample) -> list[ImagePart]:
    return [part for part in sample.parts if isinstance(part, ImagePart)]


def _text(text: str, *, learned: bool) -> list[TextPiece]:
    return [TextPiece(text, learned)] if text else []


def _draw(options: Sequence[T], rng: np.random.Generator | None) -> T:
    return options[0 if rng is None else int(rng.random() * len(options))]


def _parse(text: str) -> list[tuple[str, str | None]]:
    """Literal text and field name pairs; only plain ``{name}`` and ``{name.inner}`` are formats.

    Raises:
        ValueError: unbalanced braces, an unnamed field, a conversion or a format specification.
    """
    parsed = []
    for literal, name, specification, conversion in Formatter().parse(text):
        if name is not None and (not name.replace(".", "").replace("_", "").isalnum() or specification or conversion):
            raise ValueError(f"format string {text!r}: expected {{name}} or {{name.inner}}, nothing else in braces")
        parsed.append((literal, name))
    return parsed


def _lookup(name: str, fields: Mapping[str, Any]) -> Any:
    value: Any = fields
    for key in name.split("."):
        if not isinstance(value, Mapping) or value.get(key) is None:
            raise SampleError(
                f"field {name!r} is missing; the sample has {', '.join(sorted(fields)) or 'no fields'}",
                kind=FaultKind.TEXT,
            )
        value = value[key]
    return value


def _fill(text: str, fields: Mapping[str, Any]) -> str:
    out = []
    for literal, name in _parse(text):
        out.append(literal)
        if name is not None:
            value = _lookup(name, fields)
            out.append(", ".join(map(str, value)) if isinstance(value, list) else str(value))
    return "".join(out)
