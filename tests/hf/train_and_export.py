"""Import a Hugging Face folder, train it on two ranks and export it: a test that every family must pass.

    folder --import--> pretrained --20 steps, ZeRO-3, two gloo ranks, emoji--> run --export--> folder

A family's test builds a tiny reference model with the vocabulary of the emoji tokenizer (``VOCABULARY``), chooses the
transforms, and generates with the exported folder.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.checkpoint.imports import import_folder
from mmscale.checkpoint.manifest import newest_of
from tests.hf.reference_models import tensors_of
from tests.system.conftest import REPO, Run

EMOJI = REPO / "examples" / "emoji"
VOCABULARY = 2048
"""Ids of the emoji tokenizer: ``<image>`` (4) among them."""


def captions(transforms: dict[str, Any]) -> dict[str, Any]:
    """Return a data set of emoji with their names."""
    return {
        "name": "emoji",
        "manifest": str(EMOJI / "shards" / "train-quick.manifest"),
        "template": {"kind": "caption", "answers": ["{name}"]},
        "transforms": transforms,
    }


def text() -> dict[str, Any]:
    """Return a data set of short texts."""
    return {
        "name": "text",
        "manifest": str(EMOJI / "shards" / "train-text.manifest"),
        "template": {"kind": "text"},
        "transforms": {"kind": "fixed", "size": 32},
    }


def train_and_export(
    source: Path,
    work: Path,
    dataset: dict[str, Any],
    *,
    idle: str = "$^",
    **settings: Any,
) -> Path:
    """Return the exported folder: ``prepare``, a run of two ranks, ``export``."""
    file = prepare(source, work, dataset, **settings)
    Run(work / "run", ["launch", "local", str(file), "--ranks", "2"], forked=True).finish()
    return export(source, work, idle=idle)


def prepare(
    source: Path,
    work: Path,
    dataset: dict[str, Any],
    *,
    model: dict[str, Any] | None = None,
    max_tokens: int = 96,
    steps: int = 20,
) -> Path:
    """Import a folder and write the config of the run that two ranks train.

    Args:
        source: Folder written by ``save_pretrained``.
        work: Existing folder for the run and its output.
        dataset: ``captions(...)`` or ``text()``.
        model: Changes to the imported ``model`` block, one level deep (``{"decoder": {"dropout": 0.1}}``).
        max_tokens: Tokens per pack; a step has two packs.
        steps: Optimizer steps.
    """
    imported = import_folder(source, work / "pretrained" / "checkpoints")
    block = {key: {**(values or {}), **(model or {}).get(key, {})} or None for key, values in imported.model.items()}
    values = {
        "run_dir": str(work / "run"),
        "seed": 1,
        "data": {
            "tokenizer": {"kind": "sentencepiece", "path": str(EMOJI / "tokenizer.model")},
            "datasets": [dataset],
            "lanes": 2,
            "packing": {"max_tokens": max_tokens, "max_documents": 4, "look_ahead": 1, "too_long": "split"},
            "workers": 0,
        },
        "model": block,
        "stages": [
            {
                "name": "tune",
                "steps": steps,
                "learning_rate": {"default": 1e-2},
                "weights": [{"checkpoint": str(work / "pretrained")}],
            }
        ],
        # Even the smallest parameter is sharded.
        "engine": {
            "zero_stage": 3,
            "precision": "fp32",
            "micro_lanes": 1,
            "timeout_seconds": 60,
            "persistent_parameter_elements": 0,
        },
        "checkpoint": {"every_steps": steps},
        "metrics": {"tensorboard": False},
        "evaluation": {"sets": [], "captions": None},
    }
    (work / "run.yaml").write_text(json.dumps(values))  # JSON is valid YAML.
    return work / "run.yaml"


def export(source: Path, work: Path, *, idle: str = "$^") -> Path:
    """Export the trained weights; assert that the loss fell and that every tensor changed.

    Args:
        source: As in ``prepare``.
        work: As in ``prepare``.
        idle: Regular expression of tensor names that no batch of this data set uses; only weight decay changes them.
    """
    losses = [json.loads(line)["loss"] for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == json.loads((work / "run.yaml").read_text())["stages"][0]["steps"]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses
    report = export_weights(newest_of(work / "run"), work / "exported", to=HuggingFace(source))
    assert report.family == json.loads((source / "config.json").read_text())["model_type"]
    _assert_moved(source, work / "exported", idle)
    return work / "exported"


def _assert_moved(source: Path, exported: Path, idle: str) -> None:
    before, after = tensors_of(source), tensors_of(exported)
    assert before.keys() == after.keys()
    still = [name for name, values in before.items() if values.equal(after[name]) and not re.search(idle, name)]
    assert not still, f"not trained: {still}"
