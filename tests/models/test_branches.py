"""A document with branches equals one document per branch: same loss and gradients in every kind of model."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DatasetConfig
from data_pipeline.document import Document
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.sample import ImagePart, Provenance, Sample
from mmscale.models.build import media_spec
from mmscale.models.kv_cache import KVCache
from mmscale.models.multimodal import MultimodalModel
from mmscale.objectives.next_token import NextToken
from tests.models.tiny import CONNECTORS, MOE, VOCAB, model

QUESTIONS = [("what?", "a cat"), ("colour:", "red"), ("how many are there in this picture?", "3"), ("x", "y")]
SECTIONS = {"rope": {"sections": [1, 1, 2]}}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in CONNECTORS),
    ("embedding", {"mlp": MOE}),
    ("hybrid", {"mlp": MOE}),
    ("embedding", SECTIONS),
    ("embedding", {"rope": None, "learned_positions": 60}),  # The whole document has more tokens, but no branch does.
]


class Letters:
    """A tokenizer of single letters with the vocabulary size of the tiny models."""

    bos_id, eos_id, pad_id, image_id, vocab_size, fingerprint = 1, 2, 0, 3, VOCAB, "letters"

    def encode(self, text: str) -> list[int]:
        return [4 + ord(letter) % (VOCAB - 4) for letter in text]

    def decode(self, ids: Any) -> str:
        return str(ids)


def build(spec: MediaSpec, questions: list[tuple[str, str]]) -> Document:
    out = io.BytesIO()
    pixels = np.random.default_rng(7).integers(0, 256, (4, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    transforms = {"kind": "fixed"} if spec.fixed_grid else {"kind": "native", "min_pixels": 16}
    config = {"name": "d", "manifest": "m", "template": {"kind": "annotations"}, "transforms": transforms}
    fields = {"annotations": [{"question": question, "answer": answer} for question, answer in questions]}
    sample = Sample((ImagePart(out.getvalue(), "png"),), fields, Provenance("d", "s", "k", 0))
    return DocumentBuilder(DatasetConfig.model_validate(config), Letters(), spec)(sample)  # type: ignore[arg-type]


def batch_of(documents: list[Document], spec: MediaSpec) -> MultimodalBatch:
    return collate([Pack(tuple(documents), 0)], spec)


def losses_and_gradients(net: MultimodalModel, batch: MultimodalBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Use only the cross-entropy: shared tokens count more often in balance losses if each branch is a document."""
    net.zero_grad()
    output = net(batch)
    loss = net.head(output.hidden, labels=batch.labels, loss_weights=batch.loss_weights)
    loss.backward()
    return loss.detach(), {n: torch.zeros(()) if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}


def test_the_layout_of_a_document_with_branches() -> None:
    spec = media_spec(model("embedding").config)
    document = build(spec, QUESTIONS[:2])
    apart = [build(spec, [question]) for question in QUESTIONS[:2]]
    shared = document.branches[0]
    assert shared == apart[0].images[0].stop
    assert document.branches == (shared, apart[0].num_tokens)
    assert document.token_ids.tolist() == [*apart[0].token_ids.tolist(), *apart[1].token_ids[shared:].tolist()]
    assert document.position_ids.tolist() == [*apart[0].position_ids.tolist(), *apart[1].position_ids[shared:].tolist()]
    assert document.labels.tolist() == [*apart[0].labels.tolist(), *apart[1].labels[shared:].tolist()]
    assert len(document.items) == 1
    assert apart[0].branches == ()
    assert document.loss_weights[document.loss_weights > 0].tolist() == pytest.approx(
        [2**-0.5] * (len("a cat") + len("red") + 2)
    )


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_branches_train_like_separate_documents(kind: str, options: dict[str, Any]) -> None:
    net = model(kind, **options)
    spec = media_spec(net.config)
    # The same pack has a document with other branches and one without branches: they must not affect each other.
    sets = [QUESTIONS, QUESTIONS[1:3], QUESTIONS[3:]]
    together = batch_of([build(spec, questions) for questions in sets], spec)
    apart = [
        replace(document, loss_weights=document.loss_weights / np.sqrt(len(questions), dtype=np.float32))
        for questions in sets
        for document in (build(spec, [question]) for question in questions)
    ]
    separate = batch_of(apart, spec)
    assert separate.branched is None
    assert together.branched is not None
    assert together.weight == pytest.approx(separate.weight, rel=1e-6)
    assert together.segments.total < separate.segments.total  # The image and its tokens occur once.
    assert together.media["image"].items.total < separate.media["image"].items.total
    loss, gradients = losses_and_gradients(net, together)
    expected, wanted = losses_and_gradients(net, separate)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert largest > 0
    for name, gradient in wanted.items():
        # Measured worst 1e-6 of the largest gradient: float32 sums in another order.
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)


