"""The layout of a run folder, its lock, and whether it holds a finished run.

config.yaml            every value of the run          report/origins.json   origin of each value
metrics.jsonl          one line a step                 tensorboard/          the same, and sample images
checkpoints/step-N/    whole checkpoints               logs/                 output of ranks above 0, stacks of a hang
sample_log/            the samples of each step        faults/               skipped samples with the reason
bad_steps/             samples of bad steps, roll backs
starts/                each start: code, configuration, changes, environment; how the newest one ended
lock/                  the process that works in the folder
heartbeats/            state of each rank, for the watchdog
router.json            loads of experts, newest window
trackers/              ids, progress and offline data of trackers
profile/               traces of a few steps           goodput.jsonl         time spent outside of steps
captions.json report/  captions of held-out images     report.html result.json
answers/               generated answers of held-out questions
drawings/              what the model drew at each evaluation, small
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmscale.checkpoint import TrainState, read_manifest
from mmscale.config.layers import RUN_CONFIG
from mmscale.dist import World, any_rank, raise_on_any_rank
from mmscale.errors import ConfigError, LaunchError, MMScaleError
from mmscale.evaluate.result import RESULT_FILE, read_result
from mmscale.io.lock import POLL_SECONDS, FolderLock
from mmscale.run.config import RunConfig

CONFIG = RUN_CONFIG
CHECKPOINTS = "checkpoints"
REFERENCES = "references"
SAMPLE_LOG = "sample_log"
FAULTS = "faults"
BAD_STEPS = "bad_steps"


@contextmanager
def hold_folder(folder: Path, world: World | None = None) -> Iterator[None]:
    """Hold the lock of a run folder, which is created if absent. All ranks must call; rank 0 takes the lock.

    Every command that changes a run's files or checkpoints takes the lock first. ``mmscale report`` does not: it
    replaces ``report.html`` and only reads the other files.

    Args:
        folder: The run folder.
        world: This rank; None for a process that works alone.

    Raises:
        LaunchError: another process holds the lock, or the folder cannot be written; every rank raises.
    """
    world = world or World(0, 1, 0, torch.device("cpu"))
    lock = FolderLock(folder)
    is_reported = False
    try:
        while not _try_lock(lock, folder, world, is_reported):
            is_reported = True
            time.sleep(POLL_SECONDS)
        yield
    finally:
        lock.release()


def _try_lock(lock: FolderLock, folder: Path, world: World, is_reported: bool) -> bool:
    """Try once to take the lock. Return False on all ranks if they must wait and try again."""
    waiting = message = None
    if world.is_main:
        try:
            waiting = lock.attempt()
        except LaunchError as error:
            message = str(error)
        except OSError as error:
            message = f"run_dir={folder}: {error.filename or folder}: {error.strerror}"
    raise_on_any_rank(world, message, LaunchError)
    if waiting is not None and not is_reported:
        print(f"mmscale: {waiting}", file=sys.stderr, flush=True)
    return not any_rank(world, waiting is not None)


def is_finished(config: RunConfig) -> bool:
    """Return whether the run folder holds the result of a run of at least ``config.total_steps`` steps.

    Raises:
        MMScaleError: ``result.json`` exists but is damaged or cannot be read.
    """
    return finished_steps(config) is not None


def finished_steps(config: RunConfig) -> int | None:
    """Return the steps of the finished run in the run folder.

    Return None if there is no result, or one of fewer steps than ``config.total_steps``, except if the run ended early
    and would end at the same step with ``config.evaluation.best``.

    Raises:
        MMScaleError: ``result.json`` exists but is damaged or cannot be read.
    """
    try:
        result = read_result(config.run_dir)
    except MMScaleError as error:
        raise MMScaleError(f"{error}; remove it to let the run finish again") from error
    if result and "steps" not in result:
        path = config.run_dir / RESULT_FILE
        raise MMScaleError(f"{path} is damaged: its key steps is missing; remove it to let the run finish again")
    steps = int(result["steps"]) if result else None
    if steps is None or steps >= config.total_steps or _ends_early(config, result):
        return steps
    return None


def _ends_early(config: RunConfig, result: Mapping[str, Any]) -> bool:
    """Return whether the run of ``result`` ended early, for a reason that also ends a run of ``config``."""
    early, best = result.get("early_stop"), config.evaluation.best
    if not early or best is None or best.stop_after is None:
        return False
    return bool(early["evaluations"] >= best.stop_after)


def check_position(config: RunConfig, state: TrainState, path: Path) -> None:
    """Check that the configuration's stages contain the step of a checkpoint.

    Args:
        config: The run that is to be resumed.
        state: The state in the checkpoint.
        path: The checkpoint, for messages.

    Raises:
        ConfigError: the checkpoint's stage is missing, or stages have other lengths than when it was saved.
    """
    index, names = state.stage_index, [stage.name for stage in config.stages]
    if index >= len(names):
        raise ConfigError(
            f"{path} was saved in stage {index} ({read_manifest(path).stage!r}), but the configuration has "
            f"{len(names)} stage{'s' * (len(names) != 1)}: {names}; put stages.{index} back to resume, or set another "
            f"run_dir and load the weights with stages.0.weights=[{{checkpoint: {path}}}]"
        )
    begin, now = state.step - state.stage_step, sum(stage.steps for stage in config.stages[:index])
    if begin != now:
        raise ConfigError(
            f"{path} was saved in stage {index}, which began after {begin} steps; by stages.*.steps of the "
            f"configuration it begins after {now}; put the steps of {names[:index]} back"
        )
    steps = config.stages[index].steps
    if state.stage_step > steps and state.step < config.total_steps:
        raise ConfigError(
            f"stages.{index}.steps={steps}: {path} is already {state.stage_step} steps into stage {names[index]!r}; "
            f"set stages.{index}.steps={state.stage_step} to begin the next stage"
        )
