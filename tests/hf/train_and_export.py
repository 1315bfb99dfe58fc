"""A folder of Hugging Face, trained on by two ranks and exported again: what every family must survive.

    folder --import--> pretrained --20 steps, ZeRO-3, two gloo ranks, emoji--> run --export--> folder

A family's test makes a tiny twin whose vocabulary holds that of the emoji tokenizer (``VOCABULARY``), says how images
are cut, and generates with what ``train_and_export`` gives back.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.checkpoint.foreign import import_folder
from mmscale.checkpoint.manifest import newest_of
from tests.hf.twins import tensors_of
from tests.system.conftest import REPO, Run

EMOJI = REPO / "examples" / "emoji"
VOCABULARY = 2048
"""Ids of the emoji tokenizer: ``<image>`` (4) among them."""


def captions(transforms: dict[str, Any]) -> dict[str, Any]:
    """A data set of emoji with their names."""
    return {
        "name": "emoji",
        "manifest": str(EMOJI / "shards" / "train-quick.manifest"),
        "template": {"kind": "caption", "answers": ["{name}"]},
        "transforms": transforms,
    }


def text() -> dict[str, Any]:
    """A data set of short texts."""
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
    """The folder that ``transformers`` can go on with: ``prepare``, a run of two ranks, ``export``."""
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
    """Imports, and writes the run that two ranks are to train.

    Args:
        source: As ``save_pretrained`` wrote it.
        work: Where the run and its output go; must exist.
        dataset: ``captions(...)`` or ``text()``.
        model: Changes to the imported ``model`` block, one level deep (``{"decoder": {"dropout": 0.1}}``).
        max_tokens: Of a pack; two packs a step.
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
    (work / "run.yaml").write_text(json.dumps(values))  # JSON is YAML.
    return work / "run.yaml"


def export(source: Path, work: Path, *, idle: str = "$^") -> Path:
    """Exports what the run has trained; asserts that the loss fell and that every tensor moved.

    Args:
        source: Of ``prepare``.
        work: Of ``prepare``.
        idle: Names (a regular expression) of tensors that no batch of this data set uses; only weight decay moves them.
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
