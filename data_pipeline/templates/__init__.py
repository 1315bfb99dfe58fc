"""Sample to pieces: which text is read, which is learned, where the images stand.

    caption       images, prompt (read), answer (learned)
    interleaved   parts as stored, all text learned
    text          text only, all of it learned
    annotations   images once, then a branch of prompt and answer for each annotation

Not for: token ids (``documents``).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from data_pipeline.templates.annotations import AnnotationsTemplate
from data_pipeline.templates.caption import CaptionTemplate
from data_pipeline.templates.pieces import BranchPiece, EndPiece, Piece, TextPiece
from data_pipeline.templates.stored import InterleavedTemplate, TextTemplate

__all__ = [
    "AnnotationsTemplate",
    "BranchPiece",
    "CaptionTemplate",
    "EndPiece",
    "InterleavedTemplate",
    "Piece",
    "TemplateConfig",
    "TextPiece",
    "TextTemplate",
]

TemplateConfig = Annotated[
    CaptionTemplate | InterleavedTemplate | TextTemplate | AnnotationsTemplate, Field(discriminator="kind")
]
"""Which template; ``kind`` picks the member."""
