"""Train the runs of a comparison one after the other, each with ``mmscale train``.

    configs/embedding-seed-1.yaml   full configuration of a run, usable with ``mmscale train``
    embedding/seed-1/               run folder
    plan.json                       steps of each run
    comparison.html, .json          results so far, rewritten after every run

All state is in these folders. When the same comparison is started again, it skips finished runs, resumes interrupted
ones and retries failed ones.
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

StartRun = Callable[[Path, Path], int]
"""Called with (config file, run folder): train the run and return the exit code of ``mmscale train``."""

_STOP_EXIT_CODES = (75, 130)
"""Exit codes of a run that was asked to stop (75) or interrupted from the keyboard (130)."""
_SIGNAL_EXIT_CODES = 128
"""Larger exit codes mean that a signal ended the process."""


class Stopped(MMScaleError):  # noqa: N818 - not an error: the same command resumes.
    """Raised when a run was asked to stop or a signal ended it. The comparison ends; the same command resumes it."""

    def __init__(self, code: int) -> None:
        super().__init__("stopped; run the same command to resume")
        self.exit_code = code


@dataclass(frozen=True)
class Failure:
    """A run that ended without a result."""

    variant: str
    seed: int
    exit_code: int


def config_path(comparison: Comparison, trial: Trial) -> Path:
    """Return the config file of one run."""
    return comparison.run_dir / "configs" / f"{trial.variant}-seed-{trial.seed}.yaml"


def run_trials(
    comparison: Comparison,
    trials: Sequence[Trial],
    start: StartRun,
    log: Callable[[str], object],
    on_run_end: Callable[[list[Failure]], object],
) -> list[Failure]:
    """Train the runs that are not finished. After a failure the next run starts.

    Args:
        comparison: The comparison.
        trials: Its runs, in order.
        start: Trains one run.
        log: Called with a sentence when a run starts or fails.
        on_run_end: Called after each run that was started, with the failures so far.

    Returns:
        Runs that failed in this call.

    Raises:
        ConfigError: a run folder holds a run of another configuration. No run was started.
        Stopped: a run was asked to stop, or a signal ended it. Later runs are not started.
    """
    prepare(comparison, trials)
    failures: list[Failure] = []
    for number, trial in enumerate(trials, start=1):
        if is_finished(trial.config):
            continue
        log(f"run {number} of {len(trials)}: {trial.name}, {trial.config.total_steps} steps")
        code = start(config_path(comparison, trial), trial.config.run_dir)
        if code in _STOP_EXIT_CODES or code > _SIGNAL_EXIT_CODES:
            on_run_end(failures)
            raise Stopped(code)
        if code or not is_finished(trial.config):
            failures.append(Failure(trial.variant, trial.seed, code))
            log(f"{trial.name} failed (exit code {code}); the next run starts, and the same command retries this one")
        on_run_end(failures)
    return failures


def prepare(comparison: Comparison, trials: Sequence[Trial]) -> None:
    """Write the config file of every run.

    Raises:
        ConfigError: a run folder holds a run of another configuration; the message lists the keys that differ. No file
            was written.
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
