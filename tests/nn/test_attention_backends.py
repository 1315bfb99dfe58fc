"""Packed attention against a dense masked softmax: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.batch import Segments
from mmscale.errors import UnsupportedError
from mmscale.models.build import build_model, media_spec
from mmscale.nn.attention_backends import resolve_backend, varlen_attention
from tests.fake_cuda import contracts
from tests.models.packs import pack, text_document
from tests.models.tiny import VOCAB, config


def dense(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, causal: bool) -> Tensor:
    """Return attention from one (Tq, Tk) matrix per head; rows that attend to nothing are zero."""
    visible = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    for s in range(queries.num):
        first, end = queries.bounds[s : s + 2]
        key_first, key_end = keys.bounds[s : s + 2]
        for row in range(first, end):
            seen = key_end - key_first
            if causal:
                seen = max(0, row - first + 1 + (key_end - key_first) - (end - first))
            visible[row, key_first : key_first + seen] = True
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.einsum("qhk,thk->hqt", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, -1e30).softmax(-1) * visible
    return torch.einsum("hqt,thk->qhk", weights, v)


def compare(query_lengths: list[int], key_lengths: list[int], causal: bool, kv_heads: int = 1) -> None:
    queries, keys = Segments.from_lengths(query_lengths), Segments.from_lengths(key_lengths)
    generator = torch.Generator().manual_seed(sum(query_lengths) + 7 * sum(key_lengths))
    q = torch.randn(queries.total, 2, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(keys.total, kv_heads, 8, generator=generator, requires_grad=True) for _ in range(2))
    output_gradient = torch.randn(q.shape, generator=generator)
    results = []
    for attend in (
        lambda: varlen_attention(q, k, v, queries, keys, causal, "sdpa"),
        lambda: dense(q, k, v, queries, keys, causal),
    ):
        out = attend()
        results.append((out, *torch.autograd.grad(out, (q, k, v), output_gradient)))
    for ours, reference in zip(*results, strict=True):
        # Worst difference in 10,000 random cases: 2e-6, float32 rounding of sums of up to 100 terms.
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)


LENGTHS = st.lists(st.integers(0, 9) | st.sampled_from([32, 33, 40, 41, 60]), min_size=1, max_size=9)


@given(lengths=LENGTHS.filter(sum), kv_heads=st.sampled_from([1, 2]), causal=st.booleans())
def test_self_attention_of_any_lengths(lengths: list[int], kv_heads: int, causal: bool) -> None:
    compare(lengths, lengths, causal, kv_heads)


@given(pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 40)), min_size=1, max_size=9))
def test_cross_attention_with_segments_that_have_no_keys(pairs: list[tuple[int, int]]) -> None:
    queries, keys = [q for q, _ in pairs], [k for _, k in pairs]
    if sum(queries):
        compare(queries, keys, causal=False)


@given(pairs=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 40)), min_size=1, max_size=9))
def test_queries_are_the_last_rows_of_longer_keys(pairs: list[tuple[int, int]]) -> None:
    compare([new for new, _ in pairs], [new + old for new, old in pairs], causal=True)


@given(olds=st.lists(st.integers(0, 40), min_size=1, max_size=9))
def test_one_token_at_a_time(olds: list[int]) -> None:
    compare([1] * len(olds), [old + 1 for old in olds], causal=True)


def test_without_any_key_the_result_is_zero_and_still_in_the_graph() -> None:
    segments, none = Segments.from_lengths([3]), Segments.from_lengths([0])
    q = torch.randn(3, 2, 4, requires_grad=True)
    k, v = (torch.randn(0, 2, 4, requires_grad=True) for _ in range(2))
    out = varlen_attention(q, k, v, segments, none, False, "sdpa")
    out.sum().backward()
    assert not out.any()
    assert q.grad is not None
    assert not q.grad.any()
    assert k.grad is not None


def test_equal_segments_are_a_view() -> None:
    """64 images of 16 patches need one call and no gather."""
    from mmscale.nn.attention_backends import _kernel_plan

    bounds = tuple(range(0, 65 * 16, 16))
    plan = _kernel_plan(bounds, bounds, False, torch.device("cpu"))
    (group,) = plan.groups
    assert (group.num, group.queries, group.keys) == (64, 16, 16)
    assert plan.query_rows is None
    assert plan.key_rows is None
    assert plan.restore is None


def test_a_plan_made_while_generating_serves_training() -> None:
    segments = Segments.from_lengths([3, 5, 3])
    q = torch.randn(11, 1, 4, requires_grad=True)
    with torch.inference_mode():
        varlen_attention(q, q, q, segments, segments, True, "sdpa")
    varlen_attention(q, q, q, segments, segments, True, "sdpa").sum().backward()
    assert q.grad is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message of machines without CUDA")
@pytest.mark.parametrize("choice", ["flash", "torch_varlen"])
def test_a_missing_kernel_is_refused_when_named(choice: str) -> None:
    with pytest.raises(UnsupportedError, match="sdpa works anywhere"):
        resolve_backend(choice)  # type: ignore[arg-type]
    assert resolve_backend("auto") == "sdpa"


def test_auto_chooses_a_kernel_that_computes_in_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is loaded to generate has float32 parameters, which only SDPA takes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with contracts.installed():
        assert resolve_backend("auto", torch.bfloat16) == "flash"
        assert resolve_backend("auto", torch.float32) == resolve_backend("auto") == "sdpa"
        model = build_model(config(None))
        batch = pack([text_document(1, 9, VOCAB)], media_spec(model.config))
        assert model(batch).hidden.dtype is torch.float32


def test_an_old_card_gets_sdpa_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with contracts.installed():
        assert resolve_backend("auto", torch.float16) == resolve_backend("sdpa") == "sdpa"
        for choice in ("flash", "torch_varlen"):
            with pytest.raises(UnsupportedError, match=rf"{choice} needs .*Tesla T4 has 7\.5; sdpa works"):
                resolve_backend(choice, torch.float16)  # type: ignore[arg-type]
