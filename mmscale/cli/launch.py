"""``mmscale launch``: start one training command on several ranks, here or through SLURM, and watch or stop it."""

from __future__ import annotations

import warnings
from pathlib import Path

import typer

from mmscale.cli import launch_rehearse, launch_run, launch_slurm
from mmscale.cli.launch_words import CONFIG, OVERRIDES, checked, train_words

app = typer.Typer()


@app.command(epilog="Example: mmscale launch local configs/quickstart.yaml --ranks 2")
def local(
    config: Path = CONFIG,
    overrides: list[str] = OVERRIDES,
    ranks: int = typer.Option(
        ..., min=1, help="Processes to start on this machine: one per GPU, or one per CPU core or two."
    ),
    profile: bool = typer.Option(
        False, "--profile", help="Record the steps of metrics.profile_steps on each rank as a trace in RUN/profile."
    ),
) -> None:
    """Train on several ranks of this machine, resuming if the run folder has a checkpoint.

    Exit code 0: finished. 75: stopped by a signal and saved; the same command resumes. 76: a rank hung, and the
    watchdog ended the run. A second Ctrl-C kills the ranks.
    """
    from launchers.local import launch
    from mmscale.config import located
    from mmscale.run.file_checks import check_files
    from mmscale.run.folder import hold_folder

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Rank 0 reads the same file and prints the same warnings.
        loaded = checked(config, overrides or [], ranks)
        run = loaded.value
        with located(loaded):
            check_files(run)
    words = [*train_words(config, overrides or []), *(["--profile"] if profile else [])]
    with hold_folder(run.run_dir):
        pass  # Raises if another run holds the folder, before the ranks' logs are opened. Rank 0 then takes the lock.
    raise typer.Exit(launch(words, ranks, run.run_dir))


app.registered_commands += launch_slurm.app.registered_commands
app.registered_commands += launch_run.app.registered_commands
app.registered_commands += launch_rehearse.app.registered_commands
