"""Generation with caches against forward passes over the whole sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_pipeline.batch import Segments
from data_pipeline.media_spec import MediaSpec
from mmscale.models.build import media_spec
from mmscale.models.generation import generate
from mmscale.models.kv_cache import KVCache
from mmscale.models.multimodal import MultimodalModel
from mmscale.models.sampling import SamplingConfig, choose_tokens
from tests.models.packs import Doc, image_document, pack, text_document
from tests.models.tiny import CONNECTORS, LEARNED, MOE, VOCAB, model

KINDS = [None, *CONNECTORS]


def prompts(net: MultimodalModel) -> tuple[list[Doc], MediaSpec]:
    """Return prompts of different lengths, with and without images, and a dummy document."""
    spec = media_spec(net.config)
    docs = [text_document(1, 4, VOCAB), text_document(2, 9, VOCAB)]
    if net.config.connector is not None:
        sizes = [(2, 4)] if spec.fixed_grid else [(2, 2), (4, 4)]
        docs.insert(1, image_document(spec, 3, 0, [sizes[0], sizes[-1]], VOCAB))  # ends on an image
        docs.append(image_document(spec, 4, 2, [sizes[-1], sizes[0]], VOCAB))
        docs.append(image_document(spec, 9, 1, [sizes[0], sizes[0]], VOCAB, dummy=True))
    return docs, spec


VARIANTS = {
    "dense": {},
    "moe": {"mlp": MOE},
    "learned": {"vision": LEARNED},
    "a table of positions": {"rope": None, "learned_positions": 40},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_a_full_forward_for_every_token(kind: str | None, variant: dict[str, Any]) -> None:
    net = model(kind, **variant)
    docs, spec = prompts(net)
    generated = generate(net, pack(docs, spec), 6, eos_id=-1)
    with torch.no_grad():
        for _ in range(6):
            batch = pack(docs, spec)
            ends = torch.tensor(batch.segments.bounds[1:]) - 1
            for doc, token in zip(docs, net.head(net(batch).hidden[ends]).argmax(-1).tolist(), strict=True):
                doc.tokens.append(token)
    assert generated == [doc.tokens[-6:] for doc in docs if not doc.dummy]
    assert len({tuple(row) for row in generated}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_logits_token_by_token_equal_those_of_the_whole(kind: str | None) -> None:
    net = model(kind)
    docs, spec = prompts(net)
    batch = pack(docs, spec)
    continued = [[*doc.tokens, 7, 11, 5] for doc in docs]
    cache = KVCache(capacity=batch.segments.longest + 3)
    rows = [net(batch, cache=cache).hidden]
    lengths = torch.tensor([len(doc.tokens) for doc in docs])
    steps = Segments.from_lengths([1] * len(docs))
    for number, token in enumerate((7, 11, 5)):
        step = pack([Doc([token], spans=[(0, [])]) for _ in docs], media_spec(model(None).config))
        step = type(step)(step.token_ids, step.labels, step.loss_weights, lengths + number, steps, step.valid, {})
        rows.append(net(step, cache=cache).hidden)
    for doc, tokens in zip(docs, continued, strict=True):
        doc.tokens = tokens
    whole = pack(docs, spec)
    expected = net.head(net(whole).hidden)
    for number, (start, end) in enumerate(zip(whole.segments.bounds, whole.segments.bounds[1:], strict=False)):
        prompt = rows[0][batch.segments.bounds[number] : batch.segments.bounds[number + 1]]
        ours = net.head(torch.cat([prompt, *(row[number : number + 1] for row in rows[1:])]))
        torch.testing.assert_close(ours, expected[start:end], rtol=1e-4, atol=2e-5)


def test_stops_at_the_end_token_and_leaves_it_out() -> None:
    net = model("hybrid")
    docs, spec = prompts(net)
    free = generate(net, pack(docs, spec), 8, eos_id=-1)
    eos = free[0][3]
    stopped = generate(net, pack(docs, spec), 8, eos_id=eos)
    assert stopped == [row[: row.index(eos)] if eos in row else row for row in free]
    assert generate(net, pack(docs, spec), 8, eos_id=eos, any_running=lambda _: True) == stopped


def test_stop_ids_and_the_callback_end_a_sequence() -> None:
    net = model("hybrid")
    docs, spec = prompts(net)
    free = generate(net, pack(docs, spec), 8, eos_id=-1)
    stop = free[1][2]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert generate(net, pack(docs, spec), 8, eos_id=-1, stop_ids=[stop]) == expected != free
    watched: dict[int, list[list[int]]] = {}

    def watch(number: int, tokens: list[int]) -> bool:
        watched.setdefault(number, []).append(list(tokens))
        return number == 0 and len(tokens) == 3

    assert generate(net, pack(docs, spec), 8, eos_id=-1, watch=watch) == [free[0][:3], *free[1:]]
    assert watched[0] == [free[0][:1], free[0][:2], free[0][:3]]
    assert watched[1][-1] == free[1]


def test_a_batch_that_has_ended_makes_forward_passes_while_another_rank_generates() -> None:
    net = model(None)
    docs, spec = prompts(net)
    first = [row[0] for row in generate(net, pack(docs[:1], spec), 1, eos_id=-1)]
    calls = []
    net.decoder.register_forward_hook(lambda *_: calls.append(1))
    assert generate(net, pack(docs[:1], spec), 5, eos_id=first[0]) == [[]]
    assert len(calls) == 1
    calls.clear()
    elsewhere = [True, True, False]
    seen = []
    assert generate(
        net, pack(docs[:1], spec), 5, eos_id=first[0], any_running=lambda own: seen.append(own) or elsewhere.pop(0)
    ) == [[]]
    assert len(calls) == 3
    assert seen == [False] * 3


def test_nucleus_draws_only_from_the_nucleus_with_the_right_odds() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05])
    logits = probabilities.log().expand(20_000, 5)
    generator = torch.Generator().manual_seed(0)
    counts = (
        torch.bincount(choose_tokens(logits, SamplingConfig(temperature=1, top_p=0.85), generator), minlength=5)
        / 20_000
    )
    # 0.5 + 0.3 = 0.8 is below 0.85, so the token with 0.1 is kept and the others are dropped.
    torch.testing.assert_close(counts, torch.tensor([1 / 9, 5 / 9, 0, 3 / 9, 0]), atol=0.02, rtol=0)
    sharp = SamplingConfig(temperature=0.01, top_p=1.0)
    assert torch.equal(choose_tokens(logits[:50], sharp, generator), choose_tokens(logits[:50], SamplingConfig(), None))


def test_a_row_with_its_own_generator_is_drawn_as_if_alone() -> None:
    logits, sampling = torch.randn(4, 50), SamplingConfig(temperature=1, top_k=20, min_p=0.01)
    seeded = [torch.Generator().manual_seed(seed) for seed in range(4)]
    together = [choose_tokens(logits, sampling, seeded) for _ in range(3)]
    for number, row in enumerate(logits.split(1)):
        own = torch.Generator().manual_seed(number)
        alone = [choose_tokens(row, sampling, own) for _ in range(3)]
        assert [step[number] for step in together] == alone


def test_the_same_seed_draws_the_same_text() -> None:
    net = model("embedding")
    docs, spec = prompts(net)
    sampling = SamplingConfig(temperature=2.0, top_p=1.0, seed=4)
    rows = [generate(net, pack(docs, spec), 6, eos_id=-1, sampling=sampling) for _ in range(2)]
    assert rows[0] == rows[1]
    other = SamplingConfig(temperature=2.0, top_p=1.0, seed=5)
    assert generate(net, pack(docs, spec), 6, eos_id=-1, sampling=other) != rows[0]


def test_a_sequence_that_outgrows_the_cache_is_refused() -> None:
    net = model(None)
    docs, spec = prompts(net)
    with pytest.raises(ValueError, match="the cache holds 5 a sequence"):
        net(pack(docs, spec), cache=KVCache(capacity=5))
