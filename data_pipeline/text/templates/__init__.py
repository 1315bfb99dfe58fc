"""Convert samples to pieces: text to read, text to learn, and images, in order.

    caption       images, prompt (read), answer (learned)
    interleaved   parts as stored, all text learned
    text          text only, all of it learned
    dialogue      turns of roles, the answers learned
    annotations   images once, then a branch of prompt and answer for each annotation
    drawing       text and one image as tokens, both learned, in either order
    preference    images and prompt once, then a branch for the chosen and one for the rejected answer

``packing/document_builder.py`` converts pieces to token ids.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from data_pipeline.io.own_code import OwnKinds
from data_pipeline.text.templates.annotations import AnnotationsTemplate
from data_pipeline.text.templates.base import (
    BranchPiece,
    DrawnPiece,
    EndPiece,
    LearnedText,
    OpeningPiece,
    Piece,
    TextPiece,
    TokenPiece,
)
from data_pipeline.text.templates.caption import CaptionTemplate
from data_pipeline.text.templates.dialogue import LITERAL, DialogueTemplate, Role
from data_pipeline.text.templates.drawing import DrawingTemplate
from data_pipeline.text.templates.preference import PreferenceTemplate
from data_pipeline.text.templates.stored import InterleavedTemplate, TextTemplate

__all__ = [
    "LITERAL",
    "AnnotationsTemplate",
    "BranchPiece",
    "CaptionTemplate",
    "DialogueTemplate",
    "DrawingTemplate",
    "DrawnPiece",
    "EndPiece",
    "InterleavedTemplate",
    "OpeningPiece",
    "Piece",
    "PreferenceTemplate",
    "Role",
    "TemplateConfig",
    "TextPiece",
    "TextTemplate",
    "TokenPiece",
]

TemplateConfig = Annotated[
    CaptionTemplate
    | InterleavedTemplate
    | TextTemplate
    | DialogueTemplate
    | AnnotationsTemplate
    | DrawingTemplate
    | PreferenceTemplate,
    Field(discriminator="kind"),
    OwnKinds(LearnedText, "mmscale.templates"),
]
"""A template; ``kind`` selects its type. A new template needs one file here and one entry in this list."""
