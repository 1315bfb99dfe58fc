"""Molmo's connector and tower: dummy documents, packing, operations, and idle layers."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.batch import MultimodalBatch
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import AttentionPoolConfig
from mmscale.models.connectors.attention_pool import AttentionPool
from mmscale.models.connectors.padding import PaddingEmbedding, padding_of_patches
from mmscale.models.flops import cost_per_patch
from mmscale.nn.dropout import SubLayer
from tests.models.packs import IMAGE_ID, Doc, image_document, in_lane, pack, text_document
from tests.models.test_flops import WIDE, counted_step
from tests.models.test_multimodal import dummy_document, loss_and_grads
from tests.models.tiny import DECODER, DENSE, LEARNED, VISION, VOCAB

POOL = {"kind": "attention_pool", "merge": 2, "num_heads": 2, "head_dim": 12, "mlp": DENSE}
CONNECTOR = {"kind": "embedding", "combine": "add", "padding": True, "projector": POOL}
PICKED = {"num_layers": 4, "feature_layers": [2, 0], "last_output": False, "post_norm": False, "idle_layers": 1}


def settings(vision: dict[str, Any] = LEARNED, connector: dict[str, Any] = CONNECTOR, **decoder: Any) -> ModelConfig:
    block = {"decoder": {**DECODER, **decoder}, "vision": {**vision, **PICKED}, "connector": connector}
    return ModelConfig.model_validate(block)


def docs(config: ModelConfig) -> list[Doc]:
    spec = media_spec(config)
    sizes = [(2, 4)] * 2 if spec.fixed_grid else [(2, 2), (4, 6)]
    return [
        image_document(spec, 3, 5, sizes, VOCAB),
        text_document(1, 7, VOCAB),
        image_document(spec, 4, 9, sizes[1:], VOCAB),
    ]


def with_content_area(batch: MultimodalBatch, rectangles: list[list[int]]) -> MultimodalBatch:
    """Return the batch with these content areas of its items."""
    media = replace(batch.media["image"], content_area=torch.tensor(rectangles, dtype=torch.int32))
    return replace(batch, media={"image": media})


def test_one_square_at_a_time() -> None:
    """Compare with torch's own multi-head attention."""
    torch.manual_seed(1)
    pool = AttentionPool(10, 7, AttentionPoolConfig.model_validate(POOL))
    features = torch.randn(24, 10)
    reference = torch.nn.MultiheadAttention(24, 2, kdim=10, vdim=10, batch_first=True)
    ours = pool(features, [(1, 2, 4), (1, 4, 4)])
    with torch.no_grad():
        reference.in_proj_bias.copy_(torch.cat([pool.q_proj.bias * 0, pool.k_proj.bias, pool.v_proj.bias]))
        reference.q_proj_weight.copy_(torch.eye(24))
        reference.k_proj_weight.copy_(pool.k_proj.weight)
        reference.v_proj_weight.copy_(pool.v_proj.weight)
        reference.out_proj.load_state_dict(pool.o_proj.state_dict())
    rows = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15], [16, 17, 20, 21], [18, 19, 22, 23]]
    for row, square in zip(ours, rows, strict=True):
        patches = features[square]
        query = pool.q_proj(patches.mean(0, keepdim=True))
        pooled = reference(query, patches, patches)[0]
        gated = F.silu(pool.mlp.gate_proj(pooled)) * pool.mlp.up_proj(pooled)
        torch.testing.assert_close(row, pool.mlp.down_proj(gated)[0])


def test_padding_of_each_patch_is_that_of_its_rectangle() -> None:
    config = settings(VISION)
    spec = media_spec(config)
    batch = pack([image_document(spec, 1, 3, [(4, 6), (2, 2)], VOCAB)], spec)
    assert not padding_of_patches(batch.media["image"]).any()
    # First item: the image touches rows 1-3 and columns 0-4, and fills rows 2-3 and columns 1-3. Second: it fills none.
    batch = with_content_area(batch, [[1, 0, 3, 5, 2, 1, 2, 3], [0, 0, 2, 2, 0, 0, 0, 0]])
    expected = [[1, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 1], [2, 0, 0, 0, 2, 1], [2, 0, 0, 0, 2, 1], [2, 2, 2, 2]]
    kinds = padding_of_patches(batch.media["image"]).tolist()
    assert kinds == list(itertools.chain.from_iterable(expected))
    padding = PaddingEmbedding(3)
    with torch.no_grad():
        padding.pad_embed.copy_(torch.tensor([[1.0, 2, 3], [10, 20, 30]]))
    added = padding(torch.zeros(28, 3), batch.media["image"])
    assert added[:, 1].tolist() == [{0: 0.0, 1: 2.0, 2: 20.0}[kind] for kind in kinds]


