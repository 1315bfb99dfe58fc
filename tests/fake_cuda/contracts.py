"""Stand-ins for CUDA kernels that check every documented precondition and compute by reference.

They accept fake tensors too, whose values cannot be checked. Source: ``flash_attn_varlen_func`` of flash-attn 2.8,
``torch.nn.attention.varlen.varlen_attn`` of torch 2.11 and ``torch.nn.functional.grouped_mm``.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_LARGEST_HEAD = 256


class ContractError(AssertionError):
    """A kernel would refuse this call, or compute garbage."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise ContractError(what)


def check_rows(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, rows in (("q", q), ("k", k), ("v", v)):
        require(rows.dim() == 3, f"{name} has shape {tuple(rows.shape)}, not (rows, heads, head size)")
        require(rows.dtype in (torch.bfloat16, torch.float16), f"{name} is {rows.dtype}: kernels take 16-bit values")
        require(rows.dtype == q.dtype and rows.device == q.device, f"{name} differs from q in dtype or device")
        require(rows.stride(-1) == 1, f"{name} has stride {rows.stride(-1)} in its last dimension, not 1")
        require(rows.stride(0) % 8 == 0 or rows.shape[0] < 2, f"{name} has rows that are not 16-byte aligned")
        require(rows.shape[-1] == q.shape[-1], f"{name} has another head size than q")
    size = q.shape[-1]
    require(size % 8 == 0 and size <= _LARGEST_HEAD, f"head size {size}: a multiple of 8 up to {_LARGEST_HEAD}")
    require(k.shape == v.shape, "k and v differ in shape")
    require(q.shape[1] % k.shape[1] == 0, f"{k.shape[1]} key heads do not divide {q.shape[1]} query heads")


def check_bounds(cu: Tensor, rows: Tensor, longest: Any, name: str) -> None:
    require(cu.dtype is torch.int32, f"cu_seqlens_{name} is {cu.dtype}, not int32")
    require(cu.dim() == 1 and cu.is_contiguous(), f"cu_seqlens_{name} is no contiguous vector")
    require(cu.device == rows.device, f"cu_seqlens_{name} is on {cu.device}, the rows on {rows.device}")
    require(type(longest) is int, f"max_seqlen_{name} is a {type(longest).__name__}, not an int on the host")
    if isinstance(cu, FakeTensor):
        return
    bounds = cu.tolist()
    require(bounds[0] == 0 and bounds[-1] == len(rows), f"cu_seqlens_{name} goes from {bounds[0]} to {bounds[-1]}")
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    require(min(lengths, default=0) >= 0, f"cu_seqlens_{name} decreases")
    require(longest == max(lengths, default=0), f"max_seqlen_{name}={longest}, but the longest is {max(lengths)}")


def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool) -> Tensor:
    """Return attention by reference, in float32; fake tensors get the shape alone."""
    if isinstance(q, FakeTensor):
        return q * 1.0 + 0.0 * (k.sum() + v.sum())
    outputs = []
    repeats = q.shape[1] // k.shape[1]
    queries, keys = cu_q.tolist(), cu_k.tolist()
    for number in range(len(queries) - 1):
        own = q[queries[number] : queries[number + 1]].float().transpose(0, 1)
        others = (each[keys[number] : keys[number + 1]].float().transpose(0, 1) for each in (k, v))
        key, value = (each.repeat_interleave(repeats, 0) for each in others)
        scores = own @ key.transpose(1, 2) / q.shape[-1] ** 0.5
        if causal:
            rows, columns = scores.shape[-2:]
            hidden = torch.ones(rows, columns, dtype=torch.bool).triu(1 + columns - rows)
            scores = scores.masked_fill(hidden, float("-inf"))
        outputs.append((scores.softmax(-1).nan_to_num() @ value).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
) -> Tensor:
    check_rows(q, k, v)
    check_bounds(cu_seqlens_q, q, max_seqlen_q, "q")
    check_bounds(cu_seqlens_k, k, max_seqlen_k, "k")
    require(len(cu_seqlens_q) == len(cu_seqlens_k), "queries and keys have different numbers of segments")
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    require(window_size in ((-1, -1), (-1, 0)), f"window_size={window_size}: full or causal")
    require(enable_gqa or query.shape[1] == key.shape[1], "fewer key heads than query heads need enable_gqa")
    causal = window_size == (-1, 0)
    return flash_attn_varlen_func(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=causal)


@contextmanager
def installed() -> Iterator[None]:
    """Let ``flash_attn`` and ``torch.nn.attention.varlen`` be the stand-ins."""
    from torch.nn.attention import varlen

    flash: Any = ModuleType("flash_attn")
    flash.flash_attn_varlen_func = flash_attn_varlen_func
    flash.__spec__ = object()  # ``importlib.util.find_spec`` reads it.
    right, before = varlen.varlen_attn, sys.modules.get("flash_attn")
    sys.modules["flash_attn"], varlen.varlen_attn = flash, varlen_attn  # type: ignore[assignment]
    try:
        yield
    finally:
        varlen.varlen_attn = right
        if before is None:
            del sys.modules["flash_attn"]
        else:
            sys.modules["flash_attn"] = before
