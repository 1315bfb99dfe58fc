"""A stand-in for an engine that has the interface which checkpoints use, with plain tensors and any world size."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.dist import World
from mmscale.engine.partition import OwnedRange, shard_range
from mmscale.optim.config import AdamWConfig


class PlainPartition:
    """The partition of one rank: an equal part of every parameter, with its moments and average."""

    def __init__(self, model: nn.Module, rank: int, world_size: int) -> None:
        self._model = model
        self._ranges = {name: shard_range(p.numel(), rank, world_size) for name, p in model.named_parameters()}
        self.moments: dict[str, dict[str, Tensor]] = {
            name: {kind: torch.full((self._length(name),), -9.0) for kind in ("exp_avg", "exp_avg_sq", "ema")}
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self.steps = 0
        self.whole = {"decoder.norm.weight|exp_avg_sq_row": torch.zeros(3)}
        self.calls: list[str] = []

    def _length(self, name: str) -> int:
        start, stop = self._ranges[name]
        return stop - start

    def owned(self, *, whole: bool = False) -> Iterator[OwnedRange]:
        del whole  # No value is stored on two ranks.
        for name, parameter in self._model.named_parameters():
            start, stop = self._ranges[name]
            if start < stop:
                values = parameter.data.view(-1)[start:stop]
                yield OwnedRange(name, start, stop, values, {**self.moments.get(name, {})}, parameter.requires_grad)

    def whole_state(self) -> dict[str, Tensor]:
        return self.whole

    def optimizer_steps(self) -> int:
        return self.steps

    def set_optimizer_steps(self, steps: int) -> None:
        self.steps = steps

    def begin_average(self) -> None:
        self.calls.append("average begun")

    def publish(self) -> None:
        self.calls.append("published")


def plain_engine(model: nn.Module, rank: int = 0, world_size: int = 1) -> Any:
    """Return a stand-in engine for ``save``, ``resume`` and ``warm_start``. Each rank has a world of size 1."""
    engine = SimpleNamespace(
        model=model,
        world=World(0, 1, 0, torch.device("cpu")),
        partition=PlainPartition(model, rank, world_size),
        stage=SimpleNamespace(name="all", optimizer=AdamWConfig(), ema=True),
        stage_step=0,
        scaler=None,
        frozen_sources={},
        config=SimpleNamespace(zero_stage=1),
        precision=SimpleNamespace(name="fp32"),
    )
    engine.loss_scaler_state = lambda: engine.scaler
    engine.set_loss_scaler_state = lambda state: setattr(engine, "scaler", state)
    return engine
