"""Compare packed attention with other ways to batch segments: ``python -m benchmarks.attention --json``.

Measures forward and backward of one layer's attention, without projections. *Hugging Face* is the attention function of
its models on the output of its collator: segments padded to the longest, with the mask that its models build per batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.report import Case, best_seconds, main
from data_pipeline.batch import Segments
from mmscale.nn.attention_backends import Backend, resolve_backend, varlen_attention

Attend = Callable[[Tensor, Tensor, Tensor, Segments, bool], Tensor]


def per_segment(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """One call per segment."""
    lengths = [b - a for a, b in zip(segments.bounds, segments.bounds[1:], strict=False)]
    pieces = []
    for parts in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        query, key, value = (part.transpose(0, 1)[None] for part in parts)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces)


def padded(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """All segments padded to the longest, with a mask."""
    lengths = [b - a for a, b in zip(segments.bounds, segments.bounds[1:], strict=False)]
    query, key, value = (pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v))
    places = torch.arange(max(lengths), device=q.device)
    mask = (places < torch.tensor(lengths, device=q.device)[:, None])[:, None, None, :]
    if causal:
        mask = mask & (places <= places[:, None])
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    return torch.cat([row[:length] for row, length in zip(out, lengths, strict=True)])


def dense_mask(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """One sequence with a block-diagonal mask."""
    lengths = torch.tensor(segments.bounds, device=q.device).diff()
    owner = torch.arange(segments.num, device=q.device).repeat_interleave(lengths)
    mask = owner[:, None] == owner
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.tril() if causal else mask, enable_gqa=True)
    return out[0].transpose(0, 1)


def hugging_face(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """transformers' ``sdpa`` on padded segments, without a mask if none is needed."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    lengths = [b - a for a, b in zip(segments.bounds, segments.bounds[1:], strict=False)]
    query, key, value = (pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v))
    layer: Any = torch.nn.Module()
    layer.num_key_value_groups = q.shape[1] // k.shape[1]
    mask = _padding_mask(tuple(lengths), causal, q.device)
    out, _ = sdpa_attention_forward(layer, query, key, value, mask, is_causal=causal)  # (S, longest, H, K)
    return torch.cat([row[:length] for row, length in zip(out, lengths, strict=True)])


@lru_cache(maxsize=8)
def _padding_mask(lengths: tuple[int, ...], causal: bool, device: torch.device) -> Tensor | None:
    if len(set(lengths)) == 1:
        return None
    places = torch.arange(max(lengths), device=device)
    mask = (places < torch.tensor(lengths, device=device)[:, None])[:, None, None, :]
    mask = mask.expand(-1, 1, len(places), -1)
    return mask & (places <= places[:, None]) if causal else mask


PEERS: dict[str, Attend] = {
    "per segment": per_segment,
    "padded": padded,
    "dense mask": dense_mask,
    "hugging face": hugging_face,
}


def cases() -> dict[str, tuple[list[int], bool, tuple[int, int, int]]]:
    """Return segment lengths, causality, and (query heads, key heads, head channels)."""
    generator = torch.Generator().manual_seed(0)
    captions = torch.randint(5, 31, (64,), generator=generator).tolist()
    return {
        "64 captions of 5-30 tokens": (captions, True, (6, 2, 32)),
        "64 images of 16 patches": ([16] * 64, False, (6, 6, 32)),
        "12 images of 100-400 patches": (
            torch.randint(100, 401, (12,), generator=generator).tolist(),
            False,
            (8, 8, 64),
        ),
        "6 documents in 2048 tokens": ([700, 512, 400, 256, 120, 60], True, (8, 8, 64)),
    }


def _seconds(attend: Attend, tensors: list[Tensor], segments: Segments, causal: bool) -> float:
    def run() -> None:
        out = attend(tensors[0], tensors[1], tensors[2], segments, causal)
        torch.autograd.grad(out.sum(), tensors)
        if out.is_cuda:
            torch.cuda.synchronize()

    return best_seconds(run, repeats=7)


def measure() -> list[Case]:
    """Return milliseconds, the fastest of seven runs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    backend: Backend = resolve_backend("auto", dtype)

    def ours(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
        return varlen_attention(q, k, v, segments, segments, causal, backend)

    rows = []
    for name, (lengths, causal, (heads, key_heads, width)) in cases().items():
        segments = Segments.from_lengths(lengths)
        segments = Segments(segments.cu.to(device), segments.bounds)
        shapes = [(segments.total, count, width) for count in (heads, key_heads, key_heads)]
        tensors = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
        peers = {peer: 1000 * _seconds(attend, tensors, segments, causal) for peer, attend in PEERS.items()}
        rows.append(Case(f"{name}, {backend}", 1000 * _seconds(ours, tensors, segments, causal), peers, "ms"))
    return rows


if __name__ == "__main__":
    main("attention", measure)
