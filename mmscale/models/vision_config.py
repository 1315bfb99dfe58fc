"""The kinds of vision towers. To add a kind, add a file in this folder and a name in the union below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from mmscale.models.patches import PatchesConfig
from mmscale.models.tiles import TilesConfig
from mmscale.models.vision import VisionConfig

__all__ = ["AnyVisionConfig", "PatchesConfig", "TilesConfig", "VisionConfig"]


def _vision_kind(value: Any) -> Any:
    """Return the kind of a vision block; without ``kind`` it is ``transformer``."""
    if isinstance(value, Mapping):
        return value.get("kind", "transformer")
    return getattr(value, "kind", None)


AnyVisionConfig = Annotated[
    Annotated[VisionConfig, Tag("transformer")] | Annotated[PatchesConfig, Tag("patches")],
    Discriminator(_vision_kind),
]
