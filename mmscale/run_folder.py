"""What lies where in a run folder.

config.yaml            every value of the run        report/origins.json   where each came from
metrics.jsonl          one line a step               tensorboard/          the same, and sample images
checkpoints/step-N/    whole checkpoints             logs/                 output of ranks above 0, stacks of a hang
ledger/                which samples each step had   faults/             samples that were left out, and why
bad_steps/             samples of steps that were refused, roll backs
profile/               traces of a few steps         goodput.jsonl         time that was spent outside of steps
captions.json report/  held-out images described     report.html result.json
"""

from __future__ import annotations

import json
from pathlib import Path

from mmscale.config import Loaded, dump
from mmscale.dist import World, first_complaint
from mmscale.errors import MMScaleError
from mmscale.report.configuration import save_origins
from mmscale.report.result import RESULT_FILE, write_whole
from mmscale.run_config import RunConfig

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LEDGER = "ledger"
FAULTS = "faults"
BAD_STEPS = "bad_steps"


def open_run_folder(loaded: Loaded[RunConfig], world: World) -> None:
    """Makes the folder and writes the configuration into it. All ranks must call.

    Raises:
        MMScaleError: the folder cannot be written; every rank raises.
    """
    complaint = None
    if world.is_main:
        try:
            _write(loaded)
        except OSError as error:
            complaint = f"run_dir={loaded.value.run_dir}: {error.strerror}"
    complaint = first_complaint(world, complaint)
    if complaint is not None:
        raise MMScaleError(complaint)


def is_finished(config: RunConfig) -> bool:
    """Whether the run folder holds the result of a run of at least this many steps.

    Raises:
        MMScaleError: ``result.json`` is there but cannot be read.
    """
    path = config.run_dir / RESULT_FILE
    if not path.is_file():
        return False
    try:
        return int(json.loads(path.read_text())["steps"]) >= config.total_steps
    except (ValueError, KeyError, TypeError) as error:
        raise MMScaleError(f"{path} is damaged ({error}); remove it to let the run finish again") from error


def _write(loaded: Loaded[RunConfig]) -> None:
    folder: Path = loaded.value.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFIG, dump(loaded.value).encode())
    save_origins(folder, loaded.origins)
