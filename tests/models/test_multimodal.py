"""The multimodal model: packing and dummy documents change nothing, every parameter has one owner."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import MultimodalBatch
from mmscale.models.build import build_model, media_spec
from mmscale.models.multimodal import MultimodalModel
from mmscale.nn.init import initialise_
from mmscale.objectives.next_token import NextToken
from tests.models.packs import Doc, image_document, pack, text_document
from tests.models.tiny import CONNECTORS, LEARNED, MOE, VOCAB, config, model

KINDS = [None, *CONNECTORS]
VARIANTS: list[dict[str, Any]] = [{}, {"mlp": MOE}, {"vision": LEARNED, "tie_embeddings": True}]


def documents(net: MultimodalModel) -> list[Doc]:
    """Return two texts and, if there is a tower, three documents with images of several sizes."""
    spec = media_spec(net.config)
    docs = [text_document(1, 7, VOCAB), text_document(2, 1, VOCAB)]
    if net.config.connector is None:
        return docs
    sizes = [(2, 4)] if spec.fixed_grid else [(2, 2), (4, 6), (2, 8)]
    docs.insert(1, image_document(spec, 3, 5, [sizes[0]], VOCAB))
    docs.insert(0, image_document(spec, 4, 9, [sizes[-1], sizes[0]], VOCAB))
    docs.append(image_document(spec, 5, 3, [sizes[0], sizes[-1]], VOCAB))
    return docs


def dummy_document(net: MultimodalModel) -> Doc:
    spec = media_spec(net.config)
    _, height, width = spec.minimal_grid
    crops = (
        []
        if net.config.connector is None
        else [(height, width)] * (2 if spec.needs_embedded and spec.needs_attended else 1)
    )
    return image_document(spec, 9, 1, crops, VOCAB, dummy=True)


def loss_and_grads(net: MultimodalModel, batch: MultimodalBatch) -> tuple[Tensor, dict[str, Tensor]]:
    net.zero_grad()
    loss = NextToken()(net, batch).loss_sum
    loss.backward()
    grads = {}
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, f"{name} is out of the graph"
        grads[name] = parameter.grad.clone()
    return loss.detach(), grads


@pytest.mark.parametrize("variant", VARIANTS, ids=["dense", "moe", "learned"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dummy_document_changes_no_loss_and_no_gradient(kind: str | None, variant: dict[str, Any]) -> None:
    net = model(kind, **variant)
    docs, spec = documents(net), media_spec(net.config)
    loss, grads = loss_and_grads(net, pack(docs, spec))
    for place in (0, 2, len(docs)):
        with_null = [*docs[:place], dummy_document(net), *docs[place:]]
        other_loss, other_grads = loss_and_grads(net, pack(with_null, spec))
        torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)
        scale = max(float(grad.abs().max()) for grad in grads.values())
        for name, grad in grads.items():
            # Sums run over other chunks of rows; float32 rounding, measured worst 2e-7 of the largest gradient. Some
            # gradients (key biases) are zero except for rounding, so a relative tolerance would be meaningless.
            torch.testing.assert_close(other_grads[name], grad, rtol=1e-4, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_a_dummy_document_get_exactly_no_gradient(kind: str | None) -> None:
    net = model(kind, mlp=MOE)
    docs = [dummy_document(net), *documents(net)]
    batch = pack(docs, media_spec(net.config))
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    handles = [net.decoder.embed_tokens.register_forward_hook(keep)]
    if net.vision is not None:
        handles.append(net.vision.patch_embed.register_forward_hook(keep))
    NextToken()(net, batch).loss_sum.backward()
    tokens = seen[0].grad
    assert tokens is not None
    assert not tokens[: batch.segments.bounds[1]].any()
    assert tokens[batch.segments.bounds[1] :].any()
    if net.vision is not None:
        patches = seen[1].grad
        assert patches is not None
        assert not patches[: sum(h * w for (_, h, w), _, _ in docs[0].crops)].any()
        assert patches.any()
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("variant", VARIANTS, ids=["dense", "moe", "learned"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_one_by_one(kind: str | None, variant: dict[str, Any]) -> None:
    net = model(kind, **variant)
    docs, spec = documents(net), media_spec(net.config)
    together = net(pack(docs, spec)).hidden
    first = 0
    for doc in docs:
        filler = [] if doc.crops or kind is None else [dummy_document(net)]
        alone = net(pack([doc, *filler], spec)).hidden[: len(doc.tokens)]
        torch.testing.assert_close(together[first : first + len(doc.tokens)], alone, rtol=1e-4, atol=1e-5)
        first += len(doc.tokens)


@pytest.mark.parametrize("kind", list(CONNECTORS))
def test_an_image_changes_what_follows_it_and_nothing_else(kind: str) -> None:
    net = model(kind)
    docs, spec = documents(net), media_spec(net.config)
    before = net(pack(docs, spec)).hidden
    grid, embedded, pixels = docs[0].crops[1]
    docs[0].crops[1] = (grid, embedded, 255 - pixels)
    changed = (net(pack(docs, spec)).hidden - before).abs().amax(1) > 1e-6
    first = docs[0].scatter_index[-spec.num_features(grid)] if embedded else 1
    assert changed[first : len(docs[0].tokens)].all()
    assert not changed[:first].any()
    assert not changed[len(docs[0].tokens) :].any()


def test_zero_gates_leave_the_decoder_as_it_was() -> None:
    net = model("cross_attention")
    assert net.connector is not None
    docs = documents(net)
    with torch.no_grad():
        for block in net.connector.blocks_to_recompute():
            block.cross_attn_attn_gate.zero_()  # type: ignore[operator, union-attr]
            block.cross_attn_mlp_gate.zero_()  # type: ignore[operator, union-attr]
    text = build_model(config(None), seed=5)
    spec, text_spec = media_spec(net.config), media_spec(text.config)
    assert torch.equal(net(pack(docs, spec)).hidden, text(pack(docs, text_spec)).hidden)


def test_rows_that_see_no_image_get_nothing_from_open_gates() -> None:
    """Text without an image before it equals the decoder's output: no cross-attention, no feed-forward."""
    net, text = model("cross_attention"), model(None)
    docs = documents(net)
    ours = net(pack(docs, media_spec(net.config))).hidden
    alone = text(pack(docs, media_spec(text.config))).hidden
    blind = torch.cat([torch.arange(len(doc.tokens)) < (1 if doc.crops else len(doc.tokens)) for doc in docs])
    torch.testing.assert_close(ours[blind], alone[blind], rtol=0, atol=0)
    assert (ours - alone)[~blind].abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS, ids=["dense", "moe", "learned"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_exactly_one_component(kind: str | None, variant: dict[str, Any]) -> None:
    net = model(kind, **variant)
    owners = [set(parameters) for parameters in net.components().values()]
    assert sum(map(len, owners)) == len(set.union(*owners)) == len(list(net.parameters()))
    assert set(net.components()) == ({"decoder"} if kind is None else {"vision", "connector", "decoder"})
    assert tuple(net.components()) == net.config.components
    units = net.checkpoint_units()
    assert len(units) == len(set(units))
    assert all(any(unit is module for module in net.modules()) for unit in units)


def test_first_values_depend_on_seed_and_name_alone() -> None:
    whole, text = model("cross_attention"), model(None)
    values = dict(whole.named_parameters())
    for name, parameter in text.named_parameters():
        assert torch.equal(parameter, values[name]), name
    torch.manual_seed(77)
    again = build_model(whole.config, seed=None)
    initialise_(again, 5)
    assert all(torch.equal(p, values[name]) for name, p in again.named_parameters())
    random = [values[name].flatten()[:8] for name in values if name.endswith("_proj.weight")]
    assert len(torch.stack(random).unique(dim=0)) == len(random), "two parameters share their first values"
    other = build_model(whole.config, seed=6)
    assert not torch.equal(other.head.weight, whole.head.weight)


def test_first_values_have_the_stated_scale() -> None:
    net = build_model(config("cross_attention", hidden_dim=128))
    for block in net.decoder.layers:
        attention: Any = block.self_attn
        assert attention.q_proj.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
        assert attention.o_proj.weight.std().item() == pytest.approx((128 * 8) ** -0.5, rel=0.05)  # 2 L = 8
    assert torch.equal(net.decoder.norm.weight, torch.ones(128))  # type: ignore[arg-type]
    assert net.state_dict()["connector.blocks.1.cross_attn_attn_gate"].item() == pytest.approx(0.7)
    fixed = build_model(config(None, hidden_dim=128, init_std=0.02))
    assert fixed.decoder.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_checkpointing_the_units_changes_nothing() -> None:
    from torch.utils.checkpoint import checkpoint

    net = model("hybrid", mlp=MOE)
    batch = pack(documents(net), media_spec(net.config))
    loss, grads = loss_and_grads(net, batch)
    for unit in net.checkpoint_units():
        plain = unit.forward
        unit.forward = lambda *args, _plain=plain: checkpoint(_plain, *args, use_reentrant=False)  # type: ignore[method-assign]
    again, others = loss_and_grads(net, batch)
    assert torch.equal(loss, again)
    assert all(torch.equal(others[name], grad) for name, grad in grads.items())
