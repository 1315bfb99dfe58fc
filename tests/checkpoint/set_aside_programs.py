"""Programs that the ranks of ``test_set_aside.py`` run."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from mmscale.checkpoint import choose, list_checkpoints, read_manifest, verify
from mmscale.checkpoint.config import CheckpointConfig
from mmscale.config import load
from mmscale.dist import World
from mmscale.errors import MMScaleError
from mmscale.run.config import RunConfig
from mmscale.run.train import train
from tests.checkpoint.toy_checkpoint import flip_byte

CONFIG = Path(__file__).parents[1] / "system" / "tiny.yaml"
QUICK = [
    "data.lanes=1",
    "model.decoder.num_layers=1",
    "model.connector.every=1",
    "model.vision.num_layers=1",
    "checkpoint.background=false",
    "checkpoint.on_damage=previous",
]
TWO_STAGES = [
    "stages=[{name: one, steps: 2, train: [connector]}, {name: two, steps: 2, train: [connector]}]",
    "checkpoint.every_steps=1",
]
ONE_STAGE = "stages=[{name: one, steps: 2, train: [connector]}]"


def run(world: World, folder: str) -> dict[str, Any]:
    """Return the state of the run folder after each story, and the error message of its last start."""
    del world
    stories = {
        # Name: words, steps of the first start, steps of the second start.
        "inside": (["checkpoint.every_steps=2", "checkpoint.keep_last=2"], 4, 6),
        "the end": (["checkpoint.every_steps=2", "checkpoint.keep_last=2"], 4, 4),
        "boundary": (TWO_STAGES, 2, 4),
        "the only one": (["checkpoint.every_steps=2", "checkpoint.keep_last=1"], 2, 4),
    }
    answers = {}
    # As in ``tests/system/distil_programs.py``: the next run needs the process group.
    with (
        mock.patch("mmscale.run.train.shutdown"),
        mock.patch("mmscale.run.train.finalize_run"),
        mock.patch("gc.collect"),
    ):
        for name, (words, first, second) in stories.items():
            run_dir = Path(folder) / name
            assert (message := _train(run_dir, *words, f"max_steps={first}")) is None, message
            flip_byte(list_checkpoints(run_dir / "checkpoints")[-1])
            answers[name] = {"message": _train(run_dir, *words, f"max_steps={second}"), **_state(run_dir)}
        answers["fewer stages"] = {"message": _train(Path(folder) / "boundary", ONE_STAGE)}
    return answers


def _train(run_dir: Path, *words: str) -> str | None:
    try:
        train(load(CONFIG, [f"run_dir={run_dir}", *QUICK, *words], RunConfig))
    except MMScaleError as error:
        return str(error)
    return None


def _state(run_dir: Path) -> dict[str, Any]:
    folder = run_dir / "checkpoints"
    good = {path.name: verify(path) for path in list_checkpoints(folder)}
    newest = read_manifest(list_checkpoints(folder)[-1]).state
    return {
        "names": sorted(path.name for path in folder.iterdir()),
        "problems": good,
        "end": [newest.step, newest.stage_index, newest.stage_step],
    }


def choose_late(world: World, directory: str) -> dict[str, Any]:
    """Return the choice and the notes of ``choose`` while rank 1 sees an empty folder."""
    notes: list[str] = []
    config = CheckpointConfig(on_damage="previous")
    with mock.patch("mmscale.checkpoint.load.list_checkpoints", list_checkpoints if world.is_main else lambda _: []):
        path = choose(world, Path(directory), config, notes.append)
    return {"path": None if path is None else path.name, "notes": notes}
