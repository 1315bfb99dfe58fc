"""A model with dropout: masks depend on the lane, not on where it is computed; evaluation has no masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import MultimodalBatch
from data_pipeline.packing.collate import concatenate
from mmscale.engine.graph import recompute
from mmscale.models.build import media_spec
from mmscale.models.generation import generate
from mmscale.models.multimodal import MultimodalModel
from mmscale.nn import dropout
from mmscale.objectives.next_token import NextToken
from tests.models.packs import image_document, in_lane, pack, text_document
from tests.models.tiny import CONNECTORS, MOE, VOCAB, model

KINDS = [None, *CONNECTORS]
KEY = (1, 6)


def lane(net: MultimodalModel, number: int, key: tuple[int, int] | None = KEY) -> MultimodalBatch:
    """Return a pack with a text and, if there is a tower, an image. Lanes differ in length."""
    spec = media_spec(net.config)
    docs = [text_document(number, 3 + 2 * number, VOCAB)]
    if net.config.connector is not None:
        docs.append(image_document(spec, number, 4, [(2, 2), (4, 2)], VOCAB))
    return in_lane(pack(docs, spec), number, key)


def together(net: MultimodalModel, batches: list[MultimodalBatch]) -> MultimodalBatch:
    return replace(concatenate(batches, media_spec(net.config)), dropout_key=KEY)


def dropped_rows(net: MultimodalModel, batch: MultimodalBatch, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the masks in the order in which the forward pass computes them."""
    seen: list[Tensor] = []
    plain = dropout.Dropout.dropped

    def keep(self: dropout.Dropout, branch: dropout.SubLayer, dim: int) -> Tensor:
        seen.append(plain(self, branch, dim))
        return seen[-1]

    with monkeypatch.context() as patched:
        patched.setattr(dropout.Dropout, "dropped", keep)
        net(batch)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_a_lane_are_the_same_in_any_microbatch(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model(kind, dropout=0.3)
    blocks = 4 + (2 if kind in ("cross_attention", "hybrid") else 0)
    lanes = {number: lane(net, number) for number in (0, 3, 1)}
    alone = {number: dropped_rows(net, batch, monkeypatch) for number, batch in lanes.items()}
    assert {len(masks) for masks in alone.values()} == {2 * blocks}
    outputs = {number: net(batch).hidden for number, batch in lanes.items()}
    for dealt in ([0, 3, 1], [1, 0], [3, 1]):
        batch = together(net, [lanes[number] for number in dealt])
        for place, mask in enumerate(dropped_rows(net, batch, monkeypatch)):
            assert torch.equal(mask, torch.cat([alone[number][place] for number in dealt]))
        expected = torch.cat([outputs[number] for number in dealt])
        torch.testing.assert_close(net(batch).hidden, expected, rtol=1e-4, atol=1e-5)
    masks = alone[3]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(masks), "two sub-layers share a mask"


def grads(net: MultimodalModel, batch: MultimodalBatch) -> list[Tensor]:
    net.zero_grad()
    loss = NextToken()(net, batch).loss_sum
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("options", [{}, {"mlp": MOE}], ids=["dense", "moe"])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_blocks_have_the_same_masks(kind: str | None, options: dict[str, Any]) -> None:
    net = model(kind, dropout=0.3, **options)
    batch = together(net, [lane(net, 0), lane(net, 1)])
    stored = grads(net, batch)
    undo = recompute(net.checkpoint_units())
    again = grads(net, batch)
    undo()
    for one, other in zip(stored, again, strict=True):
        assert torch.equal(one, other)
    plain = grads(model(kind, **options), batch)
    assert not torch.equal(stored[0], plain[0])


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_a_rate_of_zero_draw_no_mask(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    net, plain = model(kind, dropout=0.3), model(kind)
    batch = lane(net, 2)
    assert not torch.equal(net(batch).hidden, plain(batch).hidden)

    def refuse(*_: Any) -> None:
        raise AssertionError("a mask was made")

    monkeypatch.setattr(dropout.Dropout, "for_microbatch", refuse)
    expected = plain(batch).hidden
    net.eval()
    assert torch.equal(net(batch).hidden, expected)
    unkeyed = lane(net, 2, key=None)
    assert torch.equal(net(unkeyed).hidden, expected)
    assert generate(net, unkeyed, 3, eos_id=0) == generate(plain, unkeyed, 3, eos_id=0)


def test_experts_and_routers_have_noise_without_dropout_of_the_stream() -> None:
    """The same noise in any microbatch and in recomputed blocks; none in evaluation."""
    mlp = {**MOE, "expert_dropout": 0.3, "jitter": 0.5}
    net, plain = model("embedding", mlp=mlp), model("embedding", mlp=MOE)
    lanes = [lane(net, number) for number in (0, 3, 1)]
    alone = torch.cat([net(batch).hidden for batch in lanes])
    batch = together(net, lanes)
    torch.testing.assert_close(net(batch).hidden, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone, plain(batch).hidden, atol=1e-3)
    stored, undo = grads(net, batch), recompute(net.checkpoint_units())
    again = grads(net, batch)
    undo()
    assert all(map(torch.equal, stored, again))
    assert torch.equal(net.eval()(batch).hidden, plain(batch).hidden)
    with pytest.raises(ValueError, match=r"expert_dropout=0\.3: a training batch needs dropout_key"):
        net.train()(lane(net, 0, key=None))


def test_a_step_has_masks_of_its_own() -> None:
    net = model(None, dropout=0.3)
    outputs = [net(lane(net, 2, (seed, step))).hidden for seed, step in ((1, 6), (1, 7), (2, 6), (1, 6))]
    assert torch.equal(outputs[0], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_a_training_batch_without_lanes_and_step_is_rejected() -> None:
    net = model(None, dropout=0.3)
    for batch in (lane(net, 2, key=None), replace(lane(net, 2), lane_tokens=())):
        with pytest.raises(ValueError, match=r"decoder\.dropout=0\.3: .* needs dropout_key .* call model\.eval\(\)"):
            net(batch)
