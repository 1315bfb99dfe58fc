"""What the ranks of the recipes' test run: many runs one after the other in one process group."""

from __future__ import annotations

import gc
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

STEPS = 2
"""Of each stage."""
Lines = list[dict[str, Any]]


def train_recipes(world: World, paths: list[str], folder: str) -> list[tuple[list[str], Lines, Lines]]:
    """Of each recipe's twin: names of the stages, the log of a whole run, and the step after each resume."""
    gc.collect()
    gc.freeze()  # DeepSpeed collects garbage for every engine: let it not search torch each time.
    # ``train`` leaves the process group at its end; here the next run needs it.
    with mock.patch("mmscale.train.shutdown"):
        return [_train(world, Path(path), Path(folder) / Path(path).stem) for path in paths]


def _train(world: World, path: Path, run_dir: Path) -> tuple[list[str], Lines, Lines]:
    config = shrink_run(load(path, [], RunConfig).value, steps=STEPS)
    every_step = config.checkpoint.model_copy(update={"every_steps": 1, "keep_last": 100, "background": False})
    metrics = config.metrics.model_copy(update={"tensorboard": False, "images_every": None})
    config = config.model_copy(update={"run_dir": run_dir, "checkpoint": every_step, "metrics": metrics})
    train(Loaded(config, {}))
    barrier(world)  # Rank 0 writes the log and the result.
    whole = _log(run_dir)
    assert (run_dir / "result.json").exists()
    resumed = []
    for middle in range(config.total_steps - STEPS + 1, 0, -STEPS):
        barrier(world)
        if world.is_main:
            (run_dir / "result.json").unlink(missing_ok=True)
            for late in list_checkpoints(run_dir / "checkpoints")[middle:]:
                shutil.rmtree(late)
        barrier(world)
        with mock.patch("mmscale.train.finish"):
            train(Loaded(config.model_copy(update={"max_steps": middle + STEPS - 1}), {}))
        barrier(world)
        resumed += _log(run_dir)[middle:]
    if world.is_main:
        shutil.rmtree(run_dir / "checkpoints")
    return [stage.name for stage in config.stages], whole, resumed


def _log(run_dir: Path) -> Lines:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
