"""``mmscale launch status|logs|stop``: watch and stop a run by its folder, on this machine or in SLURM."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mmscale.cli.console import console, emit, print_table, warn
from mmscale.errors import LaunchError

if TYPE_CHECKING:
    from launchers.cluster import QueuedJob
    from mmscale.run.status import RunStatus

app = typer.Typer()

_RUN = typer.Argument(help="A run folder.", metavar="RUN")
_MOST_RANKS = 16
_MOST_NODES = 8
_JOB_LOG = re.compile(r"slurm-(\d+)\.log")
_FOLLOW_SECONDS = 0.5
_CHUNK_BYTES = 1 << 20


@app.command(epilog="Example: mmscale launch status runs/quickstart --json")
def status(
    run: Path = _RUN,
    json: bool = typer.Option(False, "--json", help="Print one JSON object, with all ranks."),
) -> None:
    """Print whether a run is running, queued, finished, stopped, failed or hung, and how far it is.

    If the files do not show whether its processes live, the command watches them for up to 12 seconds.
    """
    from mmscale.run.status import read_status

    job, jobs = _jobs(run)
    found = read_status(run, jobs)
    in_queue = [{"job": each.number, "state": each.state, "reason": each.reason, "nodes": each.nodes} for each in jobs]
    values = {"run": str(run), **asdict(found), "job": job, "queue": in_queue}
    if json:
        emit(values, json=True)
        return
    _print(found, values)


def _print(found: RunStatus, values: dict[str, object]) -> None:
    from mmscale.metrics.format import format_seconds

    of = "" if found.total_steps is None else f" of {found.total_steps}"
    age = found.checkpoint_age_seconds
    rows = {
        "state": f"{found.state}: {found.reason}",
        "job": values["job"],
        "queue": ", ".join(f"{each['job']} {each['state']}" for each in values["queue"]) or None,  # type: ignore[attr-defined]
        "holder": found.holder,
        "step": None if found.step is None else f"{found.step}{of}",
        "step time": None if found.seconds_per_step is None else f"{found.seconds_per_step:.3g} s",
        "time left": None if found.seconds_left is None else format_seconds(found.seconds_left),
        "checkpoint": None if age is None else f"step {found.checkpoint_step}, {format_seconds(age)} old",
        "restarts": found.restarts,
        "slow": "; ".join(map(str, found.slow_nodes[:_MOST_NODES])) or None,
        "ages": f"by the clock of {found.ages}" if found.ages == "this machine" else f"relative to the {found.ages}",
    }
    emit({key: value for key, value in rows.items() if value is not None})
    # All ranks of a small run; else the ranks with the oldest heartbeats and the longest phases.
    shown = found.ranks if found.state in ("running", "hung") else ()
    order = sorted(shown, key=lambda rank: (-rank.age_seconds, -rank.phase_seconds))[:_MOST_RANKS]
    print_table([asdict(rank) for rank in sorted(order, key=lambda rank: rank.rank)])
    if len(shown) > _MOST_RANKS:
        console.print(f"{len(shown)} ranks; those with the oldest heartbeats are shown. --json lists all.")


def _jobs(run: Path) -> tuple[str | None, list[QueuedJob]]:
    """Return the newest job of a run folder, and its jobs in the queue. Warns if SLURM does not answer."""
    from launchers.cluster import UnansweredError, has_slurm, jobs_named
    from launchers.slurm import job_name

    logs = _job_logs(run)
    newest = _JOB_LOG.fullmatch(logs[-1].name) if logs else None
    jobs: list[QueuedJob] = []
    if (run / "logs/job.sbatch").exists():
        try:
            if not has_slurm():
                raise UnansweredError("no squeue here")
            jobs = jobs_named(job_name(run))
        except UnansweredError as error:
            warn([f"the queue is unknown: {error}"])
    active = [job.number for job in jobs if not job.is_pending]
    return (active[0] if active else newest[1] if newest else jobs[0].number if jobs else None), jobs


def _job_logs(run: Path) -> list[Path]:
    """Return the logs of the jobs of a run, oldest job first."""
    with suppress(OSError):
        names = [name for name in os.listdir(run / "logs") if _JOB_LOG.fullmatch(name)]
        return [run / "logs" / name for name in sorted(names, key=lambda name: int(name[6:-4]))]
    return []


@app.command(epilog="Example: mmscale launch logs runs/my_run --rank 0 --follow")
def logs(
    run: Path = _RUN,
    rank: int = typer.Option(None, min=0, help="Print the log of this rank; by default the log of the SLURM job."),
    follow: bool = typer.Option(False, "--follow", "-f", help="Print new lines until Ctrl-C, also of the next job."),
    lines: int = typer.Option(40, "--lines", "-n", min=0, help="Lines from the end of the log."),
) -> None:
    """Print the end of a log: of the newest SLURM job, or of one rank."""
    path = _log_of(run, rank)
    position = _print_end(path, lines)
    while follow:
        time.sleep(_FOLLOW_SECONDS)
        position = _print_from(path, position)
        if (newer := _log_of(run, rank)) != path:
            print(f"==> {newer} <==", flush=True)
            path, position = newer, 0


def _log_of(run: Path, rank: int | None) -> Path:
    if not run.is_dir():
        raise LaunchError(f"{run}: no such run folder")
    job_logs = _job_logs(run)
    if job_logs and rank is None:
        return job_logs[-1]
    if job_logs:
        for log in reversed(job_logs):
            if (path := log.with_name(f"{log.stem}-{rank}.log")).exists():
                return path
        raise LaunchError(f"{run}/logs: no job has a log of rank {rank}")
    if rank and (path := run / f"logs/rank-{rank}.log").exists():
        return path
    have = ", ".join(sorted(path.name for path in (run / "logs").glob("*") if path.is_file())) or "no files"
    if rank is None or rank == 0:
        raise LaunchError(
            f"{run}: no log of a SLURM job; rank 0 of a run on this machine writes to the terminal that started it; "
            f"{run}/logs has {have}"
        )
    raise LaunchError(f"{run}/logs: no log of rank {rank}; there are {have}")


def _print_end(path: Path, lines: int) -> int:
    """Print the last lines of a file and return its size."""
    from data_pipeline.io.untrusted import open_regular

    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - _CHUNK_BYTES))
        _write(b"".join(file.read(_CHUNK_BYTES).splitlines(keepends=True)[-lines:] if lines else []))
        return file.tell()


def _print_from(path: Path, position: int) -> int:
    from data_pipeline.io.untrusted import open_regular

    with suppress(FileNotFoundError), open_regular(path) as file:
        if os.fstat(file.fileno()).st_size < position:  # The file was replaced.
            position = 0
        file.seek(position)
        while chunk := file.read(_CHUNK_BYTES):
            _write(chunk)
        return file.tell()
    return position


def _write(text: bytes) -> None:
    sys.stdout.buffer.write(text)
    sys.stdout.flush()


@app.command(epilog="Example: mmscale launch stop runs/my_run")
def stop(
    run: Path = _RUN,
    now: bool = typer.Option(False, "--now", help="End the run at once; steps after the last checkpoint are lost."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Let a run save and stop after its current step. The command does not wait for the end.

    Waiting jobs of the run are removed from the queue, and its jobs are not requeued. Start or submit the run again to
    resume it.
    """
    from mmscale.io.lock import held_lock

    if not run.is_dir():
        raise LaunchError(f"{run}: no such run folder")
    held = held_lock(run)
    holder = None if held is None else held.holder
    job = "" if holder is None else holder.slurm_job.rpartition("/")[2]
    if (done := _stop_jobs(run, job, now, is_here=held is not None and held.is_here)) is not None:
        emit({"run": str(run), **done}, json=json)
        return
    if held is None:
        raise LaunchError(f"{run}: no process works in this folder, and no job of it waits; there is nothing to stop")
    if not held.is_here:
        where = "another machine" if holder is None else holder.host
        raise LaunchError(f"{run}: its process runs on {where}; give this command there")
    if held.pid is None:
        raise LaunchError(f"{run}: its process runs in a container with its own process numbers; stop it there")
    try:
        os.kill(held.pid, signal.SIGKILL if now else signal.SIGUSR1)
    except ProcessLookupError:
        raise LaunchError(f"{run}: the run ended just now") from None
    except PermissionError:
        raise LaunchError(f"{run}: process {held.pid} belongs to another user, who must stop it") from None
    emit({"run": str(run), "process": held.pid, "sent": "SIGKILL" if now else "SIGUSR1"}, json=json)