def test_features_are_added_to_the_placeholder_embedding() -> None:
    config = settings()
    net, replacing = (
        build_model(config, seed=2),
        build_model(settings(connector={**CONNECTOR, "combine": "replace"}), seed=2),
    )
    batch = pack(docs(config), media_spec(config))
    entering = []
    for model in (net, replacing):
        model.decoder.register_forward_hook(lambda module, inputs, output: entering.append(inputs[0]))
        model(batch)
    dest = batch.media["image"].scatter_index
    difference = torch.zeros_like(entering[0]).index_add(
        0, dest, net.decoder.embed_tokens.weight[[IMAGE_ID] * len(dest)]
    )
    torch.testing.assert_close(entering[0], entering[1] + difference, rtol=0, atol=1e-6)


@pytest.mark.parametrize("vision", [LEARNED, VISION], ids=["learned", "rotary"])
def test_dummy_documents_and_packing_change_nothing(vision: dict[str, Any]) -> None:
    config = settings(vision)
    net, spec = build_model(config, seed=5), media_spec(config)
    documents = docs(config)
    loss, grads = loss_and_grads(net, pack(documents, spec))
    with_null = [documents[0], dummy_document(net), *documents[1:]]
    other, others = loss_and_grads(net, pack(with_null, spec))
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
    scale = max(float(grad.abs().max()) for grad in grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, rtol=1e-4, atol=1e-6 * scale, msg=name)
    together = net(pack(documents, spec)).hidden[: len(documents[0].tokens)]
    torch.testing.assert_close(together, net(pack(documents[:1], spec)).hidden, rtol=1e-4, atol=1e-5)


def test_an_idle_block_has_zero_gradients() -> None:
    config = settings()
    net = build_model(config, seed=5)
    _, grads = loss_and_grads(net, pack(docs(config), media_spec(config)))  # Raises if a parameter has no gradient.
    idle = {name: grad for name, grad in grads.items() if name.startswith("vision.layers.3.")}
    assert idle
    assert not any(grad.any() for grad in idle.values())
    assert grads["vision.layers.2.mlp.down_proj.weight"].any()


TRAINED = [["vision"], ["connector"], ["decoder"], ["vision", "connector"], ["vision", "connector", "decoder"]]


@pytest.mark.parametrize("padding", [True, False])
def test_operations_equal_the_counter(padding: bool) -> None:
    config = settings(connector={**CONNECTOR, "padding": padding}, **WIDE)
    net, spec = build_model(config), media_spec(config)
    assert spec.padding is padding
    crops = [(2, 4), (2, 4)]
    batch = pack([image_document(spec, n, 40, crops, VOCAB, dummy=n == 2) for n in range(3)], spec)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        net.head(net(batch).hidden)
    assert net.flops(batch) == pytest.approx(counter.get_total_flops(), rel=0.003)
    for trained in TRAINED:
        counted = counted_step(build_model(config), batch, trained, False)
        assert net.training_flops(batch, trained).model == pytest.approx(counted, rel=0.01), trained
    linear = settings(connector={"kind": "embedding", "projector": {"kind": "linear", "merge": 2}}, **WIDE)
    assert cost_per_patch(config) > cost_per_patch(linear)


def test_dropout_of_learned_rows_only() -> None:
    """Rows whose label carries loss have the same masks as with ``dropout_rows=all``; the others have none."""
    config = settings(dropout=0.5, dropout_rows="learned")
    everywhere = settings(dropout=0.5)
    batch = in_lane(pack(docs(config), media_spec(config)), 3, (7, 7))
    weights = batch.loss_weights.clone()
    weights[::3] = 0
    batch = replace(batch, loss_weights=weights)
    seen: list[list[tuple[Tensor, Tensor]]] = []
    for each in (config, everywhere):
        net, rows = build_model(each, seed=5), list[tuple[Tensor, Tensor]]()
        seen.append(rows)
        layer = net.decoder.layers[0]
        layer.register_forward_hook(lambda module, inputs, output, rows=rows: rows.append((inputs[0], inputs[5])))
        net(batch)
    values = torch.ones(batch.segments.total, 32)
    chosen, whole = (rows[0][1](values, SubLayer.ATTENTION) for rows in seen)
    learned = weights > 0
    assert torch.equal(chosen[learned], whole[learned])
    assert torch.equal(chosen[~learned], values[~learned])
    assert set(whole[~learned].unique().tolist()) == {0.0, 2.0}


def test_idle_layers_do_not_affect_features() -> None:
    with pytest.raises(ValueError, match=r"idle_layers=2: the outputs of the last 1 blocks are unused"):
        ModelConfig.model_validate(
            {"decoder": DECODER, "vision": {**LEARNED, **PICKED, "idle_layers": 2}, "connector": CONNECTOR}
        )
