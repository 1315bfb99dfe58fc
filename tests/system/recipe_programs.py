"""What the ranks of the recipes' test run: many runs one after the other in one process group."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from mmscale.checkpoint import list_checkpoints
from mmscale.config import Loaded, load
from mmscale.dist import World, barrier
from mmscale.run_config import RunConfig
from mmscale.shrink_run import shrink_run
from mmscale.train import train

Lines = list[dict[str, Any]]
Told = tuple[str, bool]
"""A stage's name, and whether it has a z loss."""


def train_recipes(world: World, steps: dict[str, int], folder: str) -> dict[str, tuple[list[Told], Lines, Lines]]:
    """Of each twin: what its stages are, the log of a whole run, and the second step of each stage after a resume.

    Args:
        world: This rank.
        steps: Of each stage, by the recipe's path: 2, or 1, which leaves nothing to resume.
        folder: Of the runs.
    """
    # ``train`` leaves the process group at its end; here the next run needs it. DeepSpeed collects garbage for every
    # engine, which takes longer than to make the engine.
    with mock.patch("mmscale.train.shutdown"), mock.patch("gc.collect", return_value=0):
        return {path: _train(world, Path(path), number, Path(folder)) for path, number in steps.items()}


def _train(world: World, path: Path, steps: int, folder: Path) -> tuple[list[Told], Lines, Lines]:
    run_dir = folder / path.stem
    config = shrink_run(load(path, [], RunConfig).value, steps=steps)
    every_step = config.checkpoint.model_copy(update={"every_steps": 1, "keep_last": 100, "background": False})
    metrics = config.metrics.model_copy(update={"tensorboard": False, "images_every": None})
    config = config.model_copy(update={"run_dir": run_dir, "checkpoint": every_step, "metrics": metrics})
    train(Loaded(config, {}))
    barrier(world)  # Rank 0 writes the log and the result.
    whole = _log(run_dir)
    assert (run_dir / "result.json").exists()
    resumed = []
    for middle in range(config.total_steps - 1, 0, -2) if steps == 2 else ():
        barrier(world)
        if world.is_main:
            (run_dir / "result.json").unlink(missing_ok=True)
            for late in list_checkpoints(run_dir / "checkpoints")[middle:]:
                shutil.rmtree(late)
        barrier(world)
        with mock.patch("mmscale.train.finish"):
            train(Loaded(config.model_copy(update={"max_steps": middle + 1}), {}))
        barrier(world)
        resumed += _log(run_dir)[middle:]
    if world.is_main:
        shutil.rmtree(run_dir / "checkpoints")
    return [(stage.name, stage.z_loss > 0) for stage in config.stages], whole, resumed


def _log(run_dir: Path) -> Lines:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
