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
_SHORT = 32  # Segments up to this long are padded into one call: a call costs more than their padding.
_FILL = 0.8  # Longer segments share a call if the shortest fills this much of the longest.


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
class _Rows:
    """Where a stack of ``num`` x ``length`` rows comes from: a contiguous stretch, or gathered."""

    start: int
    length: int
    num: int
    index: Tensor | None

    def stack(self, packed: Tensor) -> Tensor:
        """``(num, heads, length, K)``."""
        if self.index is None:
            rows = packed.narrow(0, self.start, self.num * self.length)
        else:
            rows = packed.index_select(0, self.index)
        return rows.view(self.num, self.length, *packed.shape[1:]).transpose(1, 2)


@dataclass(frozen=True)
class _Group:
    """Segments that share one call; ``mask`` is ``(num, 1, Lq, Lk)``, True where visible."""

    queries: _Rows
    keys: _Rows
    is_causal: bool
    mask: Tensor | None


@dataclass(frozen=True)
class _Plan:
    """All calls for one pair of partitions. ``restore`` brings stacked results into packed order.

    ``restore`` points one row past the results for queries without keys.
    """

    groups: tuple[_Group, ...]
    restore: Tensor | None
    has_keyless: bool


def _sdpa(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, causal: bool) -> Tensor:
    plan = _plan(queries.bounds, keys.bounds, causal, q.device)
    if not plan.groups:  # Sums over no rows: zeros that keep q, k and v in the graph.
        return torch.zeros_like(q) + (q[:0].sum() + k[:0].sum() + v[:0].sum())
    outputs = []
    for group in plan.groups:
        stacked = F.scaled_dot_product_attention(
            group.queries.stack(q),
            group.keys.stack(k),
            group.keys.stack(v),
            attn_mask=group.mask,
            is_causal=group.is_causal,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(stacked.transpose(1, 2).flatten(0, 1))  # (num * Lq, H, K)
    if plan.has_keyless:
        outputs.append(q.new_zeros(1, *q.shape[1:]))
    result = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return result if plan.restore is None else result.index_select(0, plan.restore)


@lru_cache(maxsize=64)
def _plan(query_bounds: tuple[int, ...], key_bounds: tuple[int, ...], causal: bool, device: torch.device) -> _Plan:
    """Groups segments; cached, because every block of a forward and backward asks for the same."""
    query_lengths = np.diff(query_bounds)
    key_lengths = np.diff(key_bounds)
    alive = np.flatnonzero((query_lengths > 0) & (key_lengths > 0))
    keyless = bool(((query_lengths > 0) & (key_lengths == 0)).any())
    groups = []
    past_the_end = 0
    restore = np.full(query_bounds[-1], -1, dtype=np.int64)
    with torch.inference_mode(False):  # Cached index tensors must be usable by autograd later on.
        for members in _partition(alive, query_lengths, key_lengths):
            group = _group(members, query_bounds, key_bounds, causal, device)
            groups.append(group)
            for number, segment in enumerate(members):
                first = past_the_end + number * group.queries.length
                restore[query_bounds[segment] : query_bounds[segment + 1]] = np.arange(
                    first, first + query_lengths[segment]
                )
            past_the_end += len(members) * group.queries.length
        restore[restore < 0] = past_the_end
        identity = past_the_end == len(restore) and bool((restore == np.arange(len(restore))).all())
        index = None if identity else torch.from_numpy(restore).to(device)
    return _Plan(tuple(groups), index, keyless)


def _partition(alive: np.ndarray, query_lengths: np.ndarray, key_lengths: np.ndarray) -> list[list[int]]:
    """Segments that share a call, each list ascending; long ones only with their like."""
    if len(alive) == 0:
        return []
    order = alive[np.lexsort((query_lengths[alive], key_lengths[alive]))[::-1]]
    parts: list[list[int]] = []
    limit = (0, 0)
    for segment in order.tolist():
        size = (int(query_lengths[segment]), int(key_lengths[segment]))
        fits = all(size[i] <= limit[i] and (limit[i] <= _SHORT or size[i] >= _FILL * limit[i]) for i in (0, 1))
        if parts and fits:
            parts[-1].append(segment)
        else:
            parts.append([segment])
            limit = size
    return sorted(sorted(part) for part in parts)


def _group(
    members: list[int],
    query_bounds: tuple[int, ...],
    key_bounds: tuple[int, ...],
    causal: bool,
    device: torch.device,
) -> _Group:
    query_rows, query_lengths = _rows(members, query_bounds, device)
    key_rows, key_lengths = _rows(members, key_bounds, device)
    aligned = bool((query_lengths == key_lengths).all())
    # Padding sits after a segment's rows, so the triangle alone hides padded keys from every real query.
    if causal and aligned:
        return _Group(query_rows, key_rows, is_causal=True, mask=None)
    ragged = bool((key_lengths != key_rows.length).any())
    if not ragged and (not causal or query_rows.length == 1):
        return _Group(query_rows, key_rows, is_causal=False, mask=None)
    key = np.arange(key_rows.length)
    visible = np.broadcast_to(
        key[None, None, :] < key_lengths[:, None, None], (len(members), query_rows.length, key_rows.length)
    )
    if causal:
        last = np.arange(query_rows.length)[None, :] + (key_lengths - query_lengths)[:, None]
        # Padded query rows are dropped later; they must see something, or their softmax is not a number.
        last = np.clip(last, 0, None)
        visible = visible & (key[None, None, :] <= last[:, :, None])
    mask = torch.from_numpy(visible[:, None].copy()).to(device)
    return _Group(query_rows, key_rows, is_causal=False, mask=mask)


def _rows(members: list[int], bounds: tuple[int, ...], device: torch.device) -> tuple[_Rows, np.ndarray]:
    starts = np.array([bounds[segment] for segment in members])
    lengths = np.array([bounds[segment + 1] for segment in members]) - starts
    longest = int(lengths.max())
    contiguous = bool((starts == starts[0] + longest * np.arange(len(members))).all() and (lengths == longest).all())
    if contiguous:
        return _Rows(int(starts[0]), longest, len(members), None), lengths
    place = np.minimum(np.arange(longest)[None, :], lengths[:, None] - 1)  # Padding repeats the last row.
    index = torch.from_numpy((starts[:, None] + place).reshape(-1)).to(device)
    return _Rows(0, longest, len(members), index), lengths
