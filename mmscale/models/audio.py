"""The modality audio: the kinds of towers and projectors. To add a kind, add a file and a name in a union below."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from data_pipeline.media_spec import AudioSpec
from mmscale.models.audio_kind import FramesConfig
from mmscale.models.audio_tower import WhisperConfig
from mmscale.models.connectors.conv_gmlp import ConvGmlpProjectorConfig
from mmscale.models.connectors.projector import LinearProjectorConfig, MlpProjectorConfig
from mmscale.models.modality import ModalityBase


class AudioModalityConfig(ModalityBase):
    """How the model hears: an audio tower, and a projector to the decoder's width."""

    tower: Annotated[WhisperConfig | FramesConfig, Field(discriminator="kind")]
    """The audio tower: ``kind: whisper``, or ``kind: frames`` to pass groups of mel frames to the projector."""
    projector: Annotated[
        LinearProjectorConfig | MlpProjectorConfig | ConvGmlpProjectorConfig, Field(discriminator="kind")
    ] = MlpProjectorConfig()
    """From the tower's rows to the decoder's width."""

    @model_validator(mode="after")
    def _merges_no_squares(self) -> AudioModalityConfig:
        if self.projector.merge != 1:
            raise ValueError(f"audio.projector.merge={self.projector.merge}: sound has no squares of patches; use 1")
        return self

    def spec(self, cost_per_patch: float) -> AudioSpec:
        needs = self.tower.media_needs()
        reductions = needs.pop("reductions") + self.projector.reductions
        return AudioSpec(**needs, reductions=reductions, cost_per_frame=cost_per_patch)