def _stop_jobs(run: Path, job: str, now: bool, *, is_here: bool) -> dict[str, object] | None:
    """Stop the jobs of a run folder. Return what was done; None if SLURM has no job of it.

    Args:
        run: The run folder.
        job: Number of the job that holds the folder; empty for none.
        now: Whether to end the jobs without saving.
        is_here: Whether a process of this machine holds the folder. It can be stopped without SLURM.
    """
    from data_pipeline.io.atomic import write_whole
    from launchers import STOP_FILE
    from launchers.cluster import UnansweredError, cancel, jobs_named
    from launchers.slurm import job_name

    if not job and not (run / "logs/job.sbatch").exists():
        return None
    try:
        queued = jobs_named(job_name(run))
    except UnansweredError:
        if job or not is_here:
            raise
        return None
    active = sorted({each.number for each in queued if not each.is_pending} | ({job} if job else set()))
    waiting = [each.number for each in queued if each.is_pending]
    if not active and not waiting:
        return None
    # The marker keeps the batch script from a requeue. Write it first, since a job may end before the signal arrives.
    write_whole(run / STOP_FILE, b"mmscale launch stop\n", parents=True)
    if waiting:
        cancel(waiting)
    if active:
        cancel(active, None if now else "USR1")
    return {"stopped_jobs": active, "removed_jobs": waiting, "sent": "end" if now else "SIGUSR1"}
