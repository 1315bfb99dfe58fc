"""``mmscale train``: one rank of a run, or the whole of it."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer()

STOPPED = 75
"""Exit code of a run that was asked to stop, has saved, and wants to be started again (EX_TEMPFAIL)."""


@app.command(epilog="Example: mmscale train configs/quickstart.yaml run_dir=runs/first max_steps=20")
def train(
    config: Path = typer.Argument(help="A run's YAML file.", metavar="CONFIG"),
    overrides: list[str] = typer.Argument(
        None, help="Values that win over the file's, for example max_steps=20.", metavar="[KEY=VALUE]..."
    ),
    profile: bool = typer.Option(
        False, "--profile", help="Record a few steps (metrics.profile_steps) as a trace in RUN/profile."
    ),
) -> None:
    """Train a model as CONFIG says, or go on where the run folder left off.

    One process trains alone; under torchrun or srun each process is one rank. Exit code 0: finished, the report is
    written. 75: asked to stop (SIGTERM, SIGUSR1, Ctrl-C, end of the SLURM job) and saved; the same command goes on.
    76: the watchdog ended a run in which nothing moved any more.
    """
    from mmscale.cli.run_file import load_run
    from mmscale.run.train import Outcome
    from mmscale.run.train import train as run

    if run(load_run(config, overrides or []), profile=profile) is Outcome.STOPPED:
        raise typer.Exit(STOPPED)
