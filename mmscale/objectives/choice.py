"""Selects the objective of a stage. To add one, add a file here, a setting of the stage, and a case below.

Another package adds one without a change here: ``mmscale.objectives.base``.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmscale.models.config import ModelConfig, TokenizerConfig
from mmscale.models.connector_config import ContrastiveConnectorConfig
from mmscale.objectives.base import ObjectiveBase, WorldInfo
from mmscale.objectives.contrastive import Contrastive
from mmscale.objectives.next_token import NextToken
from mmscale.objectives.perceptual import PerceptualTower
from mmscale.objectives.preference import Preference
from mmscale.objectives.reconstruction import Reconstruct, ReconstructionConfig
from mmscale.objectives.teacher import Teacher
from mmscale.optim.stages import StageConfig

Objective = NextToken | Contrastive | Reconstruct | ObjectiveBase


def choose_objective(
    model: ModelConfig | TokenizerConfig,
    stage: StageConfig,
    world: WorldInfo,
    teachers: Sequence[Teacher] | Sequence[PerceptualTower],
) -> Objective:
    """Return the objective of a stage.

    Args:
        model: Configuration of the model that is trained.
        stage: Settings of the loss.
        world: The ranks that share a step; used by a contrastive loss and by the losses of routers.
        teachers: Frozen models for distillation, the reference of preference optimisation, or the tower of a perceptual
            loss.
    """
    if stage.objective is not None:
        return stage.objective
    if isinstance(model, TokenizerConfig):
        towers = [each for each in teachers if isinstance(each, PerceptualTower)]
        return Reconstruct(stage.reconstruction or ReconstructionConfig(), model, towers)
    if isinstance(model.connector, ContrastiveConnectorConfig):
        return Contrastive(model.connector, world)
    teachers = [each for each in teachers if isinstance(each, Teacher)]
    if stage.preference is not None:
        return Preference(stage.preference, teachers, world)
    return NextToken(stage.z_loss, teachers, world)
