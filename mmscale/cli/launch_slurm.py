"""``mmscale launch slurm``: submit one training command to SLURM."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mmscale.cli.console import emit, warn
from mmscale.cli.launch_words import CONFIG, OVERRIDES, checked, train_words

if TYPE_CHECKING:
    from launchers.slurm import Job, Problem
    from mmscale.run.config import RunConfig
    from mmscale.run.site import Site

app = typer.Typer()

_DOCTOR = "doctor"
"""Folder in the run folder for the job that examines its machines: another name, so both jobs can wait in the queue."""


@app.command(epilog="Example: mmscale launch slurm configs/quickstart.yaml --nodes 2 --gpus-per-node 2 --dry-run")
def slurm(
    config: Path = CONFIG,
    overrides: list[str] = OVERRIDES,
    nodes: int = typer.Option(1, min=1, help="Number of machines."),
    spares: int = typer.Option(0, min=0, help="Additional machines to replace failing ones; implies --health-check."),
    health_check: bool = typer.Option(
        None, help="Train on no machine that fails a check of at most 300 s. [default: on for several machines or GPUs]"
    ),
    gpus_per_node: int = typer.Option(None, min=0, help="GPUs per machine, with one rank each; 0 trains on CPUs."),
    ranks_per_node: int = typer.Option(None, min=1, help="Ranks per machine in a CPU run."),
    cpus_per_task: int = typer.Option(None, min=1, help="CPU cores per rank, including its loader workers."),
    time: str = typer.Option(None, help="Time limit of the SLURM job, for example 4:00:00; a requeued job resumes."),
    partition: str = typer.Option(None, help="SLURM partition."),
    account: str = typer.Option(None, help="SLURM account."),
    qos: str = typer.Option(None, help="Quality of service."),
    constraint: str = typer.Option(None, help="Features that the nodes must have."),
    requeue: bool = typer.Option(
        None, "--requeue/--no-requeue", help="Requeue after the time limit, a failure or a preemption. [default: on]"
    ),
    max_restarts: int = typer.Option(None, min=0, max=1000, help="Most restarts without new checkpoint. [default: 3]"),
    restart_delay_seconds: int = typer.Option(
        None, min=0, max=86400, help="Delay of the first of these restarts; it doubles with each one. [default: 120]"
    ),
    chain: int = typer.Option(
        1, min=1, max=1000, help="Submit this many jobs that run one after the other and resume, without requeue."
    ),
    after: str = typer.Option(None, help="Start after the job of this number has ended.", metavar="JOB"),
    save_seconds: int = typer.Option(None, min=1, help="Seconds before the limit to save and stop. [default: 180]"),
    sbatch: list[str] = typer.Option([], help="A further sbatch option, for example --sbatch=--exclusive; repeatable."),
    setup: list[str] = typer.Option(
        [], help="A shell line to run before the ranks, for example 'ulimit -n 65536'; repeatable."
    ),
    doctor: bool = typer.Option(False, "--doctor", help="Examine the machines instead of training; see RUN/doctor."),
    site: Path = typer.Option(None, help="Site file. [default: $MMSCALE_SITE, else ~/.config/mmscale/site.yaml]"),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the script and submit nothing."),
    json: bool = typer.Option(False, "--json", help="Print job number, script and log as JSON."),
) -> None:
    """Submit training to SLURM.

    The job saves before its time limit, is requeued, and resumes until the run is finished. Before the submission, the
    job is compared with the partitions of the cluster.
    """
    from launchers.slurm import render, submit
    from mmscale.run.site import load_site

    found = load_site(site)
    options: dict[str, Any] = {
        "gpus_per_node": gpus_per_node,
        "ranks_per_node": ranks_per_node,
        "cpus_per_task": cpus_per_task,
        "time": time,
        "partition": partition,
        "account": account,
        "qos": qos,
        "constraint": constraint,
        "requeue": False if chain > 1 and requeue is None else requeue,
        "health_check": True if spares and health_check is None else health_check,
        "max_restarts": max_restarts,
        "restart_delay_seconds": restart_delay_seconds,
        "save_seconds": save_seconds,
    }
    values = _values(options, found, nodes) | (_examining(options, chain, spares) if doctor else {})
    run = checked(config, overrides or [], nodes * (values["gpus_per_node"] or values["ranks_per_node"] or 1)).value
    job = _checked_job(
        found,
        {key for key, value in options.items() if value is not None},
        arguments=tuple(_doctor_words(run) if doctor else train_words(config, overrides or [])),
        run_dir=run.run_dir / _DOCTOR if doctor else run.run_dir,
        nodes=nodes,
        spares=spares,
        extra=(*found.value.sbatch, *sbatch),
        setup=(*found.value.setup, *setup),
        after=after,
        is_chained=chain > 1,
        **{key: value for key, value in values.items() if value is not None},
    )
    if dry_run:
        print(render(job), end="")
        return
    emit(_submitted(*submit(job, chain)), json=json)


def _doctor_words(run: RunConfig) -> list[str]:
    """Return the command line of each rank that examines the machines of a run."""
    from launchers import RESULT_FILE

    engine, result = run.engine, run.run_dir.resolve() / _DOCTOR / RESULT_FILE
    settings = ["--device", engine.device, "--timeout", str(engine.timeout_seconds)]
    return ["doctor", "--folder", str(run.run_dir), *settings, "--output", str(result)]


def _examining(options: dict[str, Any], chain: int, spares: int) -> dict[str, Any]:
    """Return the values of a job that examines its machines once."""
    from mmscale.errors import RequestError

    if chain > 1 or spares or options["requeue"] or options["health_check"]:
        raise RequestError(
            "--doctor examines the machines once, all of them: leave out --chain, --spares, --requeue, --health-check"
        )
    return {"requeue": False, "health_check": False}


def _values(options: dict[str, Any], site: Site, nodes: int) -> dict[str, Any]:
    """Return the options, with the values of the site file for those that were not given."""
    values = {key: getattr(site.value, key) if value is None else value for key, value in options.items()}
    if values["health_check"] is None:  # One machine with one GPU or none: there is nothing to compare or to replace.
        values["health_check"] = nodes > 1 or (values["gpus_per_node"] or 0) > 1
    return values


def _submitted(numbers: list[str], script: Path) -> dict[str, Any]:
    following = {"chain": numbers} if len(numbers) > 1 else {}
    return {
        "job": numbers[0],
        **following,
        "script": str(script),
        "log": str(script.parent / f"slurm-{numbers[0]}.log"),
    }


def _checked_job(site: Site, overridden: set[str], **values: Any) -> Job:
    """Return the job, compared with the cluster if SLURM answers here.

    Raises:
        ConfigError: the job has problems; lists all of them, those of the site file with file and line.
    """
    from launchers.cluster import UnansweredError, has_slurm, partitions
    from launchers.cluster_check import misfits
    from launchers.container import Container
    from launchers.slurm import Job, JobError

    problems: list[Problem] = []
    values |= {"modules": site.value.modules, "environment": site.value.environment}
    container = site.value.container
    try:
        job = Job(container=None if container is None else Container(**dict(container)), **values)
    except JobError as error:
        job, problems = error.job, error.problems
    try:
        problems += misfits(job, partitions()) if has_slurm() else []
    except UnansweredError as error:
        warn([f"the job was not compared with the cluster: {error}"])
    if problems:
        _raise(site, overridden, problems)
    return job


def _raise(site: Site, overridden: set[str], problems: Iterable[Problem]) -> None:
    from mmscale.errors import ConfigError

    lines = []
    for problem in problems:
        origin = None if problem.key in overridden else site.origin(problem.key)
        lines.append(str(problem) if origin is None else f"{origin} {problem.reason}")
    lines = list(dict.fromkeys(lines))
    raise ConfigError(lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} errors in the job:", *lines]))
