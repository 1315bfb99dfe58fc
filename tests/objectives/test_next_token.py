"""The next-token objective: the loss sum and auxiliary losses are additive over microbatches."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.document import IGNORE
from data_pipeline.packing.collate import collate
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import plain_document
from data_pipeline.sample import Provenance
from mmscale.cli.run_file import load_run
from mmscale.engine.graph import LossGraph
from mmscale.models.build import build_model, media_spec
from mmscale.objectives.next_token import NextToken
from mmscale.objectives.teacher import Teacher
from mmscale.shrink.run import shrink_run
from tests.models.packs import image_document, pack, text_document
from tests.models.tiny import MOE, VOCAB, config
from tests.objectives.drawn import drawn_batch

REPO = Path(__file__).resolve().parents[2]


def test_equals_torchs_cross_entropy_of_the_logits() -> None:
    net = build_model(config(None))
    batch = pack([text_document(1, 9, VOCAB), text_document(2, 5, VOCAB)], media_spec(net.config))
    output = NextToken()(net, batch)
    logits = net.head(net(batch).hidden)
    losses = F.cross_entropy(logits, batch.labels, reduction="none", ignore_index=-100)
    torch.testing.assert_close(output.loss_sum, (losses * batch.loss_weights).sum())
    assert NextToken().weight(batch) == pytest.approx(batch.loss_weights.sum().item())
    torch.testing.assert_close(output.metrics["cross_entropy"], output.loss_sum.detach())
    weighted = losses.detach() * batch.loss_weights
    bounds = batch.segments.bounds
    by_document = torch.stack([weighted[a:b].sum() for a, b in itertools.pairwise(bounds)])
    torch.testing.assert_close(output.document_losses, by_document)


def test_the_z_loss_is_added_and_reported_separately() -> None:
    net = build_model(config(None))
    batch = pack([text_document(1, 9, VOCAB), text_document(2, 5, VOCAB)], media_spec(net.config))
    plain, output = NextToken()(net, batch), NextToken(z_coefficient=0.5)(net, batch)
    squares = net.head(net(batch).hidden).logsumexp(-1).square()
    expected = (squares * batch.loss_weights).sum()
    torch.testing.assert_close(output.metrics["softmax_z"], expected.detach())
    torch.testing.assert_close(output.loss_sum, plain.loss_sum + 0.5 * expected)
    torch.testing.assert_close(output.metrics["cross_entropy"], plain.metrics["cross_entropy"])
    torch.testing.assert_close(output.document_losses, plain.document_losses)


def test_sums_over_microbatches_equal_the_whole() -> None:
    net = build_model(config("embedding"))
    spec = media_spec(net.config)
    docs = [image_document(spec, n, 4 + n, [(2, 2)], VOCAB) for n in range(4)]
    whole = NextToken()(net, pack(docs, spec)).loss_sum
    parts = sum(NextToken()(net, pack([doc], spec)).loss_sum for doc in docs)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)


def test_router_losses_are_added_with_their_coefficients() -> None:
    mlp = {**MOE, "balance_coefficient": 0.5, "z_coefficient": 0.25}
    plain = {**MOE, "balance_coefficient": 0.0, "z_coefficient": 0.0}
    nets = [build_model(config(None, mlp=block)) for block in (mlp, plain)]
    batch = pack([text_document(1, 30, VOCAB)], media_spec(nets[0].config))
    output, without = (NextToken()(net, batch) for net in nets)
    router = nets[0](batch).router
    experts, load = nets[0].config.decoder.mlp, router.load.sum(1).float()
    balance = torch.stack([experts.balance_of(*pair) for pair in zip(load, router.importance, strict=True)]).mean()
    z = router.z.mean() / batch.num_tokens
    torch.testing.assert_close(output.loss_sum, without.loss_sum + (0.5 * balance + 0.25 * z) * batch.weight)
    torch.testing.assert_close(output.metrics["router_balance"] / batch.weight, balance.detach())
    assert balance.item() > 0.99
    assert not any(values.requires_grad for values in output.metrics.values())
    assert "softmax_z" not in output.metrics


def test_a_teacher_stays_frozen_and_in_evaluation_mode() -> None:
    """Otherwise dropout would need the step, and an engine that collects parameters would train the teacher's."""
    student, teacher = build_model(config(None)), Teacher(build_model(config(None, dropout=0.5)), 0.5, 1.0)
    assert not any(module.training for module in teacher.modules())
    graph = LossGraph(student, NextToken(teachers=[teacher])).train()
    assert graph.model.training
    assert not any(module.training for module in teacher.modules())
    batch = pack([text_document(1, 9, VOCAB)], media_spec(student.config))
    graph(batch)[0].backward()
    assert {p.requires_grad for p in teacher.parameters()} == {False}
    assert all(p.grad is not None for p in student.parameters())


def test_a_teacher_returns_its_matrices_and_counts_a_forward_pass() -> None:
    net = build_model(config(None), attention="sdpa")
    teacher = Teacher(net, 0.5, 1.0)
    batch = pack([text_document(1, 9, VOCAB), text_document(2, 9, VOCAB)], media_spec(net.config))
    assert [*teacher.units()] == [*net.checkpoint_units()] != []
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = teacher(batch)
        hidden[batch.loss_weights > 0] @ net.head.weight.T
    told = teacher.flops(batch)
    assert told.forward == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert (told.backward, told.recomputed) == (0, 0)
    # ZeRO-3 frees a parameter at the end of its module's forward pass. Returned views must keep their values.
    values = net.head.weight.detach().clone()
    teacher.matrices.register_forward_hook(lambda *_: setattr(net.head.weight, "data", torch.empty(0)))
    (matrix,) = teacher.soft_target(hidden, torch.zeros(len(hidden))).weights
    torch.testing.assert_close(matrix, values, rtol=0, atol=0)
    assert net.head.weight.numel() == 0


