"""Whisper's encoder over packed clips equals the encoders of transformers, one padded clip at a time.

Distances are relative to the largest value. Measured worst cases: features 5e-7, gradients 2e-6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmscale.models.audio_tower import WhisperConfig
from mmscale.nn.audio_embed import sinusoids
from mmscale.nn.init import fixed_parameters, initialise_
from tests.models.audio import (
    DIM,
    MAX_FRAMES,
    NAMES,
    SIZES,
    audio_block,
    clip,
    encode_masked,
    padded,
    tower,
    tower_config,
    with_silence,
)
from tests.models.reference_models import copy_weights, distance, gradient_distance, randomise, rounding_ratio
from tests.parity_table import Recorder

BOUND, GRADIENT_BOUND = 2e-6, 8e-6
LENGTHS = [7, MAX_FRAMES, 1, 38, 39, 12]


def whisper() -> Any:
    from transformers import WhisperConfig as Config
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperEncoder(Config(vocab_size=9, **ids, **SIZES))


def qwen2_audio() -> Any:
    from transformers import Qwen2AudioEncoder, Qwen2AudioEncoderConfig

    return Qwen2AudioEncoder(Qwen2AudioEncoderConfig(**SIZES))


def omni() -> Any:
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
        Qwen2_5OmniAudioEncoder,
        Qwen2_5OmniAudioEncoderConfig,
    )

    return Qwen2_5OmniAudioEncoder(Qwen2_5OmniAudioEncoderConfig(n_window=5, output_dim=DIM, **SIZES))


def encode_blocks(theirs: Any, frames: Tensor) -> Tensor:
    """Return the features before the projection, which has the identity as its weight."""
    lengths = torch.tensor([len(frames)])
    rows = (lengths - 1) // 2 + 1
    return theirs(frames.t(), feature_lens=lengths, aftercnn_lens=rows).last_hidden_state


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], Callable[[Tensor], Tensor], Callable[..., Tensor]]] = {
    "whisper": (
        whisper,
        {},
        lambda frames: padded(frames)[0].t(),
        lambda theirs, frames: theirs(padded(frames)).last_hidden_state[0],
    ),
    "qwen2_audio_encoder": (qwen2_audio, {"padded": False, "pool": 2}, with_silence, encode_masked),
    "qwen2_5_omni_audio_encoder": (
        omni,
        {"padded": False, "pool": 2, "block_frames": 10},
        lambda frames: frames,
        encode_blocks,
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_packed_clips_equal_padded_ones(name: str, parity: Recorder) -> None:
    make, changes, item, encode = CASES[name]
    theirs, ours = make().eval(), tower(**changes)
    randomise(theirs)
    if name == "qwen2_5_omni_audio_encoder":
        with torch.no_grad():
            theirs.proj.weight.copy_(torch.eye(DIM))
            theirs.proj.bias.zero_()
        assert ours.positions.weight is None  # The sinusoids of blocks are computed.
    source = copy_weights(ours, theirs, NAMES)
    clips = [clip(length, seed) for seed, length in enumerate(LENGTHS)]
    found = ours(audio_block([item(each) for each in clips]))
    expected = torch.cat([encode(theirs, each) for each in clips if name == "whisper" or len(each) > 2])
    parity(name, "features", distance(found, expected), BOUND)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)) / 8
    found.backward(upstream)
    expected.backward(upstream)
    source.pop("positions.weight", None)  # Frozen in both.
    assert ours.positions.weight is None or ours.positions.weight.grad is None
    parity(name, "gradients", gradient_distance(ours, source), GRADIENT_BOUND)


@pytest.mark.parity
def test_in_bfloat16_no_farther_from_the_truth(parity: Recorder) -> None:
    """Measured: 1.00."""

    @torch.no_grad()
    def one(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        theirs, ours = qwen2_audio().eval(), tower(padded=False, pool=2)
        randomise(theirs, seed)
        copy_weights(ours, theirs.bfloat16(), NAMES)
        clips = [clip(length, seed) for length in LENGTHS if length > 2]
        block = audio_block([with_silence(each) for each in clips])

        def encoded(model: Any) -> Tensor:
            dtype = model.conv1.weight.dtype
            return torch.cat([encode_masked(model, each.to(dtype)) for each in clips])

        return ours.bfloat16()(block), encoded(theirs), encoded(theirs.float())

    parity("qwen2_audio_encoder", "error of bfloat16, over theirs", rounding_ratio(map(one, range(4))), 1.05)


def test_parameters_of_large_v3_are_those_published() -> None:
    config = tower_config(
        num_bins=128,
        max_frames=3000,
        hidden_dim=1280,
        num_layers=32,
        attention={"num_heads": 20, "qkv_bias": True, "key_bias": False, "out_bias": True},
        mlp={"hidden_dim": 5120, "gated": False, "activation": "gelu", "bias": True},
    )
    with torch.device("meta"):
        built = config.build("sdpa")
    assert sum(parameter.numel() for parameter in built.parameters()) == 636_968_960


def test_sinusoids_are_those_of_transformers_and_no_stage_trains_them() -> None:
    ours = tower()
    initialise_(ours, seed=3)
    torch.testing.assert_close(ours.positions.weight, whisper().embed_positions.weight)
    assert torch.equal(ours.positions.weight, sinusoids(MAX_FRAMES // 2, DIM))
    assert fixed_parameters(ours) == {id(ours.positions.weight)}


def test_a_clip_does_not_change_its_neighbours() -> None:
    ours = tower(padded=False, pool=2)
    clips = [with_silence(clip(length, length)) for length in LENGTHS]
    loud = [each * 100 if number % 2 else each for number, each in enumerate(clips)]
    with torch.no_grad():
        quiet, changed = (
            ours(audio_block(each)).split([config_rows(ours.config, len(item)) for item in each])
            for each in (clips, loud)
        )
    for before, after in list(zip(quiet, changed, strict=True))[::2]:
        torch.testing.assert_close(before, after)


def config_rows(config: WhisperConfig, frames: int) -> int:
    return config.feature_grid((frames, 1, 1))[0]


@pytest.mark.parametrize("changes", [{}, {"padded": False, "pool": 2}, {"padded": False, "block_frames": 10}])
def test_operations_equal_the_counter(changes: dict[str, Any]) -> None:
    ours = tower(**changes)
    extra = ours.config.extra_frames
    # Attention pads short segments of unequal lengths, which the counter counts and the model's operations do not.
    lengths = [MAX_FRAMES] * 2 if ours.config.padded else [20 + extra, 20 + extra]
    block = audio_block([clip(length) for length in lengths])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        ours(block).sum().backward()
    counts: dict[str, int] = {}
    for grid in block.grids:
        for name, value in ours.config.counts(grid).items():
            counts[name] = counts.get(name, 0) + value
    products = ours.config.products(learns=True)
    total = sum(counts[each.per] * (each.forward + each.backward) for each in products)
    assert total == counter.get_total_flops()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_frames": 41}, "max_frames=41"),
        ({"block_frames": 10}, "set padded=false"),
        ({"hidden_dim": 14, "attention": {"num_heads": 4, "qkv_bias": True}}, "must divide the width 14"),
        ({"attention": {"num_heads": 2, "key_bias": False}}, "without qkv_bias"),
    ],
)
def test_impossible_towers_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tower_config(**changes)
