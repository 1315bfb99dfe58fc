"""A small trained run, its own scores, and the same questions as task files of a harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mmscale.cli.trained import open_trained
from mmscale.evaluate import EvaluationConfig, evaluate
from tests.system.conftest import Run

CONFIG = "tests/system/tiny.yaml"
TALKS = (
    "data.tokenizer.path=examples/text/tokenizer.model",
    "model.vision=null",
    "model.connector=null",
    "stages.0.train=[decoder]",
    "data.datasets=[{name: talks, manifest: examples/text/shards/talks.manifest, "
    "template: {kind: dialogue, format: chatml}}]",
)
"""Overrides of a run of a text model that learns dialogues in ChatML; the tokenizer has its control tokens."""


def train(folder: Path, *words: str, steps: int = 8, forked: bool = True) -> Path:
    """Train a tiny model; ``forked`` as in ``Run``."""
    Run(folder, ["train", CONFIG, f"run_dir={folder}", f"max_steps={steps}", *words], forked=forked).finish()
    return folder


def own_scores(run: Path, sets: list[dict[str, Any]], answers: Path | None = None) -> dict[str, Any]:
    """Return the results of sets of ``evaluation.sets`` by name."""
    trained = open_trained(run)
    config = EvaluationConfig.model_validate({"sets": sets})
    data, spec = trained.config.evaluation_data(trained.stage), trained.config.stage_media(trained.stage)
    return dict(evaluate(trained.model, config, data, spec, trained.world, answers_folder=answers))


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], task: dict[str, Any]) -> None:
    """Write a task file and its data, which the harness reads without a network."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, **task}))
