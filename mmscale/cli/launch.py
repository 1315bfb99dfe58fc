"""``mmscale launch``: start one training command on several ranks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mmscale.cli.console import emit

if TYPE_CHECKING:
    from mmscale.config import Loaded
    from mmscale.run.config import RunConfig

app = typer.Typer()

_CONFIG = typer.Argument(help="A run's YAML file.", metavar="CONFIG")
_OVERRIDES = typer.Argument(
    None, help="Values that override the file's, for example max_steps=50.", metavar="[KEY=VALUE]..."
)


def _checked(config: Path, overrides: list[str], ranks: int) -> Loaded[RunConfig]:
    """Load the configuration and check it as each rank would, so that an error is printed once, before the start."""
    from mmscale.cli.run_file import load_run
    from mmscale.run.config import check_world
    from mmscale.run.stage_weights import check_initial_weights

    loaded = load_run(config, overrides)
    check_world(loaded.value, ranks)
    check_initial_weights(loaded)
    return loaded


def _train_words(config: Path, overrides: list[str]) -> list[str]:
    """Return the command line of each rank."""
    from data_pipeline.io.trusted_code import ALLOW_FLAG, allow_commands

    return [*([ALLOW_FLAG] if allow_commands.get() else []), "train", str(config), *overrides]


@app.command(epilog="Example: mmscale launch local configs/quickstart.yaml --ranks 2")
def local(
    config: Path = _CONFIG,
    overrides: list[str] = _OVERRIDES,
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
    from mmscale.run.config import check_files
    from mmscale.run.folder import hold_folder

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Rank 0 reads the same file and prints the same warnings.
        loaded = _checked(config, overrides or [], ranks)
        run = loaded.value
        with located(loaded):
            check_files(run)
    words = [*_train_words(config, overrides or []), *(["--profile"] if profile else [])]
    with hold_folder(run.run_dir):
        pass  # Raises if another run holds the folder, before the ranks' logs are opened. Rank 0 then takes the lock.
    raise typer.Exit(launch(words, ranks, run.run_dir))


@app.command(epilog="Example: mmscale launch slurm configs/quickstart.yaml --nodes 2 --gpus-per-node 2 --dry-run")
def slurm(
    config: Path = _CONFIG,
    overrides: list[str] = _OVERRIDES,
    nodes: int = typer.Option(1, min=1, help="Number of machines."),
    gpus_per_node: int = typer.Option(0, min=0, help="GPUs per machine, with one rank each; 0 trains on CPUs."),
    ranks_per_node: int = typer.Option(1, min=1, help="Ranks per machine in a CPU run."),
    cpus_per_task: int = typer.Option(None, min=1, help="CPU cores per rank, including its loader workers."),
    time: str = typer.Option(None, help="Time limit of the SLURM job, for example 4:00:00; a requeued job resumes."),
    partition: str = typer.Option(None, help="SLURM partition."),
    account: str = typer.Option(None, help="SLURM account."),
    requeue: bool = typer.Option(True, help="Requeue after the time limit, a preemption or a node failure."),
    save_seconds: int = typer.Option(180, min=1, help="Seconds before the time limit at which ranks save and stop."),
    sbatch: list[str] = typer.Option(
        [], help="A further sbatch option, for example --sbatch=--constraint=h100; repeatable."
    ),
    setup: list[str] = typer.Option(
        [], help="A shell line to run before the ranks, for example 'module load cuda'; repeatable."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the script and submit nothing."),
    json: bool = typer.Option(False, "--json", help="Print job number, script and log as JSON."),
) -> None:
    """Submit training to SLURM.

    The job saves before its time limit, is requeued, and resumes until the run is finished.
    """
    from launchers.slurm import Job, render, submit

    run = _checked(config, overrides or [], nodes * (gpus_per_node or ranks_per_node)).value
    job = Job(
        arguments=tuple(_train_words(config, overrides or [])),
        run_dir=run.run_dir,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        cpus_per_task=cpus_per_task,
        time=time,
        partition=partition,
        account=account,
        requeue=requeue,
        save_seconds=save_seconds,
        extra=tuple(sbatch),
        setup=tuple(setup),
    )
    if dry_run:
        print(render(job), end="")
        return
    number, script = submit(job)
    logs = script.parent
    emit({"job": number, "script": str(script), "log": str(logs / f"slurm-{number}.log")}, json=json)
