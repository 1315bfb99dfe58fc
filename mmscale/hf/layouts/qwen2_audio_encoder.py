"""Qwen2-Audio's encoder alone: Whisper's, with the silence after a clip masked and the mean of pairs of rows."""

from __future__ import annotations

from typing import Any

from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout
from mmscale.hf.layouts import whisper
from mmscale.models.config import AudioTowerConfig

NATIVE = {"padded": False, "pool": 2}
"""Fields of the tower that the family fixes."""


def to_tower(keys: Keys) -> dict[str, Any]:
    """Return the configuration of the tower."""
    return whisper.to_tower(keys, **NATIVE)


def _to_model(keys: Keys) -> AudioTowerConfig:
    tower = to_tower(keys)
    whisper.check_extractor(keys, tower)
    return AudioTowerConfig.model_validate({"audio": {"tower": tower}})


LAYOUT = FamilyLayout(
    "qwen2_audio_encoder",
    "Qwen2AudioEncoder",
    lambda config: whisper.encoder_rules(config.audio.tower),
    _to_model,
    lambda config: whisper.encoder_keys(config.audio.tower),
    kind=AudioTowerConfig,
    auto_class="AutoModel",
)
