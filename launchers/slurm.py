"""A run on a SLURM cluster: renders a batch script a person can read, and submits it.

The script (``job.sbatch.jinja``) needs nothing but bash, ``srun`` and ``scontrol``: resuming is the run's own habit, so
requeueing is submitting again.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from launchers import EXIT_STOPPED, RESULT_FILE
from mmscale.errors import LaunchError

_TEMPLATE = "job.sbatch.jinja"
_EXECUTABLE = (sys.executable, "-m", "mmscale.cli.main")


@dataclass(frozen=True)
class Job:
    """What to ask SLURM for.

    Attributes:
        words: The command line of each rank, without ``mmscale``.
        run_dir: Run folder, on a file system that all nodes share.
        nodes: Number of machines.
        gpus_per_node: GPUs of each machine, one rank each; 0 for ranks on CPUs.
        ranks_per_node: Ranks of each machine when there are no GPUs.
        cpus_per_task: CPU cores a rank; None for the cluster's default.
        time: Limit of one start, in SLURM's notation (``4:00:00``); None for the partition's default.
        partition: SLURM partition; None for the default one.
        account: SLURM account to charge; None for the user's default.
        requeue: Whether the job goes back into the queue after a stop, a preemption or a node failure.
        save_seconds: How long before the time limit the ranks are told to save.
        extra: More sbatch options, for example ``--constraint=h100``.
        setup: Shell lines that run on the first node before the ranks start, for example ``module load cuda``.
        executable: How each rank calls the command line.
    """

    words: tuple[str, ...]
    run_dir: Path
    nodes: int = 1
    gpus_per_node: int = 0
    ranks_per_node: int = 1
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    requeue: bool = True
    save_seconds: int = 180
    extra: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    executable: tuple[str, ...] = _EXECUTABLE

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.ranks_per_node < 1 or self.gpus_per_node < 0 or self.save_seconds < 1:
            raise LaunchError(
                f"--nodes {self.nodes}, --gpus-per-node {self.gpus_per_node}, --ranks-per-node {self.ranks_per_node}, "
                f"--save-seconds {self.save_seconds}: nodes, ranks and seconds start at 1, GPUs at 0"
            )
        if self.gpus_per_node and self.ranks_per_node not in (1, self.gpus_per_node):
            raise LaunchError("--ranks-per-node is for CPU runs; with GPUs there is one rank a GPU")

    @property
    def name(self) -> str:
        """One name a run folder: ``--dependency=singleton`` then keeps two jobs of one run from running at once."""
        folder = str(self.run_dir.resolve())
        return f"mmscale-{self.run_dir.name}-{zlib.crc32(folder.encode()):08x}"

    def directives(self) -> list[str]:
        """Options of sbatch, one a line of the script."""
        options = {
            "job-name": self.name,
            "nodes": self.nodes,
            "ntasks-per-node": self.gpus_per_node or self.ranks_per_node,
            "gpus-per-node": self.gpus_per_node or None,
            "cpus-per-task": self.cpus_per_task,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "signal": f"USR1@{self.save_seconds}",
            "dependency": "singleton",
            "chdir": Path.cwd(),
            "output": self.run_dir.resolve() / "logs" / "slurm-%j.log",
            "open-mode": "append",
        }
        lines = [f"--{key}={shlex.quote(str(value))}" for key, value in options.items() if value is not None]
        return [*lines, "--requeue" if self.requeue else "--no-requeue", *self.extra]


def render(job: Job) -> str:
    """The batch script."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("launchers", "."),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment.get_template(_TEMPLATE).render(
        title=f"mmscale {shlex.join(job.words)}".replace("\n", " "),
        directives=job.directives(),
        run_dir=job.run_dir.resolve(),
        command=shlex.join([*job.executable, *job.words]),
        result_file=RESULT_FILE,
        setup=job.setup,
        requeue=job.requeue,
        exit_stopped=EXIT_STOPPED,
    )


def submit(job: Job) -> tuple[str, Path]:
    """Hands the script to ``sbatch``.

    Returns:
        The job's number and the script's path in the run folder.

    Raises:
        LaunchError: there is no ``sbatch`` here, or it refused.
    """
    if shutil.which("sbatch") is None:
        raise LaunchError("no sbatch here: submit from a machine of the cluster, or look at the script with --dry-run")
    logs = job.run_dir.resolve() / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)  # SLURM drops a job silently whose log folder is missing.
        script = logs / "job.sbatch"
        script.write_text(render(job), encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"{logs}: cannot be written: {error.strerror}") from None
    done = _call(["sbatch", "--parsable", str(script)])
    return done.strip().split(";")[0], script


def _call(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"{command[0]} refused: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
