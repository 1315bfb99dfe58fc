"""Types of the numbers that decide how much memory a model takes, each with an upper bound.

A configuration may come from a stranger, as a ``config.json``. Without bounds a billion layers would be built one by
one, and a width of 10**18 would overflow the product of a shape. The bounds are far above every published model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field


@dataclass(frozen=True)
class ShrunkTo:
    """Metadata of a field: its largest value in the tiny copy of a model that ``mmscale/shrink`` makes."""

    most: int


Width = Annotated[int, Field(gt=0, le=1 << 20)]
"""Channels; published models have up to 53,248."""
Heads = Annotated[int, Field(gt=0, le=1 << 14)]
"""Heads of an attention, or channels of one."""
Layers = Annotated[int, Field(gt=0, le=1 << 12)]
"""Blocks one after the other; published models have up to 126."""
Vocabulary = Annotated[int, Field(gt=0, le=1 << 24)]
"""Rows of a table of vectors; published models have up to 262,144."""
NumExperts = Annotated[int, Field(gt=0, le=1 << 14)]
"""Experts of a layer; published models have up to 512."""
Side = Annotated[int, Field(gt=0, le=1 << 12)]
"""Side of a square: pixels of a patch, patches of a grid, patches that are merged."""
MOST_TILES = 64
"""Tiles of an image; published models have up to 12. Whoever lists their grids checks this bound first."""
Channels = Annotated[int, Field(gt=0, le=64)]
"""Colours of a pixel, or frames of a patch."""
Epsilon = Annotated[float, Field(ge=0, le=1)]
"""Added to a variance before its root is divided by."""
