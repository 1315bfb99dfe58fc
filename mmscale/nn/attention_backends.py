"""Attention over packed segments: one signature, three kernels.

Projections and rotary positions are in ``block.py``, caches in ``layer_cache.py``.

    sdpa          any device; one call for each group of segments of similar length
    flash         flash-attn's ``flash_attn_varlen_func`` on CUDA
    torch_varlen  ``torch.nn.attention.varlen`` on CUDA, built into torch
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import Segments
from mmscale.errors import UnsupportedError
from mmscale.nn.dropout import Dropout
from mmscale.nn.host import to_device

Backend = Literal["sdpa", "flash", "torch_varlen"]
"""A kernel that this machine has, as returned by ``resolve_backend``."""

AttentionChoice = Literal["auto", "sdpa", "flash", "torch_varlen"]
"""Value of ``engine.attention``: a kernel, or ``auto`` to choose one."""

_KERNEL_DTYPES = (torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)  # flash-attn 2 needs it, and so does torch's varlen kernel, which calls a copy.
# Segments of up to _SHORT rows share a call if the shortest has at least _FILL times the rows of the longest: at this
# length a call costs more than padding. 64 captions of 5-30 tokens take 6-8 ms instead of 11-12 with a call each; from
# 30 rows on there is no gain (EPYC, 1 thread).
_SHORT, _FILL = 32, 0.7


def resolve_backend(choice: AttentionChoice, dtype: torch.dtype | None = None) -> Backend:
    """Return the kernel to use. Called once, when a model is built.

    Args:
        choice: A kernel's name, or ``auto``. On a GPU of compute capability 8.0 or higher, ``auto`` returns flash-attn
            if it is installed, else torch's varlen kernel if this torch has one. Elsewhere it returns sdpa.
        dtype: Compute dtype; None: torch's default dtype. For dtypes other than bfloat16 and float16 ``auto`` returns
            sdpa, because the other kernels do not support them.

    Raises:
        UnsupportedError: this machine lacks the kernel named by ``choice``.
    """
    cuda = torch.cuda.is_available()
    is_old = cuda and torch.cuda.get_device_capability() < _LEAST_CAPABILITY
    flash = importlib.util.find_spec("flash_attn") is not None
    varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    if choice == "auto":
        if not cuda or is_old or (dtype or torch.get_default_dtype()) not in _KERNEL_DTYPES:
            return "sdpa"
        return "flash" if flash else "torch_varlen" if varlen else "sdpa"
    if choice == "flash" and not (flash and cuda):
        missing = "package flash-attn (pip install 'mmscale[flash]')" if cuda else "CUDA device"
        raise UnsupportedError(f"engine.attention=flash: this machine has no {missing}; sdpa works anywhere")
    if choice == "torch_varlen" and not (varlen and cuda):
        missing = "torch.nn.attention.varlen (install torch 2.11 or later)" if cuda else "CUDA device"
        raise UnsupportedError(f"engine.attention=torch_varlen: this machine has no {missing}; sdpa works anywhere")
    if choice != "sdpa" and is_old:
        raise UnsupportedError(
            f"engine.attention={choice} needs a GPU of compute capability 8.0 (Ampere) or higher, and "
            f"{torch.cuda.get_device_name()} has {'.'.join(map(str, torch.cuda.get_device_capability()))}; sdpa works "
            "anywhere"
        )
    return choice


def check_backend(choice: AttentionChoice, dtype: torch.dtype) -> None:
    """Check that this machine has the kernel, and that the kernel computes in ``dtype``.

    Raises:
        UnsupportedError: it has not, or it does not.
    """
    _require_kernel_dtype(resolve_backend(choice, dtype), dtype)


def _require_kernel_dtype(backend: Backend, dtype: torch.dtype) -> None:
    if backend != "sdpa" and dtype not in _KERNEL_DTYPES:
        raise UnsupportedError(
            f"engine.attention={backend} takes bfloat16 or float16, not {dtype}: set engine.attention=sdpa or "
            "engine.precision=bf16"
        )


def varlen_attention(
    q: Float[Tensor, "Tq H K"],
    k: Float[Tensor, "Tk G K"],
    v: Float[Tensor, "Tk G K"],
    query_segments: Segments,
    key_segments: Segments,
    causal: bool,
    backend: Backend,
    dropout: Dropout | None = None,
) -> Float[Tensor, "Tq H K"]:
    """Return softmax attention of each query segment over the key segment with the same index; scale ``1 / sqrt(K)``.

    Args:
        q: Queries.
        k: Keys. G must divide H; each key head serves ``H / G`` consecutive query heads.
        v: Values.
        query_segments: Partition of the Tq rows.
        key_segments: Partition of the Tk rows into the same number of segments. For an empty key segment the result is
            zeros.
        causal: Query i of a segment attends to keys up to ``i + (num_keys - num_queries)``. If a segment has fewer
            queries than keys, its queries are the last rows (decoding with a cache).
        backend: From ``resolve_backend``.
        dropout: Masks; those with an ``attention_rate`` apply to the probabilities, which are then computed segment by
            segment and kept for the backward pass. None for no dropout.

    Raises:
        UnsupportedError: a CUDA kernel was called with a dtype other than bfloat16 or float16, or with dropout.
    """
    if dropout is not None and dropout.attention_rate:
        check_dropout(backend, dropout.attention_rate)
        return _with_dropout(q, k, v, query_segments, key_segments, causal, dropout)
    if backend == "sdpa":
        return _sdpa(q, k, v, query_segments, key_segments, causal)
    _require_kernel_dtype(backend, q.dtype)
    if backend == "flash":
        return _flash(q, k, v, query_segments, key_segments, causal)
    return _torch_varlen(q, k, v, query_segments, key_segments, causal)


def check_dropout(backend: Backend, rate: float) -> None:
    """Raise ``UnsupportedError`` if a kernel cannot drop attention probabilities with the masks of ``Dropout``."""
    if rate and backend != "sdpa":
        raise UnsupportedError(
            f"decoder.attention_dropout={rate:g}: {backend} draws masks that depend on the number of ranks and has no "
            "other; set engine.attention=sdpa, whose memory then grows with the square of a document's length, or "
            "decoder.attention_dropout=0"
        )


def _with_dropout(
    q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, causal: bool, dropout: Dropout
) -> Tensor:
    repeats, scale, outputs = q.shape[1] // k.shape[1], q.shape[2] ** -0.5, list[Tensor]()
    bounds = zip(itertools.pairwise(queries.bounds), itertools.pairwise(keys.bounds), strict=True)
    for (first, stop), (first_key, last_key) in bounds:
        own, key, value = q[first:stop], k[first_key:last_key], v[first_key:last_key]
        key, value = (each.repeat_interleave(repeats, 1).transpose(0, 1) for each in (key, value))
        scores = (own.transpose(0, 1) @ key.transpose(1, 2)).float() * scale  # (H, Tq, Tk)
        if causal:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(hidden.triu(scores.shape[2] - scores.shape[1] + 1), -torch.inf)
        probabilities = dropout.on_probabilities(scores.softmax(-1).to(value.dtype), first)
        outputs.append((probabilities @ value).transpose(0, 1))
    return torch.cat(outputs)


def step_attention(
    q: Float[Tensor, "S H K"],
    k: Float[Tensor, "S longest G K"],
    v: Float[Tensor, "S longest G K"],
    mask: Bool[Tensor, "S 1 1 longest"] | None,
) -> Float[Tensor, "S H K"]:
    """Return softmax attention of one query per sequence over its keys, on any device; scale ``1 / sqrt(K)``.

    Args:
        q: Queries.
        k: Keys, padded to the longest sequence. G must divide H, as in ``varlen_attention``.
        v: Values.
        mask: Which rows belong to the sequence; None for all.
    """
    mixed = F.scaled_dot_product_attention(
        q.unsqueeze(2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=q.shape[1] != k.shape[2]
    )
    return mixed.squeeze(2)


def num_pairs(queries: Segments, keys: Segments) -> int:
    """Return the number of query-key pairs.

    Causal attention counts its full rectangle too, so that FLOPs and MFU are comparable with published ones.
    """
    return int(np.dot(np.diff(queries.bounds).astype(np.int64), np.diff(keys.bounds).astype(np.int64)))


def _flash(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, causal: bool) -> Tensor:
    kernel: Any = importlib.import_module("flash_attn").flash_attn_varlen_func
    return kernel(q, k, v, queries.cu, keys.cu, queries.longest, keys.longest, causal=causal)


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, causal: bool) -> Tensor:
    kernel: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    repeats, options = q.shape[1] // k.shape[1], {}
    if repeats > 1 and _takes_fewer_key_heads(kernel):
        options = {"enable_gqa": True}
    elif repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    window = (-1, 0) if causal else (-1, -1)
    return kernel(q, k, v, queries.cu, keys.cu, queries.longest, keys.longest, window_size=window, **options)


@lru_cache(maxsize=4)
def _takes_fewer_key_heads(kernel: Any) -> bool:
    # From torch 2.13 on. Otherwise the repeated keys and values take memory until the backward pass.
    return "enable_gqa" in inspect.signature(kernel).parameters


@dataclass(frozen=True)
class _Group:
    """``num`` segments that share one call, each padded to ``queries`` and ``keys`` rows.

    ``mask`` is ``(num, 1, queries, keys)``, True where a query may attend to a key; None for no mask.
    """

    num: int
    queries: int
    keys: int
    is_causal: bool
    mask: Tensor | None


@dataclass(frozen=True)
class _KernelPlan:
    """All calls for one pair of partitions.

    ``query_rows`` and ``key_rows`` are the indices that gather packed rows into the order of the groups, padding
    included; None if they are in this order already. ``restore`` gathers the results back into packed order; None if
    that changes nothing. For queries without keys, it points to a row of zeros after all results.
    """

    groups: tuple[_Group, ...]
    query_rows: Tensor | None
    key_rows: Tensor | None
    restore: Tensor | None
    has_keyless: bool


def _sdpa(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, causal: bool) -> Tensor:
    plan = _kernel_plan(queries.bounds, keys.bounds, causal, q.device)
    if not plan.groups:  # The sums over no rows are zeros that keep q, k and v in the graph.
        return torch.zeros_like(q) + (q[:0].sum() + k[:0].sum() + v[:0].sum())
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k.shape[1]
    if plan.query_rows is not None:
        q = q.index_select(0, plan.query_rows)
    if plan.key_rows is not None:
        k, v = k.index_select(0, plan.key_rows), v.index_select(0, plan.key_rows)
    # One gather and one split: slicing each segment would allocate a gradient of all rows for every segment.
    query_sizes = [group.num * group.queries for group in plan.groups]
    key_sizes = [group.num * group.keys for group in plan.groups]
    parts = zip(plan.groups, q.split(query_sizes), k.split(key_sizes), v.split(key_sizes), strict=True)
    outputs = []
    for group, query, key, value in parts:
        stacked = F.scaled_dot_product_attention(
            query.view(group.num, group.queries, num_heads, head_dim).transpose(1, 2),
            key.view(group.num, group.keys, num_kv_heads, head_dim).transpose(1, 2),
            value.view(group.num, group.keys, num_kv_heads, head_dim).transpose(1, 2),
            attn_mask=group.mask,
            is_causal=group.is_causal,
            enable_gqa=num_heads != num_kv_heads,
        )
        outputs.append(stacked.transpose(1, 2).flatten(0, 1))  # (num * queries, H, K)
    if plan.has_keyless:
        outputs.append(q.new_zeros(1, num_heads, head_dim))
    result = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return result if plan.restore is None else result.index_select(0, plan.restore)


@lru_cache(maxsize=64)
def _kernel_plan(
    query_bounds: tuple[int, ...], key_bounds: tuple[int, ...], causal: bool, device: torch.device
) -> _KernelPlan:
    """Group the segments. Cached, because every block of a forward and backward pass needs the same plan."""
    query_lengths, key_lengths = np.diff(query_bounds), np.diff(key_bounds)
    sides = (np.array(query_bounds), query_lengths), (np.array(key_bounds), key_lengths)
    groups: list[_Group] = []
    gathered: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    restore = np.full(query_bounds[-1], -1, dtype=np.int64)
    done = 0
    with torch.inference_mode(False):  # Otherwise autograd could not use the cached tensors later.
        for members in _partition(query_lengths, key_lengths, causal):
            group = _group(query_lengths[members], key_lengths[members], causal, device)
            groups.append(group)
            # Pad each member to the longest by repeating its last row.
            for (bounds, lengths), rows, longest in zip(sides, gathered, (group.queries, group.keys), strict=True):
                offsets = np.minimum(np.arange(longest)[None, :], lengths[members][:, None] - 1)
                rows.append((bounds[members][:, None] + offsets).reshape(-1))
            for segment in members:
                first, end = query_bounds[segment : segment + 2]
                restore[first:end] = np.arange(done, done + end - first)
                done += group.queries
        restore[restore < 0] = done
        indices: list[Tensor | None] = []
        for pieces, num_rows in ((gathered[0], query_bounds[-1]), (gathered[1], key_bounds[-1]), ([restore], done)):
            index = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
            is_identity = len(index) == num_rows and bool((index == np.arange(num_rows)).all())
            indices.append(None if is_identity else to_device(index, device))
    has_keyless = bool(((query_lengths > 0) & (key_lengths == 0)).any())
    return _KernelPlan(tuple(groups), indices[0], indices[1], indices[2], has_keyless)


def _partition(query_lengths: np.ndarray, key_lengths: np.ndarray, causal: bool) -> list[list[int]]:
    """Return the segments that share each call, as ascending lists of their indices.

    Segments longer than ``_SHORT`` share a call only if their lengths are equal. Segments without queries or keys are
    left out. With ``causal``, segments with different numbers of queries and keys need a mask in memory. They share no
    call with the others, so these can use the faster maskless kernel.
    """
    masked = causal & (query_lengths != key_lengths)
    alive = np.flatnonzero((query_lengths > 0) & (key_lengths > 0))
    order = alive[np.lexsort((query_lengths[alive], key_lengths[alive], masked[alive]))[::-1]]
    parts: list[list[int]] = []
    most, least = [0.0, 0.0], [0.0, 0.0]
    for segment in order.tolist():
        size = [float(query_lengths[segment]), float(key_lengths[segment])]
        fits = all(least[side] <= size[side] <= most[side] for side in (0, 1))
        if parts and fits and masked[segment] == masked[parts[-1][0]]:
            parts[-1].append(segment)
        else:
            parts.append([segment])
            most = size
            least = [longest * _FILL if longest <= _SHORT else longest for longest in size]
    return sorted(sorted(part) for part in parts)


def _group(query_lengths: np.ndarray, key_lengths: np.ndarray, causal: bool, device: torch.device) -> _Group:
    num, queries, keys = len(query_lengths), int(query_lengths.max()), int(key_lengths.max())
    # Padding comes after a segment's rows, so the causal mask alone hides padded keys from every real query.
    if causal and bool((query_lengths == key_lengths).all()):
        return _Group(num, queries, keys, is_causal=True, mask=None)
    ragged = bool((key_lengths != keys).any())
    if not ragged and (not causal or queries == 1):
        return _Group(num, queries, keys, is_causal=False, mask=None)
    key = np.arange(keys)[None, None, :]
    visible = np.broadcast_to(key < key_lengths[:, None, None], (num, queries, keys))
    if causal:
        last = np.arange(queries)[None, :] + (key_lengths - query_lengths)[:, None]
        visible = visible & (key <= last[:, :, None])
    # A row that attends to nothing has no softmax. Let padded queries attend to the first key; ``restore`` drops them.
    visible = visible | ((key == 0) & (np.arange(queries)[None, :, None] >= query_lengths[:, None, None]))
    return _Group(num, queries, keys, is_causal=False, mask=to_device(visible[:, None].copy(), device))
