"""Extra tokens in separate parameters: the model computes the same as with one table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmscale.models.build import build_model, count_parameters, media_spec
from mmscale.models.generation import generate
from mmscale.models.multimodal import MultimodalModel
from mmscale.models.vocabulary import TokenEmbedding
from mmscale.nn.cross_entropy import linear_cross_entropy
from mmscale.optim.schedule import component_of_parameters, tables
from tests.models.packs import image_document, pack
from tests.models.test_multimodal import documents, dummy_document, loss_and_grads
from tests.models.tiny import DECODER, VOCAB, config

NEW = 8
OLD = VOCAB - NEW


def whole_and_split(
    kind: str | None, *, predicted: bool = True, **options: Any
) -> tuple[MultimodalModel, MultimodalModel]:
    """Return a model with one table of ``VOCAB`` rows, and one with the same values in two parameters."""
    whole = build_model(config(kind, **options), seed=5)
    extra = {"rows": NEW, "predicted": predicted}
    split = build_model(config(kind, **options, vocab_size=OLD, extra_tokens=extra), seed=6)
    values = dict(whole.state_dict())
    for module in ("decoder.embed_tokens", "head"):
        table = values.pop(f"{module}.weight")
        values[f"{module}.weight"] = table[:OLD]
        if predicted or module != "head":
            values[f"{module}.extra_weight"] = table[OLD:]
    split.load_state_dict(values)
    return whole, split


def joined(grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the gradients under the names of the model with one table."""
    grads = dict(grads)
    for name in [name for name in grads if name.endswith("extra_weight")]:
        base = name.replace("extra_weight", "weight")
        grads[base] = torch.cat([grads[base], grads.pop(name)])
    return grads


def test_a_lookup_is_bitwise_that_of_one_table() -> None:
    torch.manual_seed(0)
    plain, ours = nn.Embedding(VOCAB, 16), TokenEmbedding(OLD, 16, NEW)
    with torch.no_grad():
        ours.weight.copy_(plain.weight[:OLD])
        ours.extra_weight.copy_(plain.weight[OLD:])  # type: ignore[union-attr]
    for ids in (torch.randint(0, VOCAB, (50,)), torch.randint(0, OLD, (50,)), torch.arange(OLD, VOCAB)):
        output_gradient = torch.randn(len(ids), 16)
        assert torch.equal(ours(ids), plain(ids))
        found = torch.autograd.grad(ours(ids), [ours.weight, ours.extra_weight], output_gradient)
        (expected,) = torch.autograd.grad(plain(ids), plain.weight, output_gradient)
        assert torch.equal(torch.cat(found), expected)
    with pytest.raises(IndexError):
        ours(torch.tensor([VOCAB]))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", [None, "embedding", "cross_attention"])
def test_loss_and_gradients_are_those_of_one_table(kind: str | None, tied: bool) -> None:
    whole, split = whole_and_split(kind, tie_embeddings=tied)
    batch = pack([*documents(whole), dummy_document(whole)], media_spec(whole.config))
    assert (batch.token_ids >= OLD).any()
    assert ((batch.labels >= OLD) & (batch.loss_weights > 0)).any()
    loss, grads = loss_and_grads(whole, batch)
    other, others = loss_and_grads(split, batch)
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
    others = joined(others)
    assert grads.keys() == others.keys()
    scale = max(float(grad.abs().max()) for grad in grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, rtol=1e-4, atol=1e-6 * scale, msg=name)
    logits = [net.head(net(batch).hidden) for net in (whole, split)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_rows_that_are_only_read_have_no_logit() -> None:
    whole, split = whole_and_split("embedding", predicted=False)
    batch = pack(documents(whole), media_spec(whole.config))
    batch.loss_weights[batch.labels >= OLD] = 0.0
    assert (batch.token_ids >= OLD).any()
    hidden = whole(batch).hidden
    assert torch.equal(split(batch).hidden, hidden)
    logits = F.linear(hidden, whole.head.weight[:OLD])
    torch.testing.assert_close(split.head(hidden), logits)
    labels = batch.labels.where(batch.loss_weights > 0, -100)
    expected = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100) * batch.loss_weights
    loss, grads = loss_and_grads(split, batch)
    torch.testing.assert_close(loss, expected.sum().detach(), rtol=1e-6, atol=0)
    assert grads["decoder.embed_tokens.extra_weight"].abs().sum() > 0


def test_a_batch_without_a_new_id_runs_the_same_modules_and_moves_no_new_row() -> None:
    _, split = whole_and_split(None, predicted=False)
    spec = media_spec(split.config)
    batch = pack([image_document(spec, 1, 9, [], OLD)], spec)
    _, grads = loss_and_grads(split, batch)  # Raises if a parameter is not in the graph.
    assert not grads["decoder.embed_tokens.extra_weight"].any()


def test_frozen_parts_get_no_gradient() -> None:
    hidden, weight = torch.randn(20, 12, requires_grad=True), torch.randn(OLD, 12)
    extra = torch.randn(NEW, 12, requires_grad=True)
    labels = torch.arange(20) * 3 % VOCAB
    loss = linear_cross_entropy(hidden, weight, labels, torch.ones(20), extra_weight=extra)
    reference = F.cross_entropy(hidden @ torch.cat([weight, extra]).t(), labels, reduction="sum")
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (hidden, extra)), torch.autograd.grad(reference, (hidden, extra)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_generated_text_is_that_of_one_table(tied: bool) -> None:
    whole, split = whole_and_split("cross_attention", tie_embeddings=tied)
    spec = media_spec(whole.config)
    prompts = pack([image_document(spec, n, 4, [(2, 2)], VOCAB) for n in range(6)], spec)
    answers = [generate(net.eval(), prompts, 12, eos_id=7) for net in (whole, split)]
    assert answers[0] == answers[1]
    assert any(token >= OLD for answer in answers[0] for token in answer)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_new_rows_are_a_component_and_everything_else_is_as_without_them(tied: bool) -> None:
    without = build_model(config("hybrid", tie_embeddings=tied, vocab_size=OLD), seed=5)
    settings = config("hybrid", tie_embeddings=tied, vocab_size=OLD, extra_tokens={"rows": NEW})
    net = build_model(settings, seed=5)
    owner = component_of_parameters(net, net.components())
    new = {name for name, component in owner.items() if component == "extra_tokens"}
    assert new == {"decoder.embed_tokens.extra_weight"} | (set() if tied else {"head.extra_weight"})
    assert new <= {name for name, parameter in net.named_parameters() if id(parameter) in tables(net)}
    values = dict(without.named_parameters())
    assert all(torch.equal(values[name], p) for name, p in net.named_parameters() if name not in new)
    assert count_parameters(settings).components["extra_tokens"] == NEW * DECODER["hidden_dim"] * len(new)
    assert tuple(net.components()) == settings.components
    # A few new tokens must not change which documents share a pack.
    assert media_spec(settings) == media_spec(without.config)
