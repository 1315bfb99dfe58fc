"""``mmscale train``: one rank of a run, or a whole run in one process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

app = typer.Typer()

STOPPED = 75
"""Exit code of a run that saved and stopped, on a signal or before the deadline. The same command resumes it."""


@app.command(epilog="Example: mmscale train configs/quickstart.yaml run_dir=runs/first max_steps=20")
def train(
    config: Path = typer.Argument(help="A run's YAML file.", metavar="CONFIG"),
    overrides: list[str] = typer.Argument(
        None, help="Values that override the file's, for example max_steps=20.", metavar="[KEY=VALUE]..."
    ),
    profile: bool = typer.Option(
        False, "--profile", help="Record a few steps (metrics.profile_steps) as a trace in RUN/profile."
    ),
) -> None:
    """Train the model of CONFIG, resuming from the run folder's checkpoint if it has one.

    One process trains alone; under torchrun or srun each process is one rank. Exit code 0: finished, and the report is
    written. 75: stopped by SIGTERM, SIGUSR1, Ctrl-C or the end of the SLURM job, and saved; the same command resumes.
    76: the watchdog ended the run because it made no progress.
    """
    from mmscale.cli.run_file import load_run
    from mmscale.run.train import Outcome
    from mmscale.run.train import train as run

    loaded = load_run(config, overrides or [])
    if run(loaded, profile=profile) is Outcome.STOPPED:
        raise typer.Exit(STOPPED)
    if os.environ.get("RANK", "0") == "0":  # Set by the launcher, or by the start of the run.
        from mmscale.cli.next_steps import format_next_steps, next_steps

        steps = next_steps(loaded.value)
        print(format_next_steps(steps), file=sys.stderr, flush=True)
