"""Ask SLURM about partitions and jobs, and signal jobs. Every call has a time limit: a scheduler may not answer."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from mmscale.errors import LaunchError

_ANSWER_SECONDS = 10.0
_GPUS = re.compile(r"gpu:(?:[^:,()]+:)?(\d+)")
_MOST_LETTERS = 300


class UnansweredError(LaunchError):
    """SLURM did not answer in time, or there is no SLURM here."""


@dataclass(frozen=True)
class NodeGroup:
    """Equal nodes of a partition: their number, and cores and GPUs of each."""

    count: int
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Partition:
    """A partition: its time limit in SLURM's notation, its largest number of nodes per job, and its nodes.

    ``most_nodes`` is None for no limit.
    """

    name: str
    time_limit: str
    most_nodes: int | None
    groups: tuple[NodeGroup, ...]


@dataclass(frozen=True)
class QueuedJob:
    """A job that SLURM knows: its number, its state such as RUNNING, the reason why it waits, and its nodes."""

    number: str
    state: str
    reason: str
    nodes: str

    @property
    def is_pending(self) -> bool:
        """Whether the job waits for its start, for example after a requeue."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")


def has_slurm() -> bool:
    """Return whether the commands of SLURM are installed here."""
    return shutil.which("squeue") is not None


def partitions() -> dict[str, Partition]:
    """Return the partitions by name; the default partition also under the empty name.

    Raises:
        UnansweredError: there is no SLURM here, or it did not answer.
    """
    limits = {}
    for line in call(["scontrol", "show", "partition", "-o"]).splitlines():
        values = dict(re.findall(r"(\w+)=(\S*)", line))
        if "PartitionName" in values:
            limits[values["PartitionName"]] = values
    groups: dict[str, list[NodeGroup]] = {name: [] for name in limits}
    for line in call(["sinfo", "--noheader", "--format=%R|%D|%c|%G"]).splitlines():
        name, count, cpus, gres = (line.split("|") + [""] * 3)[:4]
        if name in groups and count.isdigit():
            gpus = sum(int(number) for number in _GPUS.findall(gres))
            groups[name].append(NodeGroup(int(count), int(cpus.rstrip("+") or 0), gpus))
    found = {}
    for name, values in limits.items():
        most = values.get("MaxNodes", "")
        partition = Partition(
            name, values.get("MaxTime", "UNLIMITED"), int(most) if most.isdigit() else None, tuple(groups[name])
        )
        found[name] = partition
        if values.get("Default") == "YES":
            found[""] = partition
    return found


def jobs_named(name: str) -> list[QueuedJob]:
    """Return the waiting and running jobs of a name, oldest first.

    Raises:
        UnansweredError: there is no SLURM here, or it did not answer.
    """
    text = call(["squeue", "--noheader", f"--name={name}", "--sort=i", "--format=%i|%T|%r|%N"])
    rows = [(line.split("|") + [""] * 3)[:4] for line in text.splitlines() if line.strip()]
    return [QueuedJob(*(part.strip() for part in row)) for row in rows]


def ended_job(number: str) -> QueuedJob | None:
    """Return a job that ended a few minutes ago; None if SLURM has forgotten it.

    Raises:
        UnansweredError: there is no SLURM here, or it did not answer.
    """
    try:
        text = call(["scontrol", "show", "job", "-o", number])
    except UnansweredError:
        raise
    except LaunchError:
        return None
    values = dict(re.findall(r"(\w+)=(\S*)", text))
    if "JobState" not in values:
        return None
    return QueuedJob(number, values["JobState"], f"exit code {values.get('ExitCode', '?')}", values.get("NodeList", ""))


def cancel(numbers: Sequence[str], signal: str | None = None) -> None:
    """Send a signal to the ranks of jobs; without a signal, end the jobs and remove waiting ones.

    Raises:
        LaunchError: SLURM rejected the request or did not answer.
    """
    call(["scancel", *([f"--signal={signal}"] if signal else []), *numbers])


def call(command: Sequence[str], seconds: float = _ANSWER_SECONDS) -> str:
    """Return the output of a command of SLURM.

    Raises:
        UnansweredError: the command is missing, took longer than ``seconds``, or could not reach the controller.
        LaunchError: the command failed.
    """
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=seconds
        )
    except FileNotFoundError:
        raise UnansweredError(f"no {command[0]} here: start this on a machine of the cluster") from None
    except subprocess.TimeoutExpired:
        raise UnansweredError(f"{command[0]} did not answer in {seconds:.0f} s; try again later") from None
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2][-_MOST_LETTERS:] or f"exit code {done.returncode}"
        lost = any(
            words in done.stderr for words in ("Unable to contact", "configuration source", "Connection refused")
        )
        raise (UnansweredError if lost else LaunchError)(f"{command[0]} failed: {said}")
    return done.stdout
