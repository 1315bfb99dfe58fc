"""Attention with branches against a dense softmax with the mask of the definition: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.batch import BranchedSegments, Segments
from mmscale.nn.attention_backends import _kernel_plan, varlen_attention
from mmscale.nn.block import AttentionConfig, NormConfig, SelfAttention
from mmscale.nn.rope import Rotation

Shape = tuple[int, list[int]]
"""Number of shared tokens, and number of tokens of each branch; empty for a document without branches."""

SHAPES = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 40), min_size=2, max_size=5) | st.just([])),
    min_size=1,
    max_size=5,
)


def branched(shapes: list[Shape]) -> BranchedSegments:
    documents = []
    for shared, branches in shapes:
        starts = [shared + sum(branches[:i]) for i in range(len(branches))]
        documents.append((shared + sum(branches), tuple(starts)))
    return BranchedSegments.from_branches(documents)


def mask(shapes: list[Shape]) -> Tensor:
    """Return (T, T), True for keys of the same document that are not later and not in another branch."""
    owner = [
        (document, branch)
        for document, (shared, branches) in enumerate(shapes)
        for branch, length in enumerate([shared, *branches])
        for _ in range(length)
    ]
    rows = [
        [j <= i and other[0] == own[0] and other[1] in (0, own[1]) for j, other in enumerate(owner)]
        for i, own in enumerate(owner)
    ]
    return torch.tensor(rows)


def dense(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.einsum("qhk,thk->hqt", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqt,thk->qhk", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


@given(shapes=SHAPES)
def test_each_branch_sees_what_is_shared_and_itself(shapes: list[Shape]) -> None:
    visible = mask(shapes)
    generator = torch.Generator().manual_seed(len(visible))
    q = torch.randn(len(visible), 2, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(len(visible), 1, 8, generator=generator, requires_grad=True) for _ in range(2))
    output_gradient = torch.randn(q.shape, generator=generator)
    pieces = branched(shapes)
    gathered = k[pieces.key_tokens], v[pieces.key_tokens]
    results = []
    for out in (
        varlen_attention(q, *gathered, pieces.queries, pieces.keys, True, "sdpa"),
        dense(q, k, v, visible),
    ):
        results.append((out, *torch.autograd.grad(out, (q, k, v), output_gradient)))
    for ours, reference in zip(*results, strict=True):
        # Worst difference in 2,000 random cases: 4e-6, float32 rounding of sums of a few hundred terms.
        torch.testing.assert_close(ours, reference, atol=2e-5, rtol=1e-5)


def test_a_layer_takes_branches_for_segments() -> None:
    """Self-attention with projections and rotation equals one document per branch: shared rows, then the branch."""
    shared, branches = 7, [3, 1, 5]
    layer = SelfAttention(16, AttentionConfig(num_heads=4, num_kv_heads=2), NormConfig(), "sdpa", causal=True)
    hidden = torch.randn(shared + sum(branches), 16)
    angles = torch.randn(len(hidden), 2)
    out = layer(hidden, Rotation.from_angles(angles, torch.float32), branched([(shared, branches)]))
    start = shared
    for length in branches:
        rows = torch.cat([torch.arange(shared), torch.arange(start, start + length)])
        alone = layer(
            hidden[rows], Rotation.from_angles(angles[rows], torch.float32), Segments.from_lengths([len(rows)])
        )
        torch.testing.assert_close(out[rows], alone, atol=1e-6, rtol=1e-5)
        start += length


@pytest.mark.parametrize("lengths", [[12, 40, 12], [3, 4, 5], [33]])
def test_documents_without_branches_run_the_same_kernels_beside_others(lengths: list[int]) -> None:
    """Bitwise equal to segments: the same kernel calls, without a mask in memory."""
    generator = torch.Generator().manual_seed(1)
    count = sum(lengths)
    rows = torch.randn(count + 70, 3, 2, 8, generator=generator)
    plain = Segments.from_lengths(lengths)
    q, k, v = rows[:count].unbind(1)
    alone = varlen_attention(q, k, v, plain, plain, True, "sdpa")
    pieces = branched([*((length, []) for length in lengths), (50, [12, 4, 4])])
    q, k, v = rows.unbind(1)
    together = varlen_attention(
        q, k[pieces.key_tokens], v[pieces.key_tokens], pieces.queries, pieces.keys, True, "sdpa"
    )
    assert torch.equal(together[:count], alone)
    calls = _kernel_plan(pieces.queries.bounds, pieces.keys.bounds, True, torch.device("cpu")).groups
    assert sum(group.num for group in calls if group.is_causal) == len(lengths) + 1
    assert all(group.mask is None for group in calls if group.is_causal)


@pytest.mark.gpu
def test_cuda_kernels_agree_on_branches(gpu: torch.device) -> None:
    """The kernel that ``auto`` chooses gives SDPA's attention over branches of a document."""
    from mmscale.nn.attention_backends import resolve_backend

    pieces = branched([(70, [20, 5, 130]), (64, [])])
    queries, keys = (Segments(part.cu.to(gpu), part.bounds) for part in (pieces.queries, pieces.keys))
    q, k, v = (torch.randn(pieces.queries.total, h, 64, device=gpu, dtype=torch.bfloat16) for h in (4, 2, 2))
    k, v = k[pieces.key_tokens.to(gpu)], v[pieces.key_tokens.to(gpu)]
    reference = varlen_attention(q, k, v, queries, keys, True, "sdpa")
    fast = varlen_attention(q, k, v, queries, keys, True, resolve_backend("auto", q.dtype))
    torch.testing.assert_close(fast, reference, atol=2e-2, rtol=2e-2)  # bfloat16 has 8 bits
