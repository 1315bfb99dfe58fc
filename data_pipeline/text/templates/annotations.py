"""Template for several texts about the same images: the images once, then a branch for each text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.order.randomness import Rng
from data_pipeline.sample import MediaPart, Sample
from data_pipeline.shards.pages import weight_of
from data_pipeline.text.templates.base import (
    BranchPiece,
    ImagesRule,
    LossWeight,
    Piece,
    TemplateBase,
    look_up,
    media_of,
)
from data_pipeline.text.templates.caption import CaptionTemplate
from data_pipeline.text.templates.dialogue import DialogueTemplate


class AnnotationsTemplate(TemplateBase):
    """The images, then a branch for each annotation. A branch attends the images and itself, but no other branch.

    The token weights of each of n branches are multiplied by ``1 / sqrt(n)``.

    Source: Molmo (arXiv 2409.17146, section 3).
    """

    no_pair: ClassVar[str | None] = "several texts of one image"
    kind: Literal["annotations"] = "annotations"
    images: ImagesRule = "optional"
    """``required``: a sample without an image is a bad sample (fault kind ``no_image``). ``optional``: the model learns
    the annotations of such a sample without an image."""
    field: str = "annotations"
    """Field with the list of annotations. ``each`` reads the fields of an annotation object in addition to those of the
    sample, and a string as the field ``caption``. A ``weight`` in an object multiplies its token weights."""
    each: Annotated[CaptionTemplate | DialogueTemplate, Field(discriminator="kind")] = CaptionTemplate(
        prompts=("{question}",), answers=("{answer}",)
    )
    """Template of an annotation, ``caption`` or ``dialogue``; the images come before all branches. It must begin with
    text that is read, because the shared images cannot predict how each branch begins."""
    max_annotations: int | None = Field(default=None, ge=1)
    """Largest number of annotations of a sample, at least 1. From more, a new selection is drawn in each epoch. null
    uses all."""

    @property
    def requires_images(self) -> bool:
        return self.images == "required"

    @property
    def branch_template(self) -> CaptionTemplate | DialogueTemplate:
        return self.each

    @property
    def loss_weight(self) -> LossWeight:
        """Rule for the token weights of each branch."""
        return self.each.loss_weight

    @field_validator("each")
    @classmethod
    def _check_prompts(cls, each: CaptionTemplate | DialogueTemplate) -> CaptionTemplate | DialogueTemplate:
        if isinstance(each, CaptionTemplate) and not all(each.prompts):
            raise ValueError("each.prompts: every branch must begin with text that is read, so no prompt may be empty")
        if each.images != type(each).model_fields["images"].default:
            raise ValueError(
                f"each.images={each.images}: all annotations share the images; set template.images instead"
            )
        return each

    def pieces(self, sample: Sample, rng: Rng | None) -> list[Piece]:
        """Return the images and the annotations, as branches if there are several.

        If there are more than ``max_annotations``, that many are drawn and kept in stored order. With ``rng`` None, the
        first ones are used.

        Raises:
            SampleError: there is no annotation, or one lacks what ``each`` needs.
        """
        entries = self._entries(sample)
        if self.max_annotations is not None and len(entries) > self.max_annotations:
            numbers = np.arange(len(entries)) if rng is None else rng.permutation(len(entries))
            entries = [entries[i] for i in np.sort(numbers[: self.max_annotations])]
        share = 1 / math.sqrt(len(entries))
        pieces: list[Piece] = [*media_of(sample)]
        for entry in entries:
            weight = share * (weight_of(entry) if isinstance(entry, dict) else 1.0)
            if len(entries) > 1:
                pieces.append(BranchPiece())
            for piece in self.each.pieces(self._sample_of(entry, sample), rng):
                if not isinstance(piece, MediaPart | BranchPiece):
                    pieces.append(replace(piece, weight=piece.weight * weight))
        return pieces

    def prompt(self, sample: Sample) -> list[Piece]:
        """Return the images and the prompt of the first annotation."""
        return self.each.prompt(self._sample_of(self._entries(sample)[0], sample))

    def _entries(self, sample: Sample) -> Sequence[Any]:
        entries = look_up(self.field, sample.fields)
        if not isinstance(entries, list) or not entries or not all(isinstance(one, dict | str) for one in entries):
            reason = f"field {self.field!r} is {entries!r:.80}, expected a list of objects or strings"
            raise SampleError(reason, kind=FaultKind.TEXT)
        return entries

    def _sample_of(self, entry: Any, sample: Sample) -> Sample:
        """Return the sample with the fields of one annotation instead of the list."""
        own = {"caption": entry} if isinstance(entry, str) else entry
        shared = {name: value for name, value in sample.fields.items() if name != self.field}
        return replace(sample, fields={**shared, **own})