@settings(max_examples=15, deadline=None)
@given(
    questions=st.lists(
        st.lists(
            st.tuples(st.text("abc?", min_size=1, max_size=30), st.text("xyz", min_size=1, max_size=30)),
            min_size=1,
            max_size=5,
        ),
        min_size=1,
        max_size=3,
    ),
    kind=st.sampled_from(["embedding", "cross_attention"]),
)
def test_any_branches_have_the_loss_of_separate_documents(questions: list[list[tuple[str, str]]], kind: str) -> None:
    net = model(kind)
    spec = media_spec(net.config)
    together = batch_of([build(spec, one) for one in questions], spec)
    apart = batch_of([build(spec, [pair]) for one in questions for pair in one], spec)
    with torch.no_grad():
        losses = NextToken()(net, together).document_losses
        separate = NextToken()(net, apart).document_losses.split([len(one) for one in questions])
    expected = torch.stack([part.sum() / len(part) ** 0.5 for part in separate])
    torch.testing.assert_close(losses, expected, rtol=2e-5, atol=0)


def test_a_branch_is_independent_of_the_others() -> None:
    """Changing other answers must not change a result at all."""
    net = model("embedding")
    spec = media_spec(net.config)
    rows = []
    for word in ("a cat", "b dog"):
        document = build(spec, [("what?", word), QUESTIONS[1]])
        batch = batch_of([document], spec)
        rows.append(net(batch).hidden[document.branches[1] :])
    assert torch.equal(*rows)


@pytest.mark.parametrize("kind", ["embedding", "cross_attention"])
def test_router_statistics_count_every_token_once(kind: str) -> None:
    """Router losses count each token of the batch once, shared tokens too."""
    net = model(kind, mlp=MOE)
    spec = media_spec(net.config)
    document = build(spec, QUESTIONS)
    batch = batch_of([document], spec)
    assert batch.num_tokens == int(batch.valid.sum()) == document.num_tokens
    seen: list[int] = []
    for layer in net.decoder.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: seen.append(int(inputs[1].valid.sum())))
    out = NextToken()(net, batch)
    assert seen == [document.num_tokens] * len(seen)
    assert seen
    assert {"router_balance", "router_z"} <= set(out.metrics)


def test_operations_count_what_is_shared_once() -> None:
    """Compare the formula with a sum: projections per token, and rectangles of pairs per branch."""
    net = model("embedding")
    spec = media_spec(net.config)
    document = build(spec, QUESTIONS)
    branched = batch_of([document], spec)
    plain = batch_of([replace(document, branches=())], spec)
    decoder = net.config.decoder
    fork, total = document.branches[0], document.num_tokens
    lengths = np.diff([*document.branches, total])
    area = fork**2 + sum(int(length) * (fork + int(length)) for length in lengths)
    width = decoder.attention.num_heads * decoder.attention.resolved_head_dim(decoder.hidden_dim)
    assert net.flops(plain) - net.flops(branched) == decoder.num_layers * 4 * (total**2 - area) * width
    assert net.flops(branched) < net.flops(batch_of([build(spec, [question]) for question in QUESTIONS], spec))


def test_a_cache_is_refused() -> None:
    net = model("embedding")
    spec = media_spec(net.config)
    with pytest.raises(ValueError, match="several ends"):
        net(batch_of([build(spec, QUESTIONS)], spec), KVCache(capacity=99))
