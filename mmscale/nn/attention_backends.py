"""Attention over packed segments: one signature, three kernels.

Not for: projections, positions, caches (``attention.py``).

    sdpa          anywhere; segments of like length are stacked into one call each
    flash         flash-attn's ``flash_attn_varlen_func`` on CUDA
    torch_varlen  ``torch.nn.attention.varlen`` on CUDA, built into torch
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import Segments
from mmscale.errors import UnsupportedError

Backend = Literal["sdpa", "flash", "torch_varlen"]
"""A kernel that is known to exist here."""

AttentionChoice = Literal["auto", "sdpa", "flash", "torch_varlen"]
"""What a configuration may ask for."""

_KERNEL_DTYPES = (torch.bfloat16, torch.float16)
# Segments up to _SHORT rows share a call if the shortest fills _FILL of the longest: there a call costs more than
# padding (64 captions of 5-30 tokens: 6-8 ms against 11-12 for a call each; no gain from 30 rows on. EPYC, 1 thread).
_SHORT, _FILL = 32, 0.7


def resolve_backend(choice: AttentionChoice, dtype: torch.dtype | None = None) -> Backend:
    """Picks the kernel once, when a model is built.

    Args:
        choice: A kernel's name, or ``auto``: on CUDA flash-attn if installed, else torch's varlen kernel if this torch
            has one, else sdpa; on other devices sdpa.
        dtype: Compute dtype if known; ``auto`` avoids the CUDA kernels for float32, which they do not take.

    Raises:
        UnsupportedError: a kernel was named that this machine lacks.
    """
    cuda = torch.cuda.is_available()
    flash = importlib.util.find_spec("flash_attn") is not None
    varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    if choice == "auto":
        if not cuda or dtype not in (None, *_KERNEL_DTYPES):
            return "sdpa"
        return "flash" if flash else "torch_varlen" if varlen else "sdpa"
    if choice == "flash" and not (flash and cuda):
        missing = "package flash-attn (pip install 'mmscale[flash]')" if cuda else "CUDA device"
        raise UnsupportedError(f"attention=flash: this machine has no {missing}; attention=sdpa works anywhere")
    if choice == "torch_varlen" and not (varlen and cuda):
        missing = "torch.nn.attention.varlen (install torch 2.11 or later)" if cuda else "CUDA device"
        raise UnsupportedError(f"attention=torch_varlen: this machine has no {missing}; attention=sdpa works anywhere")
    return choice


def varlen_attention(
    q: Float[Tensor, "Tq H K"],
    k: Float[Tensor, "Tk G K"],
    v: Float[Tensor, "Tk G K"],
    query_segments: Segments,
    key_segments: Segments,
    causal: bool,
    backend: Backend,
) -> Float[Tensor, "Tq H K"]:
    """Softmax attention of each query segment to the key segment of the same number; scale ``1 / sqrt(K)``.

    Args:
        q: Queries.
        k: Keys; G divides H, each key head serves ``H / G`` consecutive query heads.
        v: Values.
        query_segments: Partition of the Tq rows.
        key_segments: Partition of the Tk rows into equally many pieces; a piece may be empty, its queries yield zeros.
        causal: Query i of a segment sees keys up to ``i + (keys - queries)``: equal pieces give the usual triangle,
            shorter query pieces are the last rows of their key piece (decoding with a cache).
        backend: From ``resolve_backend``.

    Raises:
        UnsupportedError: a CUDA kernel was handed float32.
    """
    if backend == "sdpa":
        return _sdpa(q, k, v, query_segments, key_segments, causal)
    if q.dtype not in _KERNEL_DTYPES:
        raise UnsupportedError(
            f"attention={backend} takes bfloat16 or float16, got {q.dtype}: set engine.attention=sdpa or bf16"
        )
    if backend == "flash":
        return _flash(q, k, v, query_segments, key_segments, causal)
    return _torch_varlen(q, k, v, query_segments, key_segments, causal)


def _flash(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, causal: bool) -> Tensor:
    kernel: Any = importlib.import_module("flash_attn").flash_attn_varlen_func
    return kernel(q, k, v, queries.cu, keys.cu, queries.longest, keys.longest, causal=causal)


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, causal: bool) -> Tensor:
    kernel: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:  # Its enable_gqa exists from torch 2.13 on only.
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    window = (-1, 0) if causal else (-1, -1)
    return kernel(q, k, v, queries.cu, keys.cu, queries.longest, keys.longest, window_size=window)


@dataclass(frozen=True)
class _Group:
    """Segments that share one call, padded to ``queries`` and ``keys`` rows each.

    ``mask`` is ``(num, 1, queries, keys)``, True where visible.
    """

    num: int
    queries: int
    keys: int
    is_causal: bool
    mask: Tensor | None


@dataclass(frozen=True)
class _Plan:
    """All calls for one pair of partitions.

    ``query_rows`` and ``key_rows`` bring packed rows into the order of the groups, padding included; None where they
    lie so already. ``restore`` brings results back; it points one row past them for queries without keys.
    """

    groups: tuple[_Group, ...]
    query_rows: Tensor | None
    key_rows: Tensor | None
    restore: Tensor | None
    has_keyless: bool


def _sdpa(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, causal: bool) -> Tensor:
    plan = _plan(queries.bounds, keys.bounds, causal, q.device)
    if not plan.groups:  # Sums over no rows: zeros that keep q, k and v in the graph.
        return torch.zeros_like(q) + (q[:0].sum() + k[:0].sum() + v[:0].sum())
    query_sizes = [group.num * group.queries for group in plan.groups]
    key_sizes = [group.num * group.keys for group in plan.groups]
    # One gather and one split: slicing piece by piece would make a gradient of all rows for every piece.
    parts = zip(
        plan.groups,
        _ordered(q, plan.query_rows).split(query_sizes),
        _ordered(k, plan.key_rows).split(key_sizes),
        _ordered(v, plan.key_rows).split(key_sizes),
        strict=True,
    )
    outputs = []
    for group, query, key, value in parts:
        stacked = F.scaled_dot_product_attention(
            query.view(group.num, group.queries, *q.shape[1:]).transpose(1, 2),
            key.view(group.num, group.keys, *k.shape[1:]).transpose(1, 2),
            value.view(group.num, group.keys, *v.shape[1:]).transpose(1, 2),
            attn_mask=group.mask,
            is_causal=group.is_causal,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(stacked.transpose(1, 2).flatten(0, 1))  # (num * queries, H, K)
    if plan.has_keyless:
        outputs.append(q.new_zeros(1, *q.shape[1:]))
    result = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _ordered(result, plan.restore)


def _ordered(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else rows.index_select(0, index)


@lru_cache(maxsize=64)
def _plan(query_bounds: tuple[int, ...], key_bounds: tuple[int, ...], causal: bool, device: torch.device) -> _Plan:
    """Groups segments; cached, because every block of a forward and backward asks for the same."""
    query_lengths, key_lengths = np.diff(query_bounds), np.diff(key_bounds)
    alive = np.flatnonzero((query_lengths > 0) & (key_lengths > 0))
    keyless = bool(((query_lengths > 0) & (key_lengths == 0)).any())
    groups = []
    query_rows: list[np.ndarray] = []
    key_rows: list[np.ndarray] = []
    restore = np.full(query_bounds[-1], -1, dtype=np.int64)
    done = 0
    with torch.inference_mode(False):  # Cached index tensors must be usable by autograd later on.
        for members in _partition(alive, query_lengths, key_lengths, causal):
            group = _group(query_lengths[members], key_lengths[members], causal, device)
            groups.append(group)
            query_rows.append(_padded_rows(members, query_bounds, group.queries))
            key_rows.append(_padded_rows(members, key_bounds, group.keys))
            for segment in members:
                first, end = query_bounds[segment : segment + 2]
                restore[first:end] = np.arange(done, done + end - first)
                done += group.queries
        restore[restore < 0] = done
        return _Plan(
            tuple(groups),
            _index(query_rows, query_bounds[-1], device),
            _index(key_rows, key_bounds[-1], device),
            _index([restore], done, device),
            keyless,
        )


def _index(pieces: list[np.ndarray], num_rows: int, device: torch.device) -> Tensor | None:
    """The pieces as one index, or None if it would leave ``num_rows`` rows as they are."""
    rows = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
    if len(rows) == num_rows and bool((rows == np.arange(num_rows)).all()):
        return None
    return torch.from_numpy(rows).to(device)


def _partition(alive: np.ndarray, query_lengths: np.ndarray, key_lengths: np.ndarray, causal: bool) -> list[list[int]]:
    """Segments that share a call, each list ascending; long ones only with their like.

    Under a causal mask those with more keys than queries need a mask in memory; they never slow down the others.
    """
    masked = causal & (query_lengths != key_lengths)
    order = alive[np.lexsort((query_lengths[alive], key_lengths[alive], masked[alive]))[::-1]]
    parts: list[list[int]] = []
    limit = (0, 0)
    for segment in order.tolist():
        size = (int(query_lengths[segment]), int(key_lengths[segment]))
        fits = all(size[i] <= limit[i] and size[i] >= limit[i] * _fill(limit[i]) for i in (0, 1))
        if parts and fits and masked[segment] == masked[parts[-1][0]]:
            parts[-1].append(segment)
        else:
            parts.append([segment])
            limit = size
    return sorted(sorted(part) for part in parts)


def _fill(longest: int) -> float:
    """Least share of the longest that a segment must have to share its call."""
    return _FILL if longest <= _SHORT else 1.0


def _group(query_lengths: np.ndarray, key_lengths: np.ndarray, causal: bool, device: torch.device) -> _Group:
    num, queries, keys = len(query_lengths), int(query_lengths.max()), int(key_lengths.max())
    # Padding sits after a segment's rows, so the triangle alone hides padded keys from every real query.
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
    # Rows that see nothing have no softmax: padded ones, dropped later, see the first key instead.
    visible = visible | ((key == 0) & (np.arange(queries)[None, :, None] >= query_lengths[:, None, None]))
    return _Group(num, queries, keys, is_causal=False, mask=torch.from_numpy(visible[:, None].copy()).to(device))


def _padded_rows(members: list[int], bounds: tuple[int, ...], length: int) -> np.ndarray:
    """Rows of each member, then its last row again up to ``length``."""
    starts = np.array([bounds[segment] for segment in members], dtype=np.int64)
    ends = np.array([bounds[segment + 1] for segment in members], dtype=np.int64)
    return np.minimum(starts[:, None] + np.arange(length)[None, :], ends[:, None] - 1).reshape(-1)