@pytest.mark.parametrize("count", [0, 1, 2])
def test_each_teacher_has_its_share_and_is_reported_separately(count: int) -> None:
    net = build_model(config(None), seed=0)
    spread = [(0.25, 1.0), (0.5, 2.0)][:count]
    teachers = [Teacher(build_model(config(None), seed=i + 1), *values) for i, values in enumerate(spread)]
    for model in (net, *(teacher.model for teacher in teachers)):
        with torch.no_grad():
            model.head.weight.mul_(30)
    batch = pack([text_document(1, 9, VOCAB), text_document(2, 5, VOCAB)], media_spec(net.config))
    output = NextToken(teachers=teachers)(net, batch)
    ours = net.head(net(batch).hidden)
    entropy = F.cross_entropy(ours, batch.labels, reduction="none", ignore_index=-100) * batch.loss_weights
    expected = (1 - sum(share for share, _ in spread)) * entropy.sum()
    names = ["distillation"] if count == 1 else [f"distillation_{number}" for number in range(count)]
    assert list(output.metrics) == ["cross_entropy", *names]
    for name, teacher in zip(names, teachers, strict=True):
        heat = teacher.temperature
        theirs = (teacher.model.head(teacher.model(batch).hidden) / heat).log_softmax(-1)
        rows = F.kl_div((ours / heat).log_softmax(-1), theirs, reduction="none", log_target=True).sum(-1)
        divergence = (rows * batch.loss_weights).sum()
        assert divergence > 0.1
        torch.testing.assert_close(output.metrics[name], divergence.detach(), rtol=1e-4, atol=1e-5)
        expected = expected + teacher.share * heat**2 * divergence
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-4, atol=1e-5)
    assert not any(values.requires_grad for values in output.metrics.values())
    weights = [net.head.weight, net.decoder.embed_tokens.weight]
    for mine, truth in zip(*(torch.autograd.grad(e, weights) for e in (output.loss_sum, expected)), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-3, atol=1e-4)


def test_a_pack_of_dummy_documents_has_no_weight() -> None:
    net = build_model(config("hybrid", mlp=MOE))
    spec = media_spec(net.config)
    batch = pack([image_document(spec, 1, 1, [(2, 2), (2, 2)], VOCAB, dummy=True)], spec)
    output = NextToken()(net, batch)
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_weights_of_images_and_text_give_one_loss_for_any_division() -> None:
    """Emu3 (arXiv 2409.18869), section 2.4: the labels of image tokens count half."""
    net = build_model(config(None)).double()
    spec = media_spec(net.config)
    docs = []
    for number in range(6):
        tokens = text_document(number, 5 + 2 * number, VOCAB).tokens
        document = plain_document(spec, tokens, 0, (), Provenance("d", "s", "k", number))
        drawn = np.arange(document.num_tokens) % 4 > 1
        weights = document.loss_weights * np.where(np.append(drawn[1:], False), 0.5, 1).astype(np.float32)
        docs.append(replace(document, loss_weights=weights, drawn=drawn))
    whole = collate([Pack(tuple(docs), 0)], spec)
    assert whole.drawn_labels is not None
    images, text = whole.drawn_labels, ~whole.drawn_labels & (whole.labels != IGNORE)
    losses = F.cross_entropy(net.head(net(whole).hidden), whole.labels, reduction="none", ignore_index=IGNORE)
    expected = (0.5 * losses[images].sum() + losses[text].sum()) / (0.5 * images.sum() + text.sum())
    for ranks in ([[0, 1, 2, 3, 4, 5]], [[0], [1, 2], [3], [4, 5]], [[5, 0, 3], [4, 2, 1]]):
        batches = [collate([Pack(tuple(docs[number] for number in rank), 0)], spec) for rank in ranks]
        weight = sum(NextToken().weight(batch) for batch in batches)
        found = sum(NextToken()(net, batch).loss_sum / weight for batch in batches)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("recipe", ["emoji-draw", "janus-1.3b"])
def test_the_rows_that_a_batch_lists_give_the_same_bits(recipe: str) -> None:
    """Text and codes of images, by one head or two: as if the loss had looked for the rows with a weight."""
    run = shrink_run(load_run(REPO / f"configs/recipes/{recipe}.yaml", []).value)
    net: Any = build_model(run.model, seed=0)
    batch: Any = drawn_batch(net.config.decoder, run.stage_media(0))
    assert len(batch.learned.text)
    assert len(batch.learned.codes)
    assert torch.equal(batch.learned.index(), batch.loss_weights.nonzero().flatten())
    outputs = [NextToken(0.1)(net, each) for each in (batch, replace(batch, learned=None))]
    assert torch.equal(outputs[0].document_losses, outputs[1].document_losses)
    gradients = [torch.autograd.grad(each.loss_sum, net.decoder.parameters(), allow_unused=True) for each in outputs]
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(*gradients, strict=True))
