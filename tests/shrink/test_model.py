"""Every shipped model has a smoke-test model with the same parameter names and flags, and it learns."""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.batch import MediaBlock, MultimodalBatch, Segments
from data_pipeline.config import DataConfig
from data_pipeline.loader.loader import Loader
from data_pipeline.media_spec import Placement
from mmscale.config import leaves
from mmscale.dist import World
from mmscale.models.build import build_unset, build_weights, count_built, media_spec
from mmscale.models.config import AnyModelConfig, AudioTowerConfig, ModelConfig, TokenizerConfig
from mmscale.models.connector_config import ContrastiveConnectorConfig
from mmscale.models.image_tokenizer import ImageTokenizer
from mmscale.models.image_tokens import TOKENIZER
from mmscale.nn.init import initialise_
from mmscale.objectives.contrastive import Contrastive
from mmscale.objectives.next_token import NextToken
from mmscale.shrink.model import shrink
from tests.configs.files import FILES, REPO, model_of, name_of
from tests.models import tiny

SHIPPED = pytest.mark.parametrize("path", FILES, ids=name_of)
EMOJI = REPO / "examples/emoji"
LIMIT = 2_000_000


def names(model: nn.Module) -> set[str]:
    """Return the names of all parameters, with n in place of block numbers."""
    return {re.sub(r"\.\d+\.", ".n.", name) for name, _ in model.named_parameters()}


def flags(config: AnyModelConfig) -> dict[str, Any]:
    """Return all values of a configuration that are not sizes."""
    return {
        ".".join(path): value
        for path, value in leaves(config)
        if isinstance(value, bool | str | float | type(None)) and path[-1] != "head_dim"
    }


@SHIPPED
def test_the_smoke_test_model_has_the_same_parts_and_is_small(path: Path) -> None:
    config = model_of(path)
    small = shrink(config)
    model = build_weights(small)
    assert names(model) == names(build_weights(config))
    assert flags(small) == flags(config)
    assert count_built(model).total < LIMIT
    assert shrink(small) == shrink(shrink(small))  # Small models stay small.


@functools.cache
def text_and_pictures(config: ModelConfig) -> MultimodalBatch:
    """Return one pack of the bundled data, with images tiled or at native size as the tower requires."""
    fixed = config.vision is not None and config.vision.fixed_grid is not None
    native = {"kind": "native", "min_pixels": 1, "max_pixels": 1024}
    alone = media_spec(config).max_tiles is not None  # Without an overview.
    tiles = {"kind": "tiles", "tiling": {"kind": "llama"}} if alone else {"kind": "tiles"}
    if media_spec(config).placement is Placement.PAIR:
        tiles = {"kind": "fixed"}
    seen = {
        "manifest": EMOJI / "shards/train-quick.manifest",
        "template": {"kind": "caption", "prompts": [""], "answers": ["{name}"]},
        "transforms": tiles if fixed else native,
    }
    read = {"manifest": EMOJI / "shards/train-text.manifest", "template": {"kind": "text"}}
    data = DataConfig.model_validate(
        {
            "tokenizer": {"kind": "sentencepiece", "path": EMOJI / "tokenizer.model"},
            "datasets": [{"name": "emoji", **(read if config.vision is None else seen)}],
            "lanes": 1,
            "packing": {"max_tokens": 512, "max_documents": 2, "too_long": "truncate"},
        }
    )
    with Loader(data, media_spec(config), seed=1) as loader:
        (batch,) = next(iter(loader)).microbatches
    return batch


def loss_of(config: AnyModelConfig, model: Any) -> Tensor:
    if isinstance(config, ModelConfig):
        one = World(0, 1, 0, torch.device("cpu"))
        pairs = isinstance(config.connector, ContrastiveConnectorConfig)
        objective = Contrastive(config.connector, one) if pairs else NextToken()
        return objective(model, text_and_pictures(config)).loss_sum
    if isinstance(config, TokenizerConfig):
        return loss_of_tokenizer(model.image_tokenizer, config.image_size)
    empty, none = torch.empty(0, dtype=torch.int64), Segments.from_lengths([])
    if isinstance(config, AudioTowerConfig):
        frames = config.audio.tower.max_frames
        values, rows = torch.randn(frames, config.audio.tower.num_bins), Segments.from_lengths([frames])
        heard = MediaBlock(values, empty, ((frames, 1, 1),), rows, empty, empty, empty, none, none)
        return model.audio(heard).square().sum()
    grid = config.vision.fixed_grid or (4, 6)
    items = Segments.from_lengths([grid[0] * grid[1]])
    patches = torch.randint(
        0, 256, (items.total, config.vision.channels * config.vision.patch_size**2), dtype=torch.uint8
    )
    media = MediaBlock(patches, torch.tensor([(1, *grid)]), ((1, *grid),), items, empty, empty, empty, none, none)
    return model.vision(media).square().sum()


