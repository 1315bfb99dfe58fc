"""Render a readable batch script for a run on a SLURM cluster, and submit it.

The script (``job.sbatch.jinja``) needs only bash, ``srun`` and ``scontrol``. A run resumes by itself, so the script
only has to start the same command again after a requeue.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import sys
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from launchers import EXIT_STOPPED, EXIT_WRONG_USE, RESULT_FILE, STOP_FILE
from launchers.cluster import call
from launchers.container import Container
from mmscale.errors import LaunchError, RequestError

_TEMPLATE = "job.sbatch.jinja"
_OWN_MARGIN_SECONDS = 120
"""A run stops by itself this long before SLURM ends the job."""
_SUBMIT_SECONDS = 120.0
"""A busy scheduler may take a minute to answer sbatch."""
HEALTH_SECONDS = 300
"""Longest time of the health check, with the time to start it on all nodes. A node without an answer fails."""
_UNLIMITED = ("infinite", "unlimited", "-1")
_DAYS = re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?")
_MINUTES = re.compile(r"(?:(\d+):(?=\d+:))?(\d+)(?::(\d+))?")
_TIME_OPTION = re.compile(r"(?:--ti(?:m|me|me-|me-m|me-mi|me-min)?(?:=|$)|-t=?)(.*)", re.DOTALL)
"""sbatch accepts abbreviations of ``--time``. ``--t`` alone is ambiguous."""
_COMMAND_LINE = ("-m", "mmscale.cli.main")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_JOB_NUMBER = re.compile(r"\d+(_\d+)?")
_OWN_VARIABLES = (
    *("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "SRUN_CPUS_PER_TASK"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
)
"""Variables that the script sets, or each rank for itself."""
_SCALARS = ("time", "partition", "account", "qos", "constraint")


@dataclass(frozen=True)
class Problem:
    """One wrong value of a job.

    Attributes:
        key: The value's key in a site file, such as ``sbatch.0``, or the name of an option or folder.
        subject: The value as the user would write it on the command line.
        reason: What is wrong, and what to do.
    """

    key: str
    subject: str
    reason: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.reason}"


class JobError(RequestError):
    """A job cannot be submitted; ``problems`` has all reasons, and ``job`` is the job."""

    def __init__(self, job: Job, problems: Sequence[Problem]) -> None:
        super().__init__("\n  ".join(map(str, problems)))
        self.job, self.problems = job, list(problems)


@dataclass(frozen=True)
class Job:
    """The options of a SLURM job.

    Attributes:
        arguments: The command line of each rank, without ``mmscale``.
        run_dir: Run folder, on a file system that all nodes share.
        nodes: Number of machines.
        spares: Machines that the job asks for in addition, to replace those that fail the health check.
        health_check: Whether to check the machines before training. ``spares`` needs it.
        gpus_per_node: GPUs on each machine, one for each rank; 0 for ranks on CPUs.
        ranks_per_node: Ranks on each machine without GPUs. With GPUs it must be 1 or ``gpus_per_node``.
        cpus_per_task: CPU cores for each rank; None for the cluster's default.
        time: Time limit of each start, in SLURM's notation (``4:00:00``); None for the partition's default.
        partition: SLURM partition; None for the default one.
        account: SLURM account to charge; None for the user's default.
        qos: Quality of service; None for the default one.
        constraint: Features that the nodes must have, for example ``h100``.
        requeue: Whether to requeue the job after a stop, a failure, a preemption or a node failure.
        max_restarts: Most restarts in a row without a newer checkpoint, from 0.
        restart_delay_seconds: Delay of the first of these restarts; it doubles with each further one.
        save_seconds: Seconds before the time limit at which SLURM sends the ranks the signal to save.
        extra: More sbatch options, for example ``--constraint=h100``.
        setup: Shell lines that run on the first node before the ranks start, for example ``module load cuda``.
        modules: Environment modules that the script loads before ``setup``. The job ends if one cannot be loaded.
        environment: Variables of the ranks.
        container: The container of the ranks; None to run them on the machine.
        after: Number of a job that must end before this job starts; None for no such job.
        is_chained: Whether the job is one of a chain. It then does nothing if the run was finished after submission.
        executable: The command of each rank before ``arguments``; None for this Python, or that of the container.
        python: The Python that decides on restarts, on the first node.

    Raises:
        JobError: a number is out of range, a text is not allowed in a batch script, a time limit leaves no time for a
            step, or the container cannot start. It has all problems.
    """

    arguments: tuple[str, ...]
    run_dir: Path
    nodes: int = 1
    spares: int = 0
    health_check: bool = False
    gpus_per_node: int = 0
    ranks_per_node: int = 1
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    requeue: bool = True
    max_restarts: int = 3
    restart_delay_seconds: int = 120
    save_seconds: int = 180
    extra: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    container: Container | None = None
    after: str | None = None
    is_chained: bool = False
    executable: tuple[str, ...] | None = None
    python: str = sys.executable

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise JobError(self, problems)

    def _problems(self) -> Iterator[Problem]:
        if self.nodes < 1 or self.ranks_per_node < 1 or self.gpus_per_node < 0 or self.save_seconds < 1:
            yield Problem(
                "nodes",
                f"--nodes {self.nodes}, --gpus-per-node {self.gpus_per_node}, --ranks-per-node {self.ranks_per_node}, "
                f"--save-seconds {self.save_seconds}",
                "nodes, ranks and seconds start at 1, GPUs at 0",
            )
        if self.spares < 0 or (self.spares and not self.health_check):
            yield Problem("spares", f"--spares {self.spares}", "expected 0 or more, and the health check on")
        for key in ("max_restarts", "restart_delay_seconds"):
            if (value := getattr(self, key)) < 0:
                yield Problem(key, f"{key} {value}", "expected 0 or more")
        if self.gpus_per_node and self.ranks_per_node not in (1, self.gpus_per_node):
            yield Problem(
                "ranks_per_node", f"--ranks-per-node {self.ranks_per_node}", "is for CPU runs; each GPU has one rank"
            )
        if self.after is not None and not _JOB_NUMBER.fullmatch(self.after):
            yield Problem("after", f"--after {self.after}", "expected the number of a SLURM job, for example 184467")
        if self.is_chained and self.requeue:
            yield Problem("requeue", "--chain", "a job of a chain is not requeued, since the next one resumes the run")
        yield from self._text_problems()
        yield from self._option_problems()
        if self.container is not None:
            for key, reason in self.container.problems():
                yield Problem(f"container.{key}", f"container.{key}", reason)

    def _text_problems(self) -> Iterator[Problem]:
        """Reject text that would end a line of the script. The rest would become another option or command."""
        folders = [("run_dir", str(self.run_dir.resolve())), ("the current folder", str(Path.cwd()))]
        texts = [(key, f"--{key}", getattr(self, key) or "") for key in _SCALARS]
        texts += [(name, name, text) for name, text in folders]
        lists = (("sbatch", "--sbatch", self.extra), ("setup", "--setup", self.setup))
        for key, option, lines in (*lists, ("modules", "modules", self.modules)):
            texts += [(f"{key}.{number}", option, text) for number, text in enumerate(lines)]
        texts += [(f"environment.{name}", f"environment.{name}", text) for name, text in self.environment.items()]
        if self.container is not None:
            texts += [(f"container.{key}", f"container.{key}", text) for key, text in self.container.texts()]
        for key, name, text in texts:
            if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in text):
                yield Problem(
                    key, f"{name} {text!r}", "a line break or control character is not allowed in a batch script"
                )
        if "\\" in folders[0][1]:
            yield Problem(
                "run_dir",
                f"run_dir {folders[0][1]}",
                "SLURM removes a backslash from the path of a log; rename the folder",
            )
        for name, folder in folders if self.container is not None else ():
            if set(",:") & set(folder):
                yield Problem(
                    name, f"{name} {folder}", "a container cannot mount a path with a comma or colon; rename the folder"
                )

    def _option_problems(self) -> Iterator[Problem]:
        times = [] if self.time is None else [("time", f"--time {self.time}", self.time)]
        for number, option in enumerate(self.extra):
            key, subject = f"sbatch.{number}", f"--sbatch={option}"
            if not option.startswith("-"):
                yield Problem(key, subject, "expected an option of sbatch, for example --sbatch=--qos=high")
            if option.startswith("--container-"):
                yield Problem(
                    key,
                    subject,
                    "the batch script itself would run in the container, which has no srun; name the image under "
                    "container in the site file",
                )
            try:
                times += [(key, subject, time) for time in _times_of(option)]
            except ValueError as error:
                yield Problem(key, subject, str(error))
        for key, subject, time in times:
            if (reason := self._time_problem(time)) is not None:
                yield Problem(key, subject, reason)
        for name in self.environment:
            key = f"environment.{name}"
            if not _VARIABLE.fullmatch(name):
                yield Problem(key, key, "expected letters, digits and _ as the name of a variable")
            elif name in _OWN_VARIABLES or name.startswith("SLURM_"):
                yield Problem(key, key, "the batch script or srun sets this variable; remove it")

    def _time_problem(self, time: str) -> str | None:
        """Return why a time limit cannot be used; None if it can."""
        try:
            limit = seconds_of(time)
        except ValueError as error:
            return str(error)
        margin = max(self.save_seconds, _OWN_MARGIN_SECONDS)
        if limit is None or limit > margin:
            return None
        return (
            f"the limit is {limit} s, but the ranks save and stop {margin} s before the limit (--save-seconds "
            f"{self.save_seconds}, and at least {_OWN_MARGIN_SECONDS} s): no step would run; give a longer --time"
        )

    @property
    def name(self) -> str:
        """See ``job_name``."""
        return job_name(self.run_dir)

    @property
    def folders(self) -> list[Path]:
        """The folders that each rank needs, the working folder first."""
        return [Path.cwd(), self.run_dir.resolve()]

    def command(self) -> list[str]:
        """Return the command of a rank."""
        python = sys.executable if self.container is None else self.container.python
        command = [*(self.executable or (python, *_COMMAND_LINE)), *self.arguments]
        return command if self.container is None else self.container.wrap(command, self.folders, self.gpus_per_node > 0)

    def health_command(self) -> list[str]:
        """Return the command that checks a node, without the folder; empty without a health check."""
        if not self.health_check:
            return []
        command = [self.python if self.container is None else self.container.python, "-m", "launchers.health", "node"]
        return command if self.container is None else self.container.wrap(command, self.folders, self.gpus_per_node > 0)

    def directives(self) -> list[str]:
        """Return the options of sbatch, one for each line of the script."""
        options = {
            "job-name": self.name,
            "nodes": self.nodes + self.spares,
            "ntasks-per-node": self.gpus_per_node or self.ranks_per_node,
            "gpus-per-node": self.gpus_per_node or None,
            "cpus-per-task": self.cpus_per_task,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "signal": f"USR1@{self.save_seconds}",
            "dependency": "singleton" if self.after is None else f"singleton,afterany:{self.after}",
            "chdir": Path.cwd(),
            "output": f"{str(self.run_dir.resolve()).replace('%', '%%')}/logs/slurm-%j.log",
            "open-mode": "append",
        }
        lines = [f"--{key}={shlex.quote(str(value))}" for key, value in options.items() if value is not None]
        return [*lines, "--requeue" if self.requeue else "--no-requeue", *self.extra]


def job_name(run_dir: Path) -> str:
    """Return the name of the jobs of a run folder. With ``--dependency=singleton``, jobs of one name never overlap."""
    folder = run_dir.resolve()
    readable = re.sub(r"[^\w.-]", "_", folder.name, flags=re.ASCII)  # squeue splits a list of names at commas.
    return f"mmscale-{readable}-{zlib.crc32(os.fsencode(folder)):08x}"


def _times_of(option: str) -> Iterator[str]:
    """Yield the time limits in a line with one or more sbatch options. Raises ValueError for an open quote."""
    words = shlex.split(option)
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if (match := _TIME_OPTION.fullmatch(word)) is not None:
            yield match[1] or following


def seconds_of(time: str) -> int | None:
    """Return the seconds of a time limit in SLURM's notation, rounded up to whole minutes; None if it is unlimited.

    The forms are ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, ``days-hours``, ``days-hours:minutes``,
    ``days-hours:minutes:seconds``, ``infinite``, ``unlimited`` and ``-1``. Zero means no limit.

    Raises:
        ValueError: the text has another form.
    """
    if time.lower() in _UNLIMITED:
        return None
    if match := _DAYS.fullmatch(time):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    elif match := _MINUTES.fullmatch(time):
        days, (hours, minutes, seconds) = 0, (int(part or 0) for part in match.groups())
    else:
        raise ValueError(
            "expected minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or "
            "days-hours:minutes:seconds, for example 4:00:00"
        )
    return 60 * math.ceil(((days * 24 + hours) * 60 + minutes) + seconds / 60) or None


def render(job: Job) -> str:
    """Return the batch script."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("launchers", "."),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment.get_template(_TEMPLATE).render(
        title="".join(letter if letter.isprintable() else " " for letter in f"mmscale {shlex.join(job.arguments)}"),
        directives=job.directives(),
        run_dir=job.run_dir.resolve(),
        command=shlex.join(job.command()),
        result_file=RESULT_FILE,
        stop_file=STOP_FILE,
        setup=job.setup,
        modules=job.modules,
        variables=job.environment if job.container is None else job.container.exports(job.environment),
        srun_options=[] if job.container is None else job.container.srun_options(job.folders, job.environment),
        requeue=job.requeue,
        max_restarts=job.max_restarts,
        restart_delay=job.restart_delay_seconds,
        health_command=shlex.join(job.health_command()),
        health_seconds=HEALTH_SECONDS,
        num_nodes=job.nodes,
        num_checked=job.nodes + job.spares,
        num_tasks=job.nodes * (job.gpus_per_node or job.ranks_per_node),
        python=shlex.quote(job.python),
        exit_wrong_use=EXIT_WRONG_USE,
        is_chained=job.is_chained,
        exit_stopped=EXIT_STOPPED,
    )


