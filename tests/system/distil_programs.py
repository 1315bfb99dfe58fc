"""Functions that the ranks of ``test_distillation.py`` run: engines, a teacher's run, and runs of students."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from mmscale.checkpoint import list_checkpoints
from mmscale.config import load
from mmscale.dist import World
from mmscale.errors import ConfigError
from mmscale.run.config import RunConfig
from mmscale.run.train import train
from tests.engine.ranks import barrier
from tests.system.distil_engines import train_engines

CONFIG = Path(__file__).with_name("distil.yaml")
STUDENT = ["model.decoder.num_layers=2", "model.decoder.hidden_dim=24", "model.decoder.attention.num_heads=2", "seed=2"]
SHARE, HEAT = 0.6, 2.0


def student_words(teacher: Path) -> list[str]:
    """Return the overrides that make the configuration a student."""
    return [*STUDENT, f"stages.0.distill=[{{checkpoint: {teacher}, weight: {SHARE}, temperature: {HEAT}, ema: true}}]"]


def run(world: World, folder: str) -> dict[str, Any]:
    """Run all programs of the test.

    Returns:
        The result of ``train_engines``. The log of a student's whole run, and of one that resumes at step 2 while the
        teacher has newer checkpoints. The error if the teacher's checkpoint is missing at a resume.
    """
    teacher, whole, again = (Path(folder) / name for name in ("teacher", "whole", "again"))
    # As in ``recipe_programs``: the next run needs the process group. These tests need no result at the end of a run.
    quick = mock.patch("mmscale.run.train.finalize_run"), mock.patch("gc.collect", return_value=0)
    with mock.patch("mmscale.run.train.shutdown"), quick[0], quick[1]:
        engines = train_engines(world, Path(folder) / "engines")
        _train(world, teacher, "max_steps=2")
        _train(world, whole, *student_words(teacher))
        _train(world, teacher, "max_steps=4")
        if world.is_main:
            shutil.copytree(whole, again)
            for late in list_checkpoints(again / "checkpoints")[1:]:
                shutil.rmtree(late)
        barrier(world)
        _train(world, again, *student_words(teacher))
        if world.is_main:
            shutil.rmtree(list_checkpoints(again / "checkpoints")[-1])
            gone = list_checkpoints(teacher / "checkpoints")[0]
            gone.rename(teacher / "away")
        barrier(world)
        complaint = ""
        try:
            _train(world, again, *student_words(teacher))
        except ConfigError as error:
            complaint = str(error)
        barrier(world)
        if world.is_main:
            (teacher / "away").rename(gone)
    return {"engines": engines, "whole": _log(whole), "again": _log(again), "complaint": complaint}


def _train(world: World, run_dir: Path, *words: str) -> None:
    train(load(CONFIG, [f"run_dir={run_dir}", *words], RunConfig))
    barrier(world)  # Rank 0 writes the log and the result.


def _log(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