def loss_of_tokenizer(tokenizer: ImageTokenizer, size: int) -> Tensor:
    """Return a loss that is smooth in every parameter: of latents, and of the images of fixed tokens."""
    side = size // tokenizer.stride
    tokens = torch.arange(side**2).view(1, side, side) % tokenizer.codebook_size
    images = tokenizer.images_of(tokenizer.codes_of(tokens))
    return tokenizer.latents(torch.rand(1, 3, size, size)).square().sum() + images.square().sum()


@SHIPPED
def test_the_smoke_test_model_trains_a_step(path: Path) -> None:
    config = shrink(model_of(path))
    model = build_unset(config, attention="sdpa")
    initialise_(model, seed=1)
    model.eval()  # Dropout would require the step number.
    torch.manual_seed(0)
    first = loss_of(config, model)
    first.backward()
    # A decoder's image tokenizer is never trained, and neither are stored sinusoids.
    frozen = [TOKENIZER] if isinstance(config, ModelConfig) else []
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    trained = [value for name, value in named if name.partition(".")[0] not in frozen]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
    with torch.no_grad():
        norm = torch.stack([parameter.grad.square().sum() for parameter in trained]).sum()
        for parameter in trained:
            parameter -= 0.01 * first / norm * parameter.grad  # A hundredth of the loss, to first order.
        torch.manual_seed(0)
        assert 0.985 < float(loss_of(config, model) / first) < 0.995


def test_ratios_stay() -> None:
    decoder = {
        **tiny.DECODER,
        "hidden_dim": 5120,
        "num_layers": 40,
        "attention": {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128},
        "mlp": {"kind": "moe", "num_experts": 64, "experts_per_token": 8, "expert_dim": 1024, "every": 2}
        | {"dense": {"hidden_dim": 14336}, "dense_first": 3},
        "rope": {"sections": [16, 24, 24]},
        "extra_tokens": {"rows": 128},
    }
    vision = {
        **tiny.LEARNED,
        "patch_size": 14,
        "hidden_dim": 1280,
        "num_layers": 32,
        "attention": {"num_heads": 16},
        "positions": {"kind": "learned", "grid": [32, 16]},
        "feature_layers": [23, 31, 15],
        "last_output": False,
        "post_norm": False,
    }
    connector = {"kind": "cross_attention", "every": 8, "projector": {"kind": "mlp", "merge": 2, "hidden_dim": 29568}}
    config = ModelConfig.model_validate({"decoder": decoder, "vision": vision, "connector": connector})
    small = shrink(config)
    assert (small.decoder.attention.num_heads, small.decoder.attention.kv_heads) == (8, 2)
    assert small.decoder.attention.head_dim == 16
    assert small.decoder.hidden_dim == 160  # 5 / 4 of the heads' 128.
    assert small.decoder.rope is not None
    assert small.decoder.rope.sections == (2, 3, 3)
    assert (small.decoder.num_layers, small.decoder.mlp.every, small.decoder.mlp.dense_first) == (4, 2, 1)
    assert (small.decoder.mlp.num_experts, small.decoder.mlp.experts_per_token) == (16, 2)
    assert small.vision is not None
    assert small.vision.positions.grid == (8, 6)
    assert (small.vision.num_layers, small.vision.feature_layers) == (4, (2, 3, 1))
    assert small.decoder.extra_tokens is not None
    assert small.decoder.extra_tokens.rows == 8
    assert names(build_weights(small)) == names(build_weights(config))
    kinds = Counter(type(module).__name__ for module in build_weights(small).modules())
    assert kinds["CrossAttentionBlock"] == kinds["Experts"] == 2
