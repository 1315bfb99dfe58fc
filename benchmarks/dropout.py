"""Dropout with hashed masks compared with generators, forward and backward: ``python -m benchmarks.dropout --json``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.report import Case, best_seconds, main
from data_pipeline.order.randomness import mix
from mmscale.nn.dropout import Dropout, SubLayer

ROWS, DIM, RATE, LANES = 4096, 1024, 0.1, 4


def ours(values: Tensor) -> Tensor:
    """Masks from a hash."""
    dropout = Dropout.for_microbatch(RATE, (1, 0), range(LANES), [len(values) // LANES] * LANES, values.device)
    return dropout(values, SubLayer.ATTENTION)


def generator_per_lane(values: Tensor) -> Tensor:
    """Masks that are as reproducible as ours on one kind of device: a seeded generator per lane, block and branch."""
    generator = torch.Generator(values.device)
    kept = torch.empty_like(values, dtype=torch.bool)
    for lane, rows in enumerate(kept.chunk(LANES)):
        rows.bernoulli_(1 - RATE, generator=generator.manual_seed(mix(lane)))
    return values.masked_fill(~kept, 0.0) * (1 / (1 - RATE))


def plain_torch(values: Tensor) -> Tensor:
    """Masks from the process's generator; they depend on all earlier random numbers."""
    return F.dropout(values, RATE)


PEERS: dict[str, Callable[[Tensor], Tensor]] = {"generator per lane": generator_per_lane, "torch": plain_torch}


def _milliseconds(function: Callable[[Tensor], Tensor], values: Tensor) -> float:
    def run() -> None:
        torch.autograd.grad(function(values).sum(), values)
        if values.is_cuda:
            torch.cuda.synchronize()

    return 1000 * best_seconds(run, repeats=7)


def measure() -> list[Case]:
    """Return milliseconds, the fastest of seven runs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.randn(ROWS, DIM, device=device, requires_grad=True)
    peers = {name: _milliseconds(peer, values) for name, peer in PEERS.items()}
    return [Case(f"dropout of {ROWS} rows x {DIM} channels, float32", _milliseconds(ours, values), peers, "ms")]


if __name__ == "__main__":
    main("dropout", measure)
