"""Bounded integer types for the configuration fields that determine a model's size.

A configuration may come from an untrusted ``config.json``. Without upper bounds, a billion layers would be built one by
one, and a width of 10**18 would overflow the size of a tensor. The bounds are far above the published models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field


@dataclass(frozen=True)
class ShrunkTo:
    """Metadata of a field: its largest value in the smoke-test model that ``mmscale/shrink`` makes.

    Attributes:
        most: The value.
        counts_blocks: Whether the field counts blocks, so that a model of the same depth keeps it.
    """

    most: int
    counts_blocks: bool = False


Width = Annotated[int, Field(gt=0, le=1 << 20)]
"""Channels; published models have up to 53,248."""
Heads = Annotated[int, Field(gt=0, le=1 << 14)]
"""Number of attention heads, or channels of one head."""
Layers = Annotated[int, Field(gt=0, le=1 << 12)]
"""Number of consecutive blocks; published models have up to 126."""
Vocabulary = Annotated[int, Field(gt=0, le=1 << 24)]
"""Rows of an embedding table; published models have up to 262,144."""
NumExperts = Annotated[int, Field(gt=0, le=1 << 14)]
"""Experts in a layer; published models have up to 512."""
Side = Annotated[int, Field(gt=0, le=1 << 12)]
"""Side length: pixels of a patch, patches of a grid, or patches of a merged square."""
MAX_TILES = 64
"""Most tiles of an image; published models have up to 12. ``tile_grids`` checks this bound."""
Channels = Annotated[int, Field(gt=0, le=64)]
"""Colour channels of a pixel, or frames of a patch."""
Epsilon = Annotated[float, Field(ge=0, le=1)]
"""Added to a variance or a mean square before the square root."""