def submit(job: Job, jobs: int = 1) -> tuple[list[str], Path]:
    """Write the script to the run folder and submit it with ``sbatch``, once or as a chain.

    SLURM starts the jobs of a chain one after the other, because they have the same name and depend on ``singleton``.

    Returns:
        The number of each job, and the path of the script.

    Raises:
        LaunchError: there is no ``sbatch``, it rejected the script, or the log folder cannot be written.
    """
    if shutil.which("sbatch") is None:
        raise LaunchError("no sbatch here: submit from a machine of the cluster, or print the script with --dry-run")
    logs = job.run_dir.resolve() / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)  # SLURM drops a job without a message if its log folder is missing.
        script = logs / "job.sbatch"
        (job.run_dir.resolve() / STOP_FILE).unlink(missing_ok=True)
        script.write_text(render(job), encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise LaunchError(f"{logs}: cannot be written: {error.strerror}") from None
    numbers: list[str] = []
    for _ in range(jobs):
        try:
            numbers.append(call(["sbatch", "--parsable", str(script)], seconds=_SUBMIT_SECONDS).strip().split(";")[0])
        except LaunchError as error:
            if not numbers:
                raise
            raise LaunchError(f"{error}; {len(numbers)} of {jobs} jobs are submitted: {', '.join(numbers)}") from None
    return numbers, script
