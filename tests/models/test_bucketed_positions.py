"""Bucketed positions: equal to the towers of Idefics3 and SmolVLM in transformers, which mask the padding of crops.

Distances are the largest difference over the largest value. Measured worst cases: features 2.7e-7, gradients 3.4e-6.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mmscale.models.vision_config import VisionConfig
from mmscale.nn.init import initialise_
from mmscale.nn.patch_embed import buckets
from tests.models.reference_models import copy_weights, distance, gradient_distance, randomise
from tests.models.test_parity import vision_media
from tests.parity_table import Recorder

BOUND, GRADIENT_BOUND = 2e-6, 8e-6
SIDE, PATCH = 6, 4
GRIDS = [(6, 6), (1, 6), (4, 2), (3, 5), (6, 1)]
TOWER: dict[str, Any] = {
    "patch_size": PATCH,
    "hidden_dim": 24,
    "num_layers": 2,
    "attention": {"num_heads": 3, "qkv_bias": True, "out_bias": True},
    "mlp": {"kind": "dense", "hidden_dim": 40, "gated": False, "activation": "gelu_tanh", "bias": True},
    "norm": {"kind": "layernorm", "eps": 1e-6},
    "positions": {"kind": "bucketed", "grid": [SIDE, SIDE]},
    "patch_bias": True,
}
NAMES = [
    (r"embeddings\.patch_embedding\.", "patch_embed.projection."),
    (r"embeddings\.position_embedding\.weight", "positions.position_embedding"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"layers.\1.self_attn.o_proj."),
    (r"encoder\.layers\.(\d+)\.layer_norm1\.", r"layers.\1.input_layernorm."),
    (r"encoder\.layers\.(\d+)\.layer_norm2\.", r"layers.\1.post_attention_layernorm."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.", r"layers.\1.mlp.up_proj."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.", r"layers.\1.mlp.down_proj."),
    (r"encoder\.layers\.", "layers."),
    (r"post_layernorm\.", "post_norm."),
]


def reference_model(family: str, side: int = SIDE) -> Any:
    import transformers

    config = getattr(transformers, f"{family}VisionConfig")(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=side * PATCH,
        patch_size=PATCH,
    )
    model = getattr(transformers, f"{family}VisionTransformer")(config)
    randomise(model)
    return model.eval()


@pytest.mark.parity
@pytest.mark.parametrize("family", ["Idefics3", "SmolVLM"])
def test_packed_crops_equal_masked_padding(family: str, parity: Recorder) -> None:
    """Ours packs real patches only. Theirs pads each crop to the largest: padding must change nothing."""
    theirs = reference_model(family)
    ours = VisionConfig.model_validate(TOWER).build("sdpa")
    source = copy_weights(ours, theirs, NAMES)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (len(GRIDS), 3, SIDE * PATCH, SIDE * PATCH), dtype=torch.uint8, generator=generator)
    mask = torch.zeros(len(GRIDS), SIDE, SIDE, dtype=torch.bool)
    for number, (rows, columns) in enumerate(GRIDS):
        mask[number, :rows, :columns] = True
    patches = pixels.view(-1, 3, SIDE, PATCH, SIDE, PATCH).permute(0, 2, 4, 1, 3, 5).flatten(3)
    features = ours(vision_media(patches[mask], tuple((1, *grid) for grid in GRIDS)))
    padded = theirs(pixel_values=pixels / 127.5 - 1, patch_attention_mask=mask).last_hidden_state
    expected = padded[mask.flatten(1)]
    parity(theirs.config.model_type, "features", distance(features, expected), BOUND)
    upstream = torch.randn(features.shape, generator=generator)
    features.backward(upstream)
    expected.backward(upstream)
    parity(theirs.config.model_type, "gradients", gradient_distance(ours, source), GRADIENT_BOUND)


@pytest.mark.parametrize("side", [4, 27, 32, 70])
def test_buckets_are_those_of_transformers_for_every_number_of_rows(side: int) -> None:
    """Includes rows on a boundary that float32 puts into the lower bucket."""
    assert buckets(50, 70)[5] == 6  # 7 in exact arithmetic.
    embeddings = reference_model("Idefics3", side).embeddings
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        # Each vector of the table is its own index.
        embeddings.position_embedding.weight.copy_(torch.arange(side**2).float()[:, None].expand(-1, 24))
        for count in range(1, side + 1):
            mask = torch.zeros(1, side, side, dtype=torch.bool)
            mask[:, :count, : side + 1 - count] = True
            pixels = torch.zeros(1, 3, side * PATCH, side * PATCH)
            indices = embeddings(pixels, mask)[0, :, 0].view(side, side)[mask[0]].view(count, -1).numpy()
            expected = buckets(count, side)[:, None] * side + buckets(side + 1 - count, side)
            assert np.array_equal(indices, expected), count


def test_a_crop_may_have_more_patches_than_the_table() -> None:
    assert buckets(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    tower = VisionConfig.model_validate(TOWER).build("sdpa")
    initialise_(tower, 0)
    grid = (1, 2 * SIDE, SIDE)
    assert tower(vision_media(torch.zeros(2 * SIDE**2, 3 * PATCH**2, dtype=torch.uint8), (grid,))).isfinite().all()


def test_a_class_token_has_no_bucket() -> None:
    with pytest.raises(ValidationError, match="class_token: has no position in the grid of bucketed"):
        VisionConfig.model_validate({**TOWER, "class_token": True})
