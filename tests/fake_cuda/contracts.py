"""Stand-ins for CUDA kernels that check every documented precondition and compute by reference.

They accept fake tensors too, whose values cannot be checked. Source: ``flash_attn_varlen_func`` of flash-attn 2.8,
``torch.nn.attention.varlen.varlen_attn`` of torch 2.11, ``torch.nn.functional.grouped_mm`` with the checks of
``torch._meta_registrations._meta_grouped_mm_common``, and ``torch._fused_adamw_`` with those of
``aten/src/ATen/native/ForeachUtils.h``.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

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


def check_strides(rows: Tensor, name: str) -> None:
    """One of the last two dimensions is contiguous, and the other has strides of whole 16 bytes."""
    first, last = rows.stride()[-2:]
    if first == 1 and last >= max(1, rows.shape[-2]):
        pitch = last
    else:
        require(last == 1 and first >= max(1, rows.shape[-1]), f"{name} has strides {rows.stride()}: no matrix")
        pitch = first
    require(pitch * rows.element_size() % 16 == 0, f"{name} has stride {pitch}: no multiple of 16 bytes")


def grouped_mm(mat_a: Tensor, mat_b: Tensor, *, offs: Tensor) -> Tensor:
    """Rows by group times a stack of matrices; for two matrices, one product for each group of the shared dimension."""
    for name, each in (("mat_a", mat_a), ("mat_b", mat_b)):
        require(each.dtype is torch.bfloat16, f"{name} is {each.dtype}, not bfloat16")
        check_strides(each, name)
    require(mat_a.dim() == 2 and mat_b.dim() in (2, 3), f"{mat_a.dim()} and {mat_b.dim()} dimensions")
    require(offs.dtype is torch.int32 and offs.dim() == 1, f"offs is {offs.dtype} with {offs.dim()} dimensions")
    require(offs.device == mat_a.device == mat_b.device, "operands and offs are on different devices")
    inner = mat_b.shape[-2]
    require(mat_a.shape[1] == inner, f"{mat_a.shape[1]} columns times {inner} rows")
    if mat_b.dim() == 3:
        require(len(offs) == len(mat_b), f"{len(offs)} ends for {len(mat_b)} groups")
    if isinstance(mat_a, FakeTensor):
        shape = (len(offs), len(mat_a)) if mat_b.dim() == 2 else (len(mat_a),)
        return mat_a.new_empty(*shape, mat_b.shape[-1])
    ends = offs.tolist()
    shared = len(mat_a) if mat_b.dim() == 3 else inner
    bounds = list(itertools.pairwise([0, *ends]))
    require(all(a <= b for a, b in bounds) and ends[-1] == shared, f"groups end at {ends}, rows at {shared}")
    if mat_b.dim() == 3:
        parts = [mat_a[a:b].float() @ each.float() for (a, b), each in zip(bounds, mat_b, strict=True)]
        return torch.cat(parts).to(mat_a.dtype)
    return torch.stack([mat_a[:, a:b].float() @ mat_b[a:b].float() for a, b in bounds]).to(mat_a.dtype)


def has_grouped_kernel(rows: Tensor, gate_up_proj: Tensor) -> bool:
    """``mmscale.nn.experts._has_grouped_kernel`` on any device."""
    return rows.dtype is torch.bfloat16 and len(rows) > 0


def fused_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    largest: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One update in place by the formula (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2)."""
    require(not (amsgrad or maximize or largest), "neither amsgrad nor maximize is used here")
    require(grad_scale is None and found_inf is None, "DeepSpeed scales gradients itself")
    lists = (params, grads, means, squares, steps)
    require(len({len(each) for each in lists}) == 1, f"lists of {[len(each) for each in lists]} tensors")
    for param, grad, mean, square, step in zip(*lists, strict=True):
        for name, each in (("gradient", grad), ("mean", mean), ("square", square)):
            require(each.dtype is param.dtype, f"{name} is {each.dtype}, the parameter {param.dtype}")
            require(each.device == param.device, f"{name} is on {each.device}, the parameter on {param.device}")
            require(each.shape == param.shape, f"{name} has shape {each.shape}, the parameter {param.shape}")
            require(each.stride() == param.stride(), f"{name} has strides {each.stride()}, not {param.stride()}")
        require(step.dtype is torch.float32 and step.numel() == 1, f"a step count is {step.dtype}, not float32")
        require(step.device == param.device, f"a step count is on {step.device}, the parameter on {param.device}")
        rate, count = float(lr), 1.0 if isinstance(step, FakeTensor) else float(step)
        param.mul_(1 - rate * weight_decay)
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (square / (1 - beta2**count)).sqrt_().add_(eps)
        param.addcdiv_(mean, root, value=-rate / (1 - beta1**count))


@contextmanager
def installed() -> Iterator[None]:
    """Let ``flash_attn``, ``torch.nn.attention.varlen``, ``grouped_mm`` and fused AdamW be the stand-ins."""
    from torch.nn.attention import varlen

    from mmscale.nn import experts

    flash: Any = ModuleType("flash_attn")
    flash.flash_attn_varlen_func = flash_attn_varlen_func
    flash.__spec__ = object()  # ``importlib.util.find_spec`` reads it.
    with (
        mock.patch.dict(sys.modules, {"flash_attn": flash}),
        mock.patch.object(varlen, "varlen_attn", varlen_attn),
        mock.patch.object(torch.nn.functional, "grouped_mm", grouped_mm, create=True),
        mock.patch.object(experts, "_has_grouped_kernel", has_grouped_kernel),
        mock.patch.object(torch, "_fused_adamw_", fused_adamw),
    ):
        yield
