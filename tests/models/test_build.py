"""Model configurations: parameter counts, ``MediaSpec``, and rejected values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from data_pipeline.media_spec import Placement
from mmscale.models.build import build_model, count_parameters, media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.connectors.cross_attention import cross_attention_layers
from mmscale.nn.experts import Experts
from tests.models.packs import image_document, pack, text_document
from tests.models.tiny import CONNECTORS, DECODER, DENSE, LEARNED, MOE, PATCHES, VISION, VOCAB, config, model


def llama(layers: int, dim: int, ffn: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> int:
    """Return the number of parameters of a Llama model, by formula."""
    head = dim // heads
    block = dim * head * (2 * heads + 2 * kv_heads) + 3 * dim * ffn + 2 * dim
    return layers * block + dim + vocab * dim * (1 if tied else 2)


@pytest.mark.parametrize(
    ("published", "shape"),
    [
        (1_235_814_400, (16, 2048, 8192, 32, 8, 128256, True)),  # Llama 3.2 1B
        (8_030_261_248, (32, 4096, 14336, 32, 8, 128256, False)),  # Llama 3.1 8B
    ],
)
def test_counts_of_published_models(published: int, shape: tuple[Any, ...]) -> None:
    layers, dim, ffn, heads, kv_heads, vocab, tied = shape
    assert llama(*shape) == published
    settings = ModelConfig.model_validate(
        {
            "decoder": {
                "vocab_size": vocab,
                "hidden_dim": dim,
                "num_layers": layers,
                "attention": {"num_heads": heads, "num_kv_heads": kv_heads},
                "mlp": {"kind": "dense", "hidden_dim": ffn},
                "tie_embeddings": tied,
            }
        }
    )
    count = count_parameters(settings)
    assert count.total == count.active == count.components["decoder"] == published


def test_counts_of_olmoe() -> None:
    """OLMoE has 7B parameters, of which one token uses 1.3B (arXiv 2409.02060, table 1)."""
    settings = ModelConfig.model_validate(
        {
            "decoder": {
                "vocab_size": 50304,
                "hidden_dim": 2048,
                "num_layers": 16,
                "attention": {"num_heads": 16, "qk_norm": "full"},
                "mlp": {"kind": "moe", "num_experts": 64, "experts_per_token": 8, "expert_dim": 1024},
            }
        }
    )
    count = count_parameters(settings)
    assert count.total == 6_919_161_856
    assert count.total - count.active == 16 * 56 * 3 * 2048 * 1024


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"shared_dim": 0, "shared_gate": False},
        {"every": 2, "dense": DENSE},
        {"dense_first": 3, "dense": DENSE, "choice_groups": 3, "groups_per_token": 1},
    ],
    ids=["shared", "routed", "second", "first"],
)
def test_active_parameters_are_those_that_one_token_reaches(keys: dict[str, Any]) -> None:
    """Only experts that the token did not choose have a gradient of zero."""
    net = build_model(config(None, mlp={**MOE, **keys}), seed=1)
    batch = pack([text_document(1, 1, VOCAB)], media_spec(net.config))
    net(batch).hidden.square().sum().backward()
    unreached = 0
    for module in net.modules():
        if isinstance(module, Experts):
            for stack in module.parameters():
                assert stack.grad is not None
                reached = stack.grad.flatten(1).any(1)
                assert reached.sum() == MOE["experts_per_token"]
                unreached += stack[~reached].numel()
    count = count_parameters(net.config)
    assert count.total == sum(parameter.numel() for parameter in net.parameters())
    assert count.active == count.total - unreached


def test_counts_of_a_vision_transformer() -> None:
    """CLIP ViT-H/14 at 224 pixels has 630,766,080 parameters with all biases."""
    vision = {
        "patch_size": 14,
        "hidden_dim": 1280,
        "num_layers": 32,
        "attention": {"num_heads": 16, "qkv_bias": True, "out_bias": True},
        "mlp": {"hidden_dim": 5120, "gated": False, "activation": "gelu", "bias": True},
        "norm": {"kind": "layernorm"},
        "positions": {"kind": "learned", "grid": [16, 16]},
        "class_token": True,
        "pre_norm": True,
    }
    settings = config("cross_attention", vision=vision)
    assert count_parameters(settings).components["vision"] == 630_766_080


@pytest.mark.parametrize(
    "variant", [{}, {"mlp": MOE}, {"vision": LEARNED, "tie_embeddings": True}, {"extra_tokens": {"rows": 5}}]
)
@pytest.mark.parametrize("kind", [None, *CONNECTORS])
def test_counting_on_meta_equals_counting_weights(kind: str | None, variant: dict[str, Any]) -> None:
    settings = config(kind, **variant)
    count = count_parameters(settings)
    assert count.total == sum(p.numel() for p in build_model(settings).parameters()) == sum(count.components.values())
    if "mlp" in variant:
        assert count.total - count.active == 4 * 4 * 3 * 32 * 24  # layers x idle experts x matrices x D x F
    else:
        assert count.total == count.active


def test_cross_attention_stands_before_every_nth_block() -> None:
    assert cross_attention_layers(8, 4) == [3, 7]
    assert cross_attention_layers(32, 4) == [3, 7, 11, 15, 19, 23, 27, 31]
    assert cross_attention_layers(5, 5) == [4]
    net = model("cross_attention")
    assert net.connector is not None
    order: list[str] = []
    for number, layer in enumerate(net.decoder.layers):
        layer.register_forward_hook(lambda *_, name=str(number): order.append(name))
    for number, block in net.connector.blocks.items():  # type: ignore[union-attr]
        block.register_forward_hook(lambda *_, name=f"before {number}": order.append(name))
    spec = media_spec(net.config)
    net(pack([image_document(spec, 1, 3, [(2, 2)], 60)], spec))
    assert order == ["0", "before 1", "1", "2", "before 3", "3"]


@pytest.mark.parametrize(("kind", "placement"), [(None, "none"), *((kind, kind) for kind in CONNECTORS)])
def test_media_spec(kind: str | None, placement: str) -> None:
    spec = media_spec(config(kind))
    assert spec.placement is Placement(placement)
    assert spec.fixed_grid is None
    if kind is not None:
        assert spec.patch_size == VISION["patch_size"]
        assert spec.merge == (1 if kind == "cross_attention" else 2)
        assert media_spec(config(kind, vision=LEARNED)).fixed_grid == (2, 4)
    rope = {"sections": [1, 1, 2]}
    assert media_spec(config(None, rope=rope)).position_axes == 3


@pytest.mark.parametrize("kind", CONNECTORS)
def test_patches_are_features_without_parameters(kind: str) -> None:
    net = model(kind, vision=PATCHES)
    assert net.config.components == tuple(net.components()) == ("connector", "decoder")
    spec = media_spec(net.config)
    assert (spec.fixed_grid, spec.patch_size) == (None, 2)
    media = pack([image_document(spec, 1, 3, [(2, 4)], 60)], spec).media["image"]
    assert net.vision is not None
    features = net.vision.bfloat16()(media)
    torch.testing.assert_close(features, media.values / 127.5 - 1)
    assert features.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"decoder": {**DECODER, "attention": {"num_heads": 4, "num_kv_heads": 3}}},
            "num_kv_heads=3: must divide num_heads=4",
        ),
        ({"decoder": {**DECODER, "attention": {"num_heads": 5}}}, "num_heads=5: must divide the width 32"),
        ({"decoder": {**DECODER, "mlp": {**MOE, "experts_per_token": 7}}}, "there are 6 experts"),
        ({"decoder": {**DECODER, "mlp": {**MOE, "every": 2}}}, "dense must be set"),
        ({"decoder": {**DECODER, "rope": {"sections": [1, 1, 1]}}}, "must sum to 4"),
        ({"vision": VISION}, "set both, or neither"),
        (
            {"vision": {**VISION, "class_token": True}, "connector": CONNECTORS["embedding"]},
            "use positions.kind=learned",
        ),
        ({"vision": {**VISION, "feature_layers": [2]}, "connector": CONNECTORS["embedding"]}, "numbered 0..1"),
        (
            {"vision": {**VISION, "last_output": False}, "connector": CONNECTORS["embedding"]},
            "last block's output is unused",
        ),
        ({"vision": {**VISION, "mean": [0.5]}, "connector": CONNECTORS["embedding"]}, "need 3 values each"),
        (
            {"vision": VISION, "connector": {"kind": "cross_attention", "every": 5}},
            "gives a decoder of 4 blocks no cross-attention",
        ),
        (
            {
                "vision": {**VISION, "positions": {"kind": "learned", "grid": [3, 4]}},
                "connector": CONNECTORS["embedding"],
            },
            "must divide both sides",
        ),
        (
            {"decoder": {**DECODER, "mlp": MOE}, "vision": VISION, "connector": {"kind": "hybrid", "every": 2}},
            "connector.mlp: set it",
        ),
        ({"decoder": {**DECODER, "hiden_dim": 3}}, "Extra inputs"),
        ({"vision": {**PATCHES, "num_layers": 2}, "connector": CONNECTORS["embedding"]}, "Extra inputs"),
        ({"vision": {**PATCHES, "mean": [0.5]}, "connector": CONNECTORS["embedding"]}, "need 3 values each"),
        ({"vision": {**PATCHES, "kind": "vit"}, "connector": CONNECTORS["embedding"]}, "'transformer', 'patches'"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        ModelConfig.model_validate({"decoder": DECODER, **change})


def test_building_on_meta_spends_no_memory() -> None:
    with torch.device("meta"):
        net = build_model(config("hybrid", mlp={**DENSE, "hidden_dim": 1 << 20}))
    assert all(parameter.is_meta for parameter in net.parameters())
