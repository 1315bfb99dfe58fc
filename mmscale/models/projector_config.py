"""The kinds of projectors. To add a kind, add a file in ``connectors/`` and a name in the union below."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from data_pipeline.io.own_code import OwnKinds
from mmscale.models.connectors.attention_pool import AttentionPoolConfig
from mmscale.models.connectors.c_abstractor import CAbstractorConfig
from mmscale.models.connectors.projector import LinearProjectorConfig, MlpProjectorConfig, ProjectorBase
from mmscale.models.connectors.resampler import ResamplerConfig
from mmscale.models.connectors.square_pool import ConvPoolConfig, MeanPoolConfig
from mmscale.nn.flops import Product, attention_product, linear_product

ProjectorConfig = Annotated[
    LinearProjectorConfig
    | MlpProjectorConfig
    | AttentionPoolConfig
    | CAbstractorConfig
    | ConvPoolConfig
    | MeanPoolConfig
    | ResamplerConfig,
    Field(discriminator="kind"),
    OwnKinds(ProjectorBase, "mmscale.projectors"),
]


def check_projector(projector: ProjectorBase, fixed_grid: tuple[int, int] | None) -> None:
    """Raise ``ValueError`` if the projector does not fit a tower whose crops have this grid (None: any grid)."""
    if any(side % projector.merge for side in fixed_grid or ()):
        raise ValueError(
            f"connector.projector.merge={projector.merge}: must divide both sides of vision.positions.grid"
        )
    projector.check(fixed_grid)


def typical_crop(projector: ProjectorBase, fixed_grid: tuple[int, int] | None) -> tuple[int, int]:
    """Return the numbers of patches and features of a typical crop, for estimates of the cost per patch.

    A projector that merges squares has the same ratio for every crop; the result is one square and one feature. With a
    projector that pools each crop to ``pooled_side**2`` features, the crop has the tower's fixed grid. Without a fixed
    grid, the estimate assumes a crop with one patch per feature. Larger crops then cost less per patch. With learned
    queries, the crop is the largest square. A projector that pools squares has a crop of the fixed grid, or one square.
    """
    if projector.query_sizes:
        largest, features = projector.query_sizes[-1]
        return largest**2, features
    if (pooling := projector.pooling) is not None:
        height, width = fixed_grid or (pooling.side, pooling.side)
        return height * width, math.prod(pooling.features(height, width))
    side = projector.pooled_side
    if side is None:
        return projector.merge**2, 1
    return (math.prod(fixed_grid) if fixed_grid else side**2), side**2


def projector_products(
    projector: ProjectorBase, feature_dim: int, dim: int, *, learns: bool, tower_learns: bool, learns_before: bool
) -> list[Product]:
    """Return the operations of a projector.

    Args:
        projector: Its configuration.
        feature_dim: Channels of the tower's features.
        dim: Width of the decoder.
        learns: Whether the connector is trained.
        tower_learns: Whether the tower is trained.
        learns_before: Whether the connector has parameters before the projector.
    """
    flows = learns or tower_learns
    enters = tower_learns or (learns and (learns_before or projector.learns_first))
    found = []
    for each in projector.work(feature_dim, dim):
        if each.attends:
            gradients = 4 * flows - (each.learned_queries and flows and not learns)
            found.append(attention_product(each.per, each.flops, gradients=gradients))
        elif each.learned_queries:
            found.append(linear_product(each.per, each.flops, weights=learns, inputs=learns))
        else:
            found.append(linear_product(each.per, each.flops, weights=learns, inputs=enters))
            enters = flows
    return found
