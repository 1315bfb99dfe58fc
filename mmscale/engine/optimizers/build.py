"""Build the optimizer of a stage."""

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
from mmscale.optim.schedule import ClippingMixin, can_fuse
from mmscale.optim.stages import StageConfig


@runtime_checkable
class ShardAwareOptimizer(Protocol):
    """An optimizer that must know which parameters the flat tensors consist of."""

    def attach(self, masters: Sequence[FlatMaster], world: World) -> None:
        """Set the flat tensors. All ranks must call, once, after ZeRO has created them."""
        ...


class ClippedAdamW(ClippingMixin, torch.optim.AdamW):  # type: ignore[misc]
    """AdamW that clips, for stage 0 in fp32, where DeepSpeed does not."""


class ClippedAdamW8(ClippingMixin, AdamW8):  # type: ignore[misc]
    """AdamW with moments in 8 bits that clips, for stage 0 in fp32."""


class ClippedAdafactor(ClippingMixin, Adafactor):  # type: ignore[misc]
    """Adafactor that clips, for stage 0 in fp32."""


class ClippedMuon(ClippingMixin, Muon):  # type: ignore[misc]
    """Muon that clips, for stage 0 in fp32."""


def build_optimizer(groups: list[dict[str, Any]], stage: StageConfig, *, clip_here: bool) -> torch.optim.Optimizer:
    """Build the optimizer of ``stage``.

    Args:
        groups: From ``mmscale.optim.schedule.parameter_groups``.
        stage: Kind, rates and clipping norm.
        clip_here: Whether ``step`` clips and checks for non-finite gradients. If not, DeepSpeed does both.

    Raises:
        UnsupportedError: this torch has no Muon.
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
    if isinstance(optimizer, ClippingMixin):
        optimizer.clip = stage.whole_clip
    return optimizer
