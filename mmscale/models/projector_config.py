"""The kinds of projectors. A new kind is one file beside ``connectors/projector.py`` and one name in this list."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from mmscale.models.connectors.attention_pool import AttentionPoolConfig
from mmscale.models.connectors.c_abstractor import CAbstractorConfig
from mmscale.models.connectors.projector import LinearProjectorConfig, MlpProjectorConfig
from mmscale.nn.flops import Product, attention_of, linear

ProjectorConfig = Annotated[
    LinearProjectorConfig | MlpProjectorConfig | AttentionPoolConfig | CAbstractorConfig, Field(discriminator="kind")
]


def check_projector(projector: ProjectorConfig, fixed_grid: tuple[int, int] | None) -> None:
    """Raise ``ValueError`` if the projector cannot follow a tower whose views have this grid (None: any)."""
    if any(side % projector.merge for side in fixed_grid or ()):
        raise ValueError(
            f"connector.projector.merge={projector.merge}: must divide both sides of vision.positions.grid"
        )
    projector.check(fixed_grid)


def typical_view(projector: ProjectorConfig, fixed_grid: tuple[int, int] | None) -> tuple[int, int]:
    """Patches and features of a view of the tower's one size, or else of the smallest that the projector takes.

    The cost of a projector that pools views of any size is therefore its highest.
    """
    side = projector.pooled_side
    if side is None:
        return projector.merge**2, 1
    return (math.prod(fixed_grid) if fixed_grid else side**2), side**2


def projector_products(
    projector: ProjectorConfig, feature_dim: int, dim: int, *, learns: bool, tower_learns: bool, learns_before: bool
) -> list[Product]:
    """Operations of a projector.

    Args:
        projector: Its configuration.
        feature_dim: Channels of the tower's features.
        dim: Width of the decoder.
        learns: Whether the connector learns.
        tower_learns: Whether the tower does.
        learns_before: Whether the connector has parameters before the projector.
    """
    flows = learns or tower_learns
    enters = tower_learns or (learns and (learns_before or projector.learns_first))
    found = []
    for each in projector.work(feature_dim, dim):
        if each.attends:
            found.append(attention_of(each.per, each.flops, gradients=4 * flows))
        else:
            found.append(linear(each.per, each.flops, weights=learns, inputs=enters))
            enters = flows
    return found
