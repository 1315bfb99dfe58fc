"""The images of a family: how they are cut into crops, and the tokens around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmscale.models.config import AnyModelConfig


@dataclass(frozen=True)
class ImageSource:
    """The files that describe the images and sounds of a folder.

    Attributes:
        config: Our configuration of the model.
        values: As ``read_config`` returns them, with the image processor under ``preprocessor_config``.
        processor: As ``read_processor`` returns it; empty for a folder without these files.
        where: File, for messages.
    """

    config: AnyModelConfig
    values: Mapping[str, Any]
    processor: Mapping[str, Any]
    where: str

    def name(self, key: str, default: str) -> str:
        """Return the name of a token in ``processor_config.json``."""
        found = self.processor.get(key)
        return found if isinstance(found, str) else default


@dataclass(frozen=True)
class ImageInput:
    """The images of a model.

    Attributes:
        transforms: Values of ``data.transforms``.
        tokens: Possible names of the placeholder of a feature. The first that the vocabulary has is used, unless
            ``config.json`` names an id.
        before: Text that a chat template writes before the placeholder of an image.
        after: Text that a chat template writes after it.
        template: Template of a folder without a chat template; None for ``interleaved``.
        begin: Whether documents begin with the begin token; None if the tokenizer decides.
        video_mark: Text that a chat template writes for a video; empty for ``start``, ``placeholder`` and ``end`` of
            ``video``, or if chat templates write none and ``video`` has no ``placeholder``.
        video: Values of ``data.video``; None for a model whose videos are not known here. Used if
            the vocabulary has its tokens.
        notes: A sentence for each difference from the folder's processor.
    """

    transforms: dict[str, Any]
    tokens: tuple[str, ...] = ()
    before: str = ""
    after: str = ""
    template: dict[str, Any] | None = None
    begin: bool | None = None
    video: dict[str, Any] | None = None
    video_mark: str = ""
    notes: tuple[str, ...] = ()
