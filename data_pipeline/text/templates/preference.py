"""Template for preference pairs: one prompt, then a chosen and a rejected answer to it.

    images and prompt, all but the last token | last token, chosen answer | last token, rejected answer

An answer is a text, or with ``each.kind=drawing`` an image as tokens. The answers are branches: each attends the
prompt and itself. The images are encoded once for both answers, and a pair is never divided between packs. Each
branch repeats the last token of the prompt, which predicts its first token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.io.json_member import check_pair
from data_pipeline.order.randomness import Rng
from data_pipeline.sample import ImagePart, MediaPart, Sample
from data_pipeline.shards.token_grid import decode_grid
from data_pipeline.text.templates.base import (
    BranchPiece,
    EndPiece,
    LossWeight,
    Piece,
    TemplateBase,
    TokenPiece,
    images_of,
    text,
)
from data_pipeline.text.templates.caption import CaptionTemplate
from data_pipeline.text.templates.dialogue import DialogueTemplate
from data_pipeline.text.templates.drawing import DrawingTemplate

_ANSWER, _MESSAGES = "answer", "messages"


class PreferenceTemplate(TemplateBase):
    """A prompt with a chosen and a rejected answer, for a stage with ``preference``.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), section 4. The fields are those of TRL's preference data.
    """

    no_pair: ClassVar[str | None] = "two answers to one prompt"
    kind: Literal["preference"] = "preference"
    prompt_field: str = "prompt"
    """Field with the prompt: a text, or a list of turns for ``each.kind=dialogue``. It may be missing if ``chosen`` and
    ``rejected`` are whole dialogues, or if the prompt of ``each`` does not use it."""
    chosen: str = "chosen"
    """Field with the preferred answer: a text; for ``each.kind=dialogue`` also a list of turns that ends with it; for
    ``each.kind=drawing`` the name of an image of the sample, ``0.png``, whose token grid is stored."""
    rejected: str = "rejected"
    """Field with the other answer, in the same form."""
    each: Annotated[CaptionTemplate | DialogueTemplate | DrawingTemplate, Field(discriminator="kind")] = (
        CaptionTemplate(prompts=("{prompt}",), answers=("{answer}",), images="optional")
    )
    """Template of the prompt with one answer. A ``caption`` template reads the answer as the field ``answer``. A
    ``dialogue`` template learns the last turn of its learned roles. A ``drawing`` template reads its text and learns
    the image. The loss weight multiplies the log-probability of a token. The prompt must end with text."""
    learn_special: bool = True
    """Whether special tokens of an answer, such as the end of its turn, belong to its log-probability. Llama 3 leaves
    them out. For ``each.kind=drawing``, ``each.mark_weight`` decides instead."""

    stored_reference: str | None = Field(default=None, pattern="^crc32:[0-9a-f]{8}(-ema)?$")
    """Checksum of the reference model whose log-probabilities the shards hold, as ``mmscale data reference`` prints it.
    The run then reads them and does not load that model. Pairs of another model or without log-probabilities are bad
    samples. null: the run loads the reference model."""

    @property
    def takes_images(self) -> bool:
        return self.each.takes_images

    @property
    def draws(self) -> bool:
        return self.each.draws

    @property
    def requires_images(self) -> bool:
        return self.each.requires_images

    @property
    def branch_template(self) -> CaptionTemplate | DialogueTemplate | DrawingTemplate:
        return self.each

    @property
    def loss_weight(self) -> LossWeight:
        """Rule for the token weights of each answer."""
        return self.each.loss_weight

    @field_validator("each")
    @classmethod
    def _check_each(
        cls, each: CaptionTemplate | DialogueTemplate | DrawingTemplate
    ) -> CaptionTemplate | DialogueTemplate | DrawingTemplate:
        if isinstance(each, DialogueTemplate):
            return each.model_copy(update={"learn": "last"})
        if isinstance(each, DrawingTemplate):
            if each.caption_last or each.text_dropout or not each.image_weight:
                raise ValueError(
                    "each: the two images are the answers to one text, so it needs caption_last: 0, text_dropout: 0 "
                    "and an image_weight above 0"
                )
            return each.model_copy(update={"text_weight": 0.0})
        if each.text_dropout:
            raise ValueError(f"each.text_dropout={each.text_dropout}: would drop the answers of a pair; leave it out")
        if len(each.prompts) != 1 or each.answers != ("{answer}",):
            raise ValueError(
                'each: expected one prompt and answers: ["{answer}"], so that both answers have one prompt'
            )
        return each

    def pieces(self, sample: Sample, rng: Rng | None) -> list[Piece]:
        """Return the prompt, the chosen answer as a branch, and the rejected answer as a branch.

        Raises:
            SampleError: an answer is missing or empty, both are equal, or they do not follow the same prompt.
        """
        check_pair(sample.fields, self.chosen, self.rejected)
        branch = BranchPiece(repeats_last=True)
        if isinstance(self.each, DrawingTemplate):
            chosen, rejected = self._images(sample)
            words = text(self.each.words(self._asked(sample), rng))
            return [*words, branch, *self.each.drawn(chosen), branch, *self.each.drawn(rejected)]
        prompts, answers = [], []
        for name in (self.chosen, self.rejected):
            pieces = self.each.pieces(self._sample_of(sample, name), rng)
            first = next(i for i, piece in enumerate(pieces) if _weight(piece) > 0)
            prompts.append(pieces[:first])
            answers.append([self._weighted(piece) for piece in pieces[first:]])
        if prompts[0] != prompts[1]:
            raise SampleError(
                f"{self.chosen} and {self.rejected} answer different prompts: only their last turns may differ",
                kind=FaultKind.TEXT,
            )
        if answers[0] == answers[1]:
            raise SampleError(
                f"{self.chosen} and {self.rejected} give equal answers, so the pair prefers nothing",
                kind=FaultKind.TEXT,
            )
        return [*prompts[0], branch, *answers[0], branch, *answers[1]]

    def prompt(self, sample: Sample) -> list[Piece]:
        """Return the images and the prompt; for an image as answer, the text."""
        if isinstance(self.each, DrawingTemplate):
            return self.each.prompt(self._asked(sample))
        return self.each.prompt(self._sample_of(sample, self.chosen))

    def _weighted(self, piece: Piece) -> Piece:
        if isinstance(piece, TokenPiece | EndPiece) and not self.learn_special:
            return replace(piece, weight=0.0)
        return piece

    def _images(self, sample: Sample) -> list[ImagePart]:
        """Return the chosen and the rejected image, which have different token grids of one image tokenizer."""
        images = {image.name: image for image in images_of(sample)}
        for name in (self.chosen, self.rejected):
            if not isinstance(sample.fields[name], str) or sample.fields[name] not in images:
                raise SampleError(
                    f"field {name!r} names the image {sample.fields[name]!r:.80}, but the images of the sample are "
                    f"{', '.join(images) or 'none'}",
                    kind=FaultKind.NO_IMAGE,
                )
        found = [images[sample.fields[name]] for name in (self.chosen, self.rejected)]
        grids = [decode_grid(image.grid, image.name) for image in found if image.grid is not None]
        if len(grids) == len(found):  # Without a grid, ``DrawnImages.tokens`` gives the reason.
            if grids[0].tokenizer != grids[1].tokenizer:
                raise SampleError(
                    f"{self.chosen} and {self.rejected} are of different image tokenizers "
                    f"({grids[0].tokenizer[:12]}..., {grids[1].tokenizer[:12]}...), whose codes mean different images"
                )
            if np.array_equal(grids[0].codes, grids[1].codes):
                raise SampleError(f"{self.chosen} and {self.rejected} are equal grids, so the pair prefers nothing")
        return found

    def _asked(self, sample: Sample) -> Sample:
        """Return the sample with its prompt as the field ``prompt``."""
        prompt = sample.fields.get(self.prompt_field)
        return replace(sample, fields={**sample.fields, "prompt": prompt})

    def _sample_of(self, sample: Sample, name: str) -> Sample:
        """Return the sample with the fields that ``each`` reads: its prompt and the answer of the field ``name``."""
        answer, prompt = sample.fields[name], sample.fields.get(self.prompt_field)
        if not isinstance(self.each, DialogueTemplate):
            if not isinstance(answer, str):
                reason = f"field {name!r} holds a {type(answer).__name__}; turns need template.each.kind=dialogue"
                raise SampleError(reason, kind=FaultKind.TEXT)
            return replace(sample, fields={**self._asked(sample).fields, _ANSWER: answer})
        before = self.each.question(prompt)[self.each.field or _MESSAGES] if isinstance(prompt, str) else prompt or []
        if isinstance(answer, str):
            role = next(name for name, role in self.each.roles.items() if role.weight)
            answer = [{"role": role, "content": answer}]
        return replace(sample, fields={**sample.fields, self.each.field or _MESSAGES: [*before, *answer]})


def _weight(piece: Piece) -> float:
    return 0.0 if isinstance(piece, MediaPart | BranchPiece) else piece.weight
