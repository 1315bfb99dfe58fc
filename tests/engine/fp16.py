"""fp16 on gloo ranks, which the configuration rejects. It is slow, but uses the same wrappers as a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from mmscale.checkpoint import resume, save
from mmscale.dist import World, start_deepspeed
from mmscale.engine.precision import Precision
from tests.checkpoint.programs import digest, state_of, train_on
from tests.engine.programs import lanes_of, make_engine

TOO_LARGE = 2.0**40


@contextmanager
def forced(world: World) -> Iterator[None]:
    """Let engines that are created inside train in fp16, whatever their configuration is."""
    from deepspeed.accelerator import get_accelerator

    start_deepspeed(world)
    choose = mock.Mock(return_value=Precision("fp16", "forced by a test"))
    with (
        mock.patch("mmscale.engine.engine.choose_precision", choose),
        mock.patch("mmscale.engine.construct.choose_precision", choose),
        mock.patch.object(type(get_accelerator()), "is_fp16_supported", return_value=True),
    ):
        yield


def scaled_cases(world: World, zeros: list[int], directory: str) -> list[Any]:
    """For each ZeRO stage: one good step, two that overflow, save, resume, two more steps."""
    with forced(world):
        return [_case(world, zero, Path(directory) / str(zero)) for zero in zeros]


def _case(world: World, zero: int, folder: Path) -> dict[str, Any]:
    engine = make_engine(world, zero=zero)
    first = train_on(engine, world, 0, 1)
    engine.set_loss_scaler_state((engine.loss_scaler_state() or {}) | {"cur_scale": TOO_LARGE})
    refused = [engine.train_step(lanes_of(world, step)).applied for step in (1, 2)]
    path = save(engine, state_of(world, 3), folder)
    answer = {"first": first, "refused": refused, "scaler": engine.loss_scaler_state(), "saved": digest(engine, world)}
    answer["after"] = train_on(engine, world, 3, 5)
    engine.close()
    fresh = make_engine(world, zero=zero)
    resume(fresh, path)
    answer |= {"restored": digest(fresh, world), "restored_scaler": fresh.loss_scaler_state()}
    answer["resumed"] = train_on(fresh, world, 3, 5)
    fresh.close()
    return answer
