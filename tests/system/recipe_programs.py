"""Functions that the ranks of the recipes' test run: many runs in one process group."""

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
RecipeResult = tuple[list[tuple[str, bool]], Lines, Lines]
"""Each stage's name and whether it has a z loss; the log of a whole run; each stage's second step after a resume."""


def train_recipes(world: World, paths: list[str], folder: str) -> dict[str, RecipeResult]:
    """Run two steps of each stage of every recipe's smoke-test model. Equal configurations share a run.

    Args:
        world: This rank.
        paths: Paths of the recipes.
        folder: Folder of the runs.
    """
    results: dict[str, RecipeResult] = {}
    found: dict[str, RecipeResult] = {}
    # ``train`` leaves the process group at its end, but the next run needs it. DeepSpeed runs a garbage collection for
    # every engine, which takes longer than creating the engine. Imported objects need no collection.
    gc.freeze()
    gc.set_threshold(20_000)
    no_report = mock.patch("mmscale.run.finalize.build_report", return_value="no report")
    with mock.patch("mmscale.run.train.shutdown"), mock.patch("gc.collect", return_value=0), no_report:
        for path in paths:
            small = _smoke_test_config(Path(path))
            key = small.model_dump_json(exclude={"run_dir"})
            if key not in results:
                results[key] = _train(world, small.model_copy(update={"run_dir": Path(folder) / Path(path).stem}))
            found[path] = results[key]
    return found


def _smoke_test_config(path: Path) -> RunConfig:
    """Return a recipe's small configuration, with a checkpoint after every step and in fp32.

    bf16 kernels are created again for each length of a pack, so fp32 takes a seventh less time here.
    """
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


def _train(world: World, config: RunConfig) -> RecipeResult:
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
        with mock.patch("mmscale.run.train.finalize_run"):
            train(Loaded(config.model_copy(update={"max_steps": middle + 1}), {}))
        barrier(world)
        resumed += _log(run_dir)[middle:]
    if world.is_main:
        shutil.rmtree(run_dir / "checkpoints")
    return [(stage.name, stage.z_loss > 0) for stage in config.stages], whole, resumed


def _log(run_dir: Path) -> Lines:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
