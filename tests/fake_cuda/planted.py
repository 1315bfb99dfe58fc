"""Faults to plant in the model: each must be found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from mmscale.nn import attention_backends, rms_norm


def _around(owner: Any, name: str, change: Callable[..., Any]) -> Callable[[], None]:
    right = getattr(owner, name)
    setattr(owner, name, lambda *args, **options: change(right, *args, **options))
    return lambda: setattr(owner, name, right)


def item(right: Any, self: Any, x: torch.Tensor) -> Any:
    return right(self, x) * float(x.detach().abs().amax())


def host_tensor(right: Any, self: Any, x: torch.Tensor) -> Any:
    return right(self, x) + torch.ones(x.shape[-1])


def upload(right: Any, self: Any, x: torch.Tensor) -> Any:
    return right(self, x) + torch.ones(x.shape[-1]).to(x.device)


def unpinned(right: Any, self: Any, x: torch.Tensor) -> Any:
    return right(self, x) + torch.ones(x.shape[-1]).to(x.device, non_blocking=True)


def host_index(right: Any, self: Any, x: torch.Tensor) -> Any:
    return right(self, x[torch.arange(len(x))])


def float64(right: Any, self: Any, x: torch.Tensor) -> Any:
    return right(self, x.double()).to(x.dtype)


def strided_query(right: Any, q: Any, *rest: Any) -> Any:
    return right(q.transpose(1, 2).contiguous().transpose(1, 2), *rest)


def long_bounds(right: Any, q: Any, k: Any, v: Any, queries: Any, keys: Any, *rest: Any) -> Any:
    return right(q, k, v, replace(queries, cu=queries.cu.long()), keys, *rest)


def host_bounds(right: Any, q: Any, k: Any, v: Any, queries: Any, keys: Any, *rest: Any) -> Any:
    return right(q, k, v, replace(queries, cu=torch.zeros(queries.num + 1, dtype=torch.int32)), keys, *rest)


def float32_query(right: Any, q: Any, *rest: Any) -> Any:
    return right(q.float(), *rest)


_NORM = (item, host_tensor, upload, unpinned, host_index, float64)
PLANTS = {plant.__name__: plant for plant in (*_NORM, strided_query, long_bounds, host_bounds, float32_query)}


@contextmanager
def active(name: str) -> Iterator[None]:
    """Plant a fault in every norm, or in every call of flash-attn; no fault for an empty name."""
    if not name:
        yield
        return
    plant = PLANTS[name]
    owner, attribute = (rms_norm.RmsNorm, "forward") if plant in _NORM else (attention_backends, "_flash")
    undo = _around(owner, attribute, plant)
    try:
        yield
    finally:
        undo()
