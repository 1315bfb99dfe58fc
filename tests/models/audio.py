"""Tiny audio towers of transformers and of ours with the same weights, and packed log-mel frames for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.batch import MediaBlock, Segments
from mmscale.models.audio_tower import WhisperConfig, WhisperTower
from tests.models.reference_models import randomise

BINS, MAX_FRAMES, DIM = 6, 40, 16
SIZES: dict[str, Any] = {
    "num_mel_bins": BINS,
    "d_model": DIM,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "max_source_positions": MAX_FRAMES // 2,
}
NAMES = [
    (r"conv(\d)\.", r"embed.conv\1."),
    (r"embed_positions\.", "positions."),
    (r"(layers\.\d+)\.self_attn\.out_proj\.", r"\1.self_attn.o_proj."),
    (r"(layers\.\d+)\.self_attn_layer_norm\.", r"\1.input_layernorm."),
    (r"(layers\.\d+)\.final_layer_norm\.", r"\1.post_attention_layernorm."),
    (r"(layers\.\d+)\.fc1\.", r"\1.mlp.up_proj."),
    (r"(layers\.\d+)\.fc2\.", r"\1.mlp.down_proj."),
    (r"(layers\.\d+)\.", r"\1."),
    (r"(layer_norm|ln_post)\.", "post_norm."),
]
"""From the names of transformers to those of our tower."""


def tower_config(**changes: Any) -> WhisperConfig:
    """Return the configuration of the tower with ``SIZES``."""
    block = {
        "kind": "whisper",
        "num_bins": BINS,
        "max_frames": MAX_FRAMES,
        "hidden_dim": DIM,
        "num_layers": 2,
        "attention": {"num_heads": 2, "qkv_bias": True, "key_bias": False, "out_bias": True},
        "mlp": {"hidden_dim": 24, "gated": False, "activation": "gelu", "bias": True},
    }
    return WhisperConfig.model_validate({**block, **changes})


def tower(**changes: Any) -> WhisperTower:
    """Return a tower whose values, sinusoids included, are random."""
    built = tower_config(**changes).build("sdpa")
    randomise(built)
    return built


def clip(frames: int, seed: int = 0) -> Tensor:
    """Return random log-mel frames, ``(frames, BINS)``."""
    return torch.randn(frames, BINS, generator=torch.Generator().manual_seed(seed))


def audio_block(clips: list[Tensor]) -> MediaBlock:
    """Return the media block of packed items without token slots."""
    lengths = [len(each) for each in clips]
    none, empty = torch.empty(0, dtype=torch.int64), Segments.from_lengths([])
    grids = tuple((length, 1, 1) for length in lengths)
    grid = torch.tensor(grids, dtype=torch.int32).view(-1, 3)
    return MediaBlock(torch.cat(clips), grid, grids, Segments.from_lengths(lengths), none, none, none, empty, empty)


def padded(frames: Tensor, length: int = MAX_FRAMES) -> Tensor:
    """Return the frames and silence after them, ``(1, BINS, length)``, as encoders of transformers take them."""
    silence = torch.full((length - len(frames), frames.shape[1]), -0.75)
    return torch.cat([frames, silence]).t()[None]


def with_silence(frames: Tensor, extra: int = 2) -> Tensor:
    """Return the rows of an item of native length: ``extra`` frames after the clip, zeros beyond the chunk."""
    chunk = padded(frames)[0].t()
    return torch.cat([chunk, torch.zeros(extra, frames.shape[1])])[: len(frames) + extra]


def encode_masked(theirs: nn.Module, frames: Tensor) -> Tensor:
    """Return the features of Qwen2-Audio's encoder of one clip, with the keys of the silence masked."""
    rows = (len(frames) - 1) // 2 + 1
    mask = torch.zeros(1, 1, MAX_FRAMES // 2, MAX_FRAMES // 2)
    mask[..., rows:] = torch.finfo(torch.float32).min
    features = theirs(padded(frames), attention_mask=mask).last_hidden_state[0]
    return features[: (rows - 2) // 2 + 1]
