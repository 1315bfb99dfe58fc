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
from mmscale.dist import World
from mmscale.run.config import RunConfig
from mmscale.run.train import train
from mmscale.shrink.run import shrink_run
from tests.engine.ranks import barrier

Lines = list[dict[str, Any]]
Told = tuple[list[tuple[str, bool]], Lines, Lines]
"""Each stage's name and whether it has a z loss; the log of a whole run; each stage's second step after a resume."""


def train_recipes(world: World, paths: list[str], folder: str) -> dict[str, Told]:
    """Of each recipe's twin, two steps a stage. Recipes whose twins are equal but for their run folder share a run.

    Args:
        world: This rank.
        paths: Of the recipes.
        folder: Of the runs.
    """
    told: dict[str, Told] = {}
    found: dict[str, Told] = {}
    # ``train`` leaves the process group at its end; here the next run needs it. DeepSpeed collects garbage for every
    # engine, which takes longer than to make the engine; and what was imported is no garbage.
    gc.freeze()
    gc.set_threshold(20_000)
    no_report = mock.patch("mmscale.run.finish.build_report", return_value="no report")
    with mock.patch("mmscale.run.train.shutdown"), mock.patch("gc.collect", return_value=0), no_report:
        for path in paths:
            twin = _twin(Path(path))
            key = twin.model_dump_json(exclude={"run_dir"})
            if key not in told:
                told[key] = _train(world, twin.model_copy(update={"run_dir": Path(folder) / Path(path).stem}))
            found[path] = told[key]
    return found


def _twin(path: Path) -> RunConfig:
    """A checkpoint after every step; in fp32, which takes a seventh less time here than kernels of bf16, made anew for
    each length of a pack."""
    config = shrink_run(load(path, [], RunConfig).value, steps=2)
    return config.model_copy(
        update={
            "checkpoint": config.checkpoint.model_copy(
                update={"every_steps": 1, "keep_last": 100, "background": False}
            ),
            "metrics": config.metrics.model_copy(update={"tensorboard": False, "images_every": None}),
            "engine": config.engine.model_copy(update={"precision": "fp32"}),
        }
    )


def _train(world: World, config: RunConfig) -> Told:
    run_dir = config.run_dir
    train(Loaded(config, {}))
    barrier(world)  # Rank 0 writes the log and the result.
    whole = _log(run_dir)
    assert (run_dir / "result.json").exists()
    resumed = []
    for middle in range(config.total_steps - 1, 0, -2):
        barrier(world)
        if world.is_main:
            (run_dir / "result.json").unlink(missing_ok=True)
            for late in list_checkpoints(run_dir / "checkpoints")[middle:]:
                shutil.rmtree(late)
        barrier(world)
        with mock.patch("mmscale.run.train.finish"):
            train(Loaded(config.model_copy(update={"max_steps": middle + 1}), {}))
        barrier(world)
        resumed += _log(run_dir)[middle:]
    if world.is_main:
        shutil.rmtree(run_dir / "checkpoints")
    return [(stage.name, stage.z_loss > 0) for stage in config.stages], whole, resumed


def _log(run_dir: Path) -> Lines:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
