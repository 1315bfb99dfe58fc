"""``mmscale launch``: the same training command on several ranks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mmscale.cli.console import emit

if TYPE_CHECKING:
    from mmscale.run.config import RunConfig

app = typer.Typer()

_CONFIG = typer.Argument(help="A run's YAML file.", metavar="CONFIG")
_OVERRIDES = typer.Argument(
    None, help="Values that win over the file's, for example max_steps=50.", metavar="[KEY=VALUE]..."
)


def _checked(config: Path, overrides: list[str], ranks: int) -> RunConfig:
    """Checks what each rank would check, before anything starts: the user reads a mistake once and at once."""
    from mmscale.cli.run_file import load_run
    from mmscale.run.config import check_world

    run = load_run(config, overrides).value
    check_world(run, ranks)
    return run


def _train_words(config: Path, overrides: list[str]) -> list[str]:
    """The command line of each rank."""
    from mmscale.cli.run_file import FLAG, allow_commands

    return [*([FLAG] if allow_commands.get() else []), "train", str(config), *overrides]


@app.command(epilog="Example: mmscale launch local configs/quickstart.yaml --ranks 2")
def local(
    config: Path = _CONFIG,
    overrides: list[str] = _OVERRIDES,
    ranks: int = typer.Option(
        ..., min=1, help="Processes to start on this machine: one a GPU, or one a CPU core or two."
    ),
    profile: bool = typer.Option(
        False, "--profile", help="Record a few steps (metrics.profile_steps) of each rank as a trace in RUN/profile."
    ),
) -> None:
    """Train on several ranks of this machine, resuming if the run folder holds a checkpoint.

    Exit code 0: finished. 75: saved and stopped on a signal; the same command goes on. 76: a rank hung, and the
    watchdog ended the run. A second Ctrl-C kills.
    """
    from launchers.local import launch
    from mmscale.run.config import check_files
    from mmscale.run.folder import hold_folder

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Rank 0 reads the same file and says the same.
        run = _checked(config, overrides or [], ranks)
        check_files(run)
    words = [*_train_words(config, overrides or []), *(["--profile"] if profile else [])]
    with hold_folder(run.run_dir):
        pass  # Refuses before the ranks' logs are opened; rank 0 takes the lock for the run.
    raise typer.Exit(launch(words, ranks, run.run_dir))


@app.command(epilog="Example: mmscale launch slurm configs/quickstart.yaml --nodes 2 --gpus-per-node 2 --dry-run")
def slurm(
    config: Path = _CONFIG,
    overrides: list[str] = _OVERRIDES,
    nodes: int = typer.Option(1, min=1, help="Machines."),
    gpus_per_node: int = typer.Option(0, min=0, help="GPUs of each machine, one rank each; 0 trains on CPUs."),
    ranks_per_node: int = typer.Option(1, min=1, help="Ranks of each machine in a CPU run."),
    cpus_per_task: int = typer.Option(None, min=1, help="CPU cores a rank (loader workers included)."),
    time: str = typer.Option(None, help="Limit of one start, for example 4:00:00; the run goes on in the next."),
    partition: str = typer.Option(None, help="SLURM partition."),
    account: str = typer.Option(None, help="SLURM account."),
    requeue: bool = typer.Option(True, help="Go back into the queue after the limit, a preemption or a node failure."),
    save_seconds: int = typer.Option(180, min=1, help="Seconds before the limit at which the ranks save and stop."),
    sbatch: list[str] = typer.Option([], help="One more sbatch option, for example --sbatch=--constraint=h100."),
    setup: list[str] = typer.Option([], help="A shell line before the ranks start, for example 'module load cuda'."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the script and submit nothing."),
    json: bool = typer.Option(False, "--json", help="Print job and script as JSON."),
) -> None:
    """Submit training to SLURM: one task a rank, saved before the limit, requeued and resumed until it is finished."""
    from launchers.slurm import Job, render, submit

    run = _checked(config, overrides or [], nodes * (gpus_per_node or ranks_per_node))
    job = Job(
        words=tuple(_train_words(config, overrides or [])),
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
