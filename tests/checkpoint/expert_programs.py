"""Programs that the ranks of ``test_experts.py`` run: checkpoints of engines that share or gather experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmscale.checkpoint import TrainState, resume, save, warm_start
from mmscale.dist import World
from mmscale.engine.engine import Engine
from tests.checkpoint.programs import digest
from tests.engine.expert_programs import batches, make_engine, whole

CASES: dict[str, dict[str, Any]] = {
    "average": {"stage": {"ema": {"decay": 0.5}}},
    "frozen bf16": {"precision": "bf16", "stage": {"train": ["connector"]}},
    "adafactor bf16": {"precision": "bf16", "stage": {"optimizer": {"kind": "adafactor"}}},
}
STEPS = 2


def save_all(world: World, sizes: list[int], folder: str, names: list[str]) -> dict[str, Any]:
    """Train and save each case with each value of ``expert_parallel``; return state and next step by their names."""
    answers = {}
    for size in sizes:
        for name in names:
            engine = make_engine(world, size, **CASES[name])
            for step in range(STEPS):
                engine.train_step(batches(engine, world, step))
            save(engine, TrainState(step=STEPS, stage_step=STEPS), _place(folder, world.world_size, size, name))
            answers[f"{size}/{name}"] = {"state": digest(engine, world), "next": _next(engine, world)}
            engine.close()
    return answers


def resume_all(
    world: World,
    sizes: list[int],
    saved: list[tuple[int, int]],
    folder: str,
    names: list[str],
    again: str | None = None,
) -> dict[str, Any]:
    """Resume each case with each of ``sizes`` from each (ranks, ``expert_parallel``) that saved it.

    With ``again``, save what was resumed in that folder.
    """
    answers = {}
    for size in sizes:
        for name in names:
            engine = make_engine(world, size, **CASES[name])
            for ranks, their_size in saved:
                resume(engine, _path(folder, ranks, their_size, name))
                if again:
                    save(engine, TrainState(STEPS, stage_step=STEPS), _place(again, world.world_size, size, name))
                answer = {"state": digest(engine, world), "next": _next(engine, world)}
                answers[f"{size}/{ranks}/{their_size}/{name}"] = answer
            engine.close()
    return answers


def there_and_back(world: World, folder: str, names: list[str]) -> dict[str, Any]:
    """Save with shared experts, resume and save with gathered ones, resume with shared ones, in the same processes.

    Also load only the weights of the gathered experts into shared ones, and write them to ``warm.pt``.
    """
    ranks, again = world.world_size, f"{folder}/again"
    saved = save_all(world, [2], folder, names)
    there = resume_all(world, [1], [(ranks, 2)], folder, names, again)
    back = resume_all(world, [2], [(ranks, 1)], again, names)
    engine = make_engine(world, 2)
    complete = warm_start(engine, _path(again, ranks, 1, names[0])).complete
    weights = {key.rpartition("|")[0]: values for key, values in whole(engine, world).items() if "|weights" in key}
    engine.close()
    if world.is_main:
        torch.save(weights, Path(folder) / "warm.pt")
    return {"saved": saved, "there": there, "back": back, "complete": complete}


def _next(engine: Engine, world: World) -> list[float]:
    report = engine.train_step(batches(engine, world, STEPS))
    return [report.loss, report.grad_norm]


def _place(folder: str, ranks: int, size: int, name: str) -> Path:
    return Path(folder) / f"{ranks}-{size}" / name


def _path(folder: str, ranks: int, size: int, name: str) -> Path:
    return _place(folder, ranks, size, name) / f"step-{STEPS:08d}"
