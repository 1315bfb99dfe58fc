"""Render a readable batch script for a run on a SLURM cluster, and submit it.

The script (``job.sbatch.jinja``) needs only bash, ``srun`` and ``scontrol``. A run resumes by itself, so the script
only has to start the same command again after a requeue.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from launchers import EXIT_STOPPED, RESULT_FILE
from mmscale.errors import LaunchError, RequestError

_TEMPLATE = "job.sbatch.jinja"
_OWN_MARGIN_SECONDS = 120
"""A run stops by itself this long before SLURM ends the job."""
_UNLIMITED = ("infinite", "unlimited", "-1")
_DAYS = re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?")
_MINUTES = re.compile(r"(?:(\d+):(?=\d+:))?(\d+)(?::(\d+))?")
_TIME_OPTION = re.compile(r"(?:--ti(?:m|me|me-|me-m|me-mi|me-min)?(?:=|$)|-t=?)(.*)", re.DOTALL)
"""sbatch accepts abbreviations of ``--time``. ``--t`` alone is ambiguous."""
_EXECUTABLE = (sys.executable, "-m", "mmscale.cli.main")


@dataclass(frozen=True)
class Job:
    """The options of a SLURM job.

    Attributes:
        arguments: The command line of each rank, without ``mmscale``.
        run_dir: Run folder, on a file system that all nodes share.
        nodes: Number of machines.
        gpus_per_node: GPUs on each machine, one for each rank; 0 for ranks on CPUs.
        ranks_per_node: Ranks on each machine without GPUs. With GPUs it must be 1 or ``gpus_per_node``.
        cpus_per_task: CPU cores for each rank; None for the cluster's default.
        time: Time limit of each start, in SLURM's notation (``4:00:00``); None for the partition's default.
        partition: SLURM partition; None for the default one.
        account: SLURM account to charge; None for the user's default.
        requeue: Whether to requeue the job after a preemption, a node failure, or a stop that left a newer checkpoint.
        save_seconds: Seconds before the time limit at which SLURM sends the ranks the signal to save.
        extra: More sbatch options, for example ``--constraint=h100``.
        setup: Shell lines that run on the first node before the ranks start, for example ``module load cuda``.
        executable: The command of each rank before ``arguments``.

    Raises:
        RequestError: a number is out of range, a text is not allowed in a batch script, or a time limit leaves no time
            for a step.
    """

    arguments: tuple[str, ...]
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
            raise RequestError(
                f"--nodes {self.nodes}, --gpus-per-node {self.gpus_per_node}, --ranks-per-node {self.ranks_per_node}, "
                f"--save-seconds {self.save_seconds}: nodes, ranks and seconds start at 1, GPUs at 0"
            )
        if self.gpus_per_node and self.ranks_per_node not in (1, self.gpus_per_node):
            raise RequestError("--ranks-per-node is for CPU runs; with GPUs each GPU has one rank")
        self._check_lines()
        if self.time is not None:
            self._check_time(f"--time {self.time}", self.time)
        for option in self.extra:
            for time in _times_of(option):
                self._check_time(f"--sbatch={option}", time)

    def _check_lines(self) -> None:
        """Reject text that would end a line of the script. The rest would become another option or command."""
        texts = [("run_dir", str(self.run_dir.resolve())), ("the current folder", str(Path.cwd()))]
        texts += [("--time", self.time or ""), ("--partition", self.partition or ""), ("--account", self.account or "")]
        texts += [("--sbatch", option) for option in self.extra] + [("--setup", line) for line in self.setup]
        for name, text in texts:
            if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in text):
                raise RequestError(
                    f"{name} {text!r}: a line break or control character is not allowed in a batch script"
                )
        if "\\" in texts[0][1]:
            raise RequestError(
                f"run_dir {texts[0][1]}: SLURM removes a backslash from the path of a log; rename the folder"
            )
        for option in self.extra:
            if not option.startswith("-"):
                raise RequestError(f"--sbatch={option}: expected an option of sbatch, for example --sbatch=--qos=high")

    def _check_time(self, name: str, time: str) -> None:
        limit, margin = seconds_of(time), max(self.save_seconds, _OWN_MARGIN_SECONDS)
        if limit is not None and limit <= margin:
            raise RequestError(
                f"{name}: the limit is {limit} s, but the ranks save and stop {margin} s before the limit "
                f"(--save-seconds {self.save_seconds}, and at least {_OWN_MARGIN_SECONDS} s): no step would run; "
                "give a longer --time"
            )

    @property
    def name(self) -> str:
        """A name that is unique for the run folder. With ``--dependency=singleton``, jobs of one run never overlap."""
        folder = str(self.run_dir.resolve())
        return f"mmscale-{self.run_dir.name}-{zlib.crc32(folder.encode()):08x}"

    def directives(self) -> list[str]:
        """Return the options of sbatch, one for each line of the script."""
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
            "output": f"{str(self.run_dir.resolve()).replace('%', '%%')}/logs/slurm-%j.log",
            "open-mode": "append",
        }
        lines = [f"--{key}={shlex.quote(str(value))}" for key, value in options.items() if value is not None]
        return [*lines, "--requeue" if self.requeue else "--no-requeue", *self.extra]


def _times_of(option: str) -> Iterator[str]:
    """Yield the time limits in a line with one or more sbatch options."""
    try:
        words = shlex.split(option)
    except ValueError as error:
        raise RequestError(f"--sbatch={option}: {error}") from None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if (match := _TIME_OPTION.fullmatch(word)) is not None:
            yield match[1] or following


def seconds_of(time: str) -> int | None:
    """Return the seconds of a time limit in SLURM's notation, rounded up to whole minutes; None if it is unlimited.

    The forms are ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, ``days-hours``, ``days-hours:minutes``,
    ``days-hours:minutes:seconds``, ``infinite``, ``unlimited`` and ``-1``. Zero means no limit.

    Raises:
        RequestError: the text has another form.
    """
    if time.lower() in _UNLIMITED:
        return None
    if match := _DAYS.fullmatch(time):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    elif match := _MINUTES.fullmatch(time):
        days, (hours, minutes, seconds) = 0, (int(part or 0) for part in match.groups())
    else:
        raise RequestError(
            f"--time {time}: expected minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes "
            "or days-hours:minutes:seconds, for example 4:00:00"
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
        command=shlex.join([*job.executable, *job.arguments]),
        result_file=RESULT_FILE,
        setup=job.setup,
        requeue=job.requeue,
        exit_stopped=EXIT_STOPPED,
    )


def submit(job: Job) -> tuple[str, Path]:
    """Write the script to the run folder and submit it with ``sbatch``.

    Returns:
        The job id, and the path of the script.

    Raises:
        LaunchError: there is no ``sbatch``, it rejected the script, or the log folder cannot be written.
    """
    if shutil.which("sbatch") is None:
        raise LaunchError("no sbatch here: submit from a machine of the cluster, or print the script with --dry-run")
    logs = job.run_dir.resolve() / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)  # SLURM drops a job without a message if its log folder is missing.
        script = logs / "job.sbatch"
        script.write_text(render(job), encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise LaunchError(f"{logs}: cannot be written: {error.strerror}") from None
    done = _call(["sbatch", "--parsable", str(script)])
    return done.strip().split(";")[0], script


def _call(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"{command[0]} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
