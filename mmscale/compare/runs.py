"""The runs of a comparison, one after the other, each by the command that trains any run.

    configs/embedding-seed-1.yaml   the whole configuration of a run, which ``mmscale train`` takes too
    embedding/seed-1/               its run folder, like any other
    plan.json                       steps of each run
    comparison.html, .json          what came out so far, written again after every run

All memory is in these folders: a comparison that is called again leaves out what is finished, goes on with what was
begun and tries again what failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.io.atomic import write_whole
from mmscale.compare.config import Comparison
from mmscale.compare.plan import Trial
from mmscale.config import dump, load
from mmscale.errors import ConfigError, MMScaleError
from mmscale.run.config import RunConfig
from mmscale.run.folder import CONFIG, is_finished
from mmscale.run.starts import describe, differences

Start = Callable[[Path, Path], int]
"""Trains the run of a file in its run folder and gives the exit code of ``mmscale train``."""

_STOPPED = (75, 130)
_SIGNALLED = 128


class Stopped(MMScaleError):  # noqa: N818 - no error: the same command goes on.
    """A run was asked to stop, and so the comparison is. The same command goes on."""

    def __init__(self, code: int) -> None:
        super().__init__("stopped; the same command goes on from here")
        self.exit_code = code


@dataclass(frozen=True)
class Failure:
    """A run that ended without a result."""

    variant: str
    seed: int
    exit_code: int


def config_path(comparison: Comparison, trial: Trial) -> Path:
    """The file of one run."""
    return comparison.run_dir / "configs" / f"{trial.variant}-seed-{trial.seed}.yaml"


def run_trials(
    comparison: Comparison,
    trials: Sequence[Trial],
    start: Start,
    note: Callable[[str], object],
    done: Callable[[list[Failure]], object],
) -> list[Failure]:
    """Trains what is not finished. A run that fails is told and left behind; the others go on.

    Args:
        comparison: What is compared.
        trials: Its runs, in order.
        start: Trains one.
        note: Told what begins and what failed, in a sentence.
        done: Called after each run that was started, with the failures so far.

    Raises:
        ConfigError: a run folder holds a run of another configuration. Nothing was trained.
        Stopped: a run was asked to stop.
    """
    prepare(comparison, trials)
    failures: list[Failure] = []
    for number, trial in enumerate(trials, start=1):
        if is_finished(trial.config):
            continue
        note(f"run {number} of {len(trials)}: {trial.name}, {trial.config.total_steps} steps")
        code = start(config_path(comparison, trial), trial.config.run_dir)
        if code in _STOPPED or code > _SIGNALLED:
            done(failures)
            raise Stopped(code)
        if code or not is_finished(trial.config):
            failures.append(Failure(trial.variant, trial.seed, code))
            note(f"{trial.name} failed (exit code {code}); the others go on, and the same command tries it again")
        done(failures)
    return failures


def prepare(comparison: Comparison, trials: Sequence[Trial]) -> None:
    """Writes the file of every run, unless a folder holds a run that was begun under another configuration.

    Raises:
        ConfigError: names the folder and the keys that differ; nothing was written.
    """
    _check_folders(trials)
    for trial in trials:
        write_whole(config_path(comparison, trial), dump(trial.config).encode(), parents=True)


def _check_folders(trials: Sequence[Trial]) -> None:
    for trial in trials:
        path = trial.config.run_dir / CONFIG
        if not path.is_file():
            continue
        if changes := differences(load(path, [], RunConfig).value, trial.config):
            raise ConfigError(
                f"{trial.config.run_dir}: holds a run with other values of {describe(changes)}; give the comparison "
                "another run_dir, or remove that folder"
            )
