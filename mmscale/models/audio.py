"""The modality audio: the kinds of towers and projectors. To add a kind, add a file and a name in a union below."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import nn

from data_pipeline.media_spec import AudioSpec
from mmscale.models.audio_kind import FramesConfig
from mmscale.models.audio_tower import WhisperConfig
from mmscale.models.connectors.conv_gmlp import ConvGmlpProjectorConfig
from mmscale.models.connectors.projector import LinearProjectorConfig, MlpProjectorConfig
from mmscale.models.modality import ModalityBase, ModalityTower
from mmscale.nn.attention_backends import Backend


class AudioModalityConfig(ModalityBase):
    """How the model hears: an audio tower, and a projector to the decoder's width."""

    tower: Annotated[WhisperConfig | FramesConfig, Field(discriminator="kind")]
    """The audio tower: ``kind: whisper``, or ``kind: frames`` to pass groups of mel frames to the projector."""
    projector: Annotated[
        LinearProjectorConfig | MlpProjectorConfig | ConvGmlpProjectorConfig, Field(discriminator="kind")
    ] = MlpProjectorConfig()
    """From the tower's rows to the decoder's width."""
    idle_rows: int = Field(default=0, ge=0, le=1 << 10)
    """Rows of the decoder's width beside the projector that nothing reads, 0 to 1024. They exist because published
    weights contain them (Qwen2.5-Omni: 2). No stage trains them."""

    @model_validator(mode="after")
    def _merges_no_squares(self) -> AudioModalityConfig:
        if self.projector.merge != 1:
            raise ValueError(f"audio.projector.merge={self.projector.merge}: sound has no squares of patches; use 1")
        return self

    def build(self, backend: Backend, dim: int) -> tuple[ModalityTower, nn.Module]:
        tower, projector = super().build(backend, dim)
        if self.idle_rows:
            projector.idle = _IdleRows(self.idle_rows, dim)
        return tower, projector

    def spec(self, cost_per_patch: float) -> AudioSpec:
        needs = self.tower.media_needs()
        reductions = needs.pop("reductions") + self.projector.reductions
        return AudioSpec(**needs, reductions=reductions, cost_per_frame=cost_per_patch)


class _IdleRows(nn.Module):
    """A table that checkpoints contain and no module reads."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, dim), requires_grad=False)
        self.fixed_init = {"weight": torch.zeros}
