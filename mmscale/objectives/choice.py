"""Which objective a stage trains by. A new objective is one file here, a setting of the stage, and one case below."""

from __future__ import annotations

from collections.abc import Sequence

from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import ContrastiveConnectorConfig
from mmscale.objectives.contrastive import Contrastive, Gather, Place
from mmscale.objectives.next_token import NextToken
from mmscale.objectives.teacher import Teacher
from mmscale.optim.stages import StageConfig

Objective = NextToken | Contrastive


def choose_objective(
    model: ModelConfig, stage: StageConfig, place: Place, gather: Gather, teachers: Sequence[Teacher]
) -> Objective:
    """Return the objective of a stage.

    Args:
        model: The model that trains.
        stage: Settings of its loss.
        place: This rank.
        gather: From rows of this rank to those of all ranks, for losses that compare all samples of a step.
        teachers: Frozen models whose predictions take a share of a next-token loss.
    """
    if isinstance(model.connector, ContrastiveConnectorConfig):
        return Contrastive(model.connector, place, gather)
    return NextToken(stage.z_loss, teachers)
