"""The optimizer of a stage: the only switch over kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from mmscale.dist import World
from mmscale.engine.optimizers.adafactor import Adafactor
from mmscale.engine.optimizers.adamw8 import AdamW8
from mmscale.engine.optimizers.eight_bit import BITS
from mmscale.engine.optimizers.muon import Muon
from mmscale.engine.optimizers.shards import FlatMaster
from mmscale.optim.config import AdafactorConfig, MuonConfig
from mmscale.optim.schedule import Clips, can_fuse
from mmscale.optim.stages import StageConfig


@runtime_checkable
class KnowsShards(Protocol):
    """An optimizer that must know what the flat tensors are made of."""

    def attach(self, masters: Sequence[FlatMaster], world: World) -> None:
        """All ranks must call, once, after ZeRO has made the flat tensors."""
        ...


class ClippedAdamW(Clips, torch.optim.AdamW):  # type: ignore[misc]
    """AdamW where nobody else clips."""


class ClippedAdamW8(Clips, AdamW8):  # type: ignore[misc]
    """AdamW with moments in 8 bits where nobody else clips."""


class ClippedAdafactor(Clips, Adafactor):  # type: ignore[misc]
    """Adafactor where nobody else clips."""


class ClippedMuon(Clips, Muon):  # type: ignore[misc]
    """Muon where nobody else clips."""


def build_optimizer(groups: list[dict[str, Any]], stage: StageConfig, *, clip_here: bool) -> torch.optim.Optimizer:
    """The optimizer that ``stage`` asks for.

    Args:
        groups: From ``mmscale.optim.schedule.parameter_groups``.
        stage: Kind, rates and clipping norm.
        clip_here: Clip and check for non-finite gradients in ``step``; else DeepSpeed does.

    Raises:
        UnsupportedError: a library that it needs is missing or too old.
    """
    config = stage.optimizer
    optimizer: torch.optim.Optimizer
    if isinstance(config, MuonConfig):
        optimizer = (ClippedMuon if clip_here else Muon)(groups, config)
    elif isinstance(config, AdafactorConfig):
        optimizer = (ClippedAdafactor if clip_here else Adafactor)(groups, config)
    elif config.state_bits == BITS:
        optimizer = (ClippedAdamW8 if clip_here else AdamW8)(groups, config)
    else:
        adamw = ClippedAdamW if clip_here else torch.optim.AdamW
        optimizer = adamw(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=can_fuse(groups))
    if isinstance(optimizer, Clips):
        optimizer.clip = stage.whole_clip
    return optimizer
