"""Decide whether a SLURM job restarts after its ranks have ended. The batch script runs it: ``job.sbatch.jinja``.

    python -m launchers.restarts begin ...   before the ranks start: record the start, blame nodes that went down
    python -m launchers.restarts end ...     after the ranks ended: record why, decide whether to requeue the job

Each call prints one line for the script, ``ACTION DELAY NODES REASON``. ACTION is ``run``, ``requeue`` or ``end``.
DELAY is in seconds. NODES is the job's new list of excluded nodes (``-``: unchanged). ``RUN/logs/restarts.jsonl`` has
one line for each start, failure and decision of the job, over all its starts.

A job restarts at most ``--max-restarts`` times in a row without a newer checkpoint. The first of these restarts waits
``--delay`` seconds, each further one twice as long as the one before. A node that failed twice in one job is excluded.
These failures count for a node: SLURM reports it down, a signal killed one of its ranks, or the watchdog found one of
its ranks stopped. An exit code 1 counts for no node, because all ranks may have the same cause. A node that failed the
health check is excluded after one failure, unless all nodes failed it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_pipeline.io.untrusted import append_regular, parse_json, read_bytes, read_json, read_lines
from launchers import EXIT_HUNG, EXIT_WRONG_USE, STARTS_FILE, VERDICT_FILE

RESTARTS_FILE = "logs/restarts.jsonl"
STRIKES = 2
"""Failures of a node in one job after which it is excluded."""
LONGEST_DELAY_SECONDS = 3600
"""Longest delay of a restart, unless the first delay is longer."""
_MOST_LINE_BYTES = 1 << 20
_MOST_EXIT_BYTES = 1 << 10
_SCONTROL_SECONDS = 60
_MOST_LISTED = 8
_KILLED = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
"""Signals that count for the node of the rank. SIGABRT is missing: NCCL also aborts the ranks that lost a peer."""
_DOWN = re.compile(r"\b(DOWN|FAIL|FAILING|NOT_RESPONDING)\b|\*")
_NODE = re.compile(r"[\w.-]{1,255}")


class RankExit(NamedTuple):
    """How a rank failed: its number, the name of its node in SLURM, and its exit code."""

    rank: int
    node: str
    code: int


@dataclass(frozen=True)
class End:
    """The end of the ranks of a start.

    Attributes:
        code: Exit code of ``srun``.
        stopped: Whether a rank saved and stopped.
        exits: Ranks that failed, in the order in which they ended. Ranks that SLURM killed are missing.
        silent: Nodes whose ranks did not run, as the watchdog of another rank found.
        down: Nodes of the job that SLURM reports as down.
        unhealthy: Nodes that failed the health check, so that no rank was started.
    """

    code: int
    stopped: bool = False
    exits: Sequence[RankExit] = ()
    silent: Sequence[str] = ()
    down: Sequence[str] = ()
    unhealthy: Sequence[str] = ()

    def cause(self) -> tuple[str, list[str]]:
        """Return why the ranks ended, and the nodes that caused it."""
        if self.stopped:
            return "saved and stopped", []
        if self.unhealthy:  # A check is repeatable evidence: exclude the node after one failure.
            return f"{_listed(self.unhealthy)} failed the health check", STRIKES * list(self.unhealthy)
        if self.down:
            return f"SLURM reports {_listed(self.down)} as down", list(self.down)
        if not self.exits:
            return f"the ranks ended with exit code {self.code}", []
        first = self.exits[0]
        where = f"rank {first.rank} on {first.node}"
        if first.code == EXIT_HUNG:
            found = f": the rank on {', '.join(self.silent)} does not run" if self.silent else ""
            return f"the watchdog of {where} ended the run{found}", list(self.silent)
        if first.code > 128:
            with suppress(ValueError):
                number = signal.Signals(first.code - 128)
                return f"{where} was killed by {number.name}", [first.node] if number in _KILLED else []
        return f"{where} ended with exit code {first.code}", []

    @property
    def can_heal(self) -> bool:
        """Whether a restart can help. Wrong use fails again, and exit code 0 without a result has no known cause."""
        first = self.exits[0].code if self.exits else self.code
        return self.stopped or first not in (0, EXIT_WRONG_USE)


def _listed(nodes: Sequence[str]) -> str:
    """Return the first nodes by name and the number of the others, so that a line of the log stays readable."""
    more = len(nodes) - _MOST_LISTED
    return ", ".join(nodes[:_MOST_LISTED]) + (f" and {more} more nodes" if more > 0 else "")


@dataclass
class History:
    """The earlier starts of one job, read from its records.

    Attributes:
        checkpoint: Newest checkpoint at the last record; empty for none.
        failures: Failures in a row without a newer checkpoint. A start without a record counts as one: the file may
            have been on a full disk.
        strikes: Number of failures by node.
        starts: Number of starts up to the last record.
        last: The last record.
        nodes: Nodes of the last start.
    """

    checkpoint: str = ""
    failures: int = 0
    strikes: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    last: Mapping[str, Any] = field(default_factory=dict)
    nodes: Sequence[str] = ()

    def add(self, record: Mapping[str, Any]) -> None:
        """Add the next record."""
        self.reach(int(record["start"]))
        self.starts = int(record["start"]) + 1
        is_newer = record["checkpoint"] not in ("", self.checkpoint)
        if is_newer:
            self.checkpoint = str(record["checkpoint"])
        # Another job wrote the checkpoint: at this end, or between that end and this beginning.
        foreign = record.get("locked_out") or (record["event"] == "begin" and self.last.get("locked_out"))
        # The first record of a job does not show whether earlier starts, without a record, wrote the checkpoint.
        if (is_newer and self.last and not foreign) or (record["event"] == "end" and not record["counts"]):
            self.failures = 0
        if record["event"] == "begin":
            self.nodes = [str(node) for node in record["nodes"]]
        elif record["counts"]:
            self.failures += 1
        self.strikes.update(str(node) for node in record["failed"])
        self.last = record

    def reach(self, start: int) -> None:
        """Count the starts before ``start`` that have no record as failures."""
        if start > self.starts:
            self.failures += start - self.starts
            self.starts = start


class Limits(NamedTuple):
    """The bounds of restarts in a row without a newer checkpoint: their number, and the delay of the first one."""

    max_restarts: int
    delay_seconds: int


class Decision(NamedTuple):
    """The next action of the script, see the top of this file."""

    action: Literal["run", "requeue", "end"]
    reason: str
    delay: int = 0
    exclude: Sequence[str] = ()


def decide_end(history: History, end: End, limits: Limits) -> Decision:
    """Decide what to do after the ranks of a start have ended.

    Args:
        history: The records of the job, with that of this end.
        end: The facts of this end.
        limits: The bounds of restarts.
    """
    reason, _ = end.cause()
    if not end.can_heal:
        return Decision("end", f"{reason}; a restart cannot help")
    return _restart(history, reason, limits)


def decide_begin(history: History, down: Sequence[str], nodes: Sequence[str], limits: Limits) -> Decision:
    """Decide whether a start may run its ranks.

    Args:
        history: The records of the job, with that of the nodes in ``down``.
        down: Nodes of the last start that went down.
        nodes: Nodes of this start.
        limits: The bounds of restarts.
    """
    if down and history.failures > limits.max_restarts:
        return _restart(history, f"{', '.join(down)} went down", limits)
    banned = [node for node in nodes if history.strikes[node] >= STRIKES]
    # Once in a row: the requeue may have failed to exclude the nodes.
    if banned and history.last.get("action") != "requeue":
        return Decision("requeue", f"{', '.join(banned)} failed {STRIKES} times", exclude=banned)
    return Decision("run", "")


def _restart(history: History, reason: str, limits: Limits) -> Decision:
    most, first = limits
    if history.failures > most:
        return Decision(
            "end",
            f"{reason}; failure {history.failures} in a row without a newer checkpoint, --max-restarts is "
            f"{most}; submit again after the cause is removed",
        )
    delay, counted = 0, "a newer checkpoint was saved"
    if history.failures:
        delay = max(first, min(LONGEST_DELAY_SECONDS, first << min(history.failures - 1, 20)))
        counted = f"restart {history.failures} of {most} without a newer checkpoint, in {delay} s or later"
    exclude = sorted(node for node, count in history.strikes.items() if count >= STRIKES)
    return Decision("requeue", f"{reason}; requeued ({counted})", delay, exclude)


def read_history(run_dir: Path, job: str) -> History:
    """Return the earlier starts of a job. Damaged lines, and those of other jobs, are left out."""
    history = History()
    with suppress(FileNotFoundError):
        for line in read_lines(run_dir / RESTARTS_FILE, most_bytes=_MOST_LINE_BYTES):
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                record = parse_json(line)
                if record["job"] == job:
                    history.add(record)
    return history


def read_exits(folder: Path) -> list[RankExit]:
    """Return the ranks that failed, in the order in which they ended. Each file holds ``CODE NODE``."""
    found = []
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(ValueError, OSError):
                code, node = read_bytes(path, most_bytes=_MOST_EXIT_BYTES).decode().split()
                found.append((path.stat().st_mtime_ns, RankExit(int(path.name), node, int(code))))
    return [rank for _, rank in sorted(found)]


def _silent_nodes(run_dir: Path) -> list[str]:
    """Return the nodes with ranks that did not run, if a watchdog has reported a hang in this start."""
    try:
        nodes = read_json(run_dir / VERDICT_FILE)["silent_nodes"]
        return sorted({node for node in nodes if isinstance(node, str) and _NODE.fullmatch(node)})
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _starts_bytes(run_dir: Path) -> int | None:
    """Return the size of the file with a line for each start that had the lock of the run folder; None without one."""
    try:
        return (run_dir / STARTS_FILE).stat().st_size
    except OSError:
        return None


def _was_locked_out(history: History, run_dir: Path) -> bool:
    """Return whether no rank got the lock since the job's start, because another job works in the run folder."""
    before = history.last.get("starts_bytes") if history.last.get("event") == "begin" else None
    return before is not None and before == _starts_bytes(run_dir)


def _scontrol(*words: str) -> str:
    """Return what ``scontrol`` prints; empty if it fails. It then only lacks evidence against a node."""
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=_SCONTROL_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _fields(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _down_nodes(nodes: Sequence[str], since: float | None = None) -> list[str]:
    """Return the nodes that SLURM reports as down, or that booted after the Unix time ``since``."""
    down = []
    for line in _scontrol("show", "node", "-o", ",".join(nodes)).splitlines() if nodes else ():
        values = _fields(line)
        is_down = _DOWN.search(values.get("State", "")) is not None
        with suppress(ValueError, KeyError):
            booted = datetime.fromisoformat(values["BootTime"]).timestamp()
            is_down = is_down or (since is not None and booted > since)
        if is_down and values.get("NodeName") in nodes:
            down.append(values["NodeName"])
    return down


def _lost_nodes(history: History) -> list[str]:
    """Return the nodes that went down in the last start, unless other nodes are already to blame for its end."""
    last = history.last
    ran = last.get("event") == "begin" and last.get("action") == "run"
    failed = last.get("event") == "end" and not last["failed"] and last.get("code") != 0
    return _down_nodes(history.nodes, float(last["time"])) if ran or failed else []


def _exclusion(nodes: Iterable[str], job: str, num_nodes: int) -> str:
    """Return the job's new list of excluded nodes, or ``-`` if its partition has no node to spare."""
    nodes = [node for node in nodes if _NODE.fullmatch(node)]
    shown = _fields(_scontrol("show", "job", "-o", job))
    now = shown.get("ExcNodeList", "(null)").replace("(null)", "")
    before = _scontrol("show", "hostnames", now).split() if now else []
    total = _fields(_scontrol("show", "partition", "-o", shown.get("Partition", ""))).get("TotalNodes", "")
    excluded = sorted({*before, *nodes})
    if not nodes or set(nodes) <= set(before) or not total.isdigit() or int(total) - len(excluded) < num_nodes:
        return "-"
    return ",".join(excluded)


def _append(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Append a record. A full disk must not prevent a restart: ``History.reach`` counts a start without record."""
    path = run_dir / RESTARTS_FILE
    try:
        torn = path.is_file() and not path.read_bytes().endswith(b"\n")
        with append_regular(path) as file:
            file.write(("\n" * torn + json.dumps(record) + "\n").encode())
    except (OSError, ValueError) as error:
        print(f"{path}: cannot be written: {error}", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launchers.restarts", description=__doc__.split("\n\n")[0])
    parser.add_argument("event", choices=["begin", "end"])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--checkpoint", required=True, help="time and folder of the newest checkpoint; empty for none")
    parser.add_argument("--before", default="", help="the same before the ranks started")
    parser.add_argument("--max-restarts", type=int, required=True)
    parser.add_argument("--delay", type=int, default=120, help="seconds before the first restart without progress")
    parser.add_argument("--code", type=int, default=0, help="exit code of srun")
    parser.add_argument("--stopped", type=Path, help="file that ranks create if they saved and stopped")
    parser.add_argument("--unhealthy", default="-", help="nodes that failed the health check, with commas; - for none")
    parser.add_argument("--exits", type=Path, help="folder with a file for each rank that failed")
    return parser.parse_args()


def main() -> None:
    """Record a start or an end of the job, and print the decision."""
    args = _arguments()
    limits = Limits(args.max_restarts, args.delay)
    job, start = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    nodes = _scontrol("show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    history = read_history(args.run_dir, job)
    history.reach(start)
    base = {"time": time.time(), "job": job, "start": start, "checkpoint": args.checkpoint, "failed": []}
    if args.event == "begin":
        down = _lost_nodes(history)
        if down:
            # An end for which no node was to blame has already been counted.
            counts = history.last["event"] == "begin" and args.checkpoint == history.checkpoint
            lost = base | {"event": "down", "failed": down, "counts": counts, "start": start - 1}
            _append(args.run_dir, lost)
            history.add(lost)
        decision = decide_begin(history, down, nodes, limits)
        record = base | {"event": "begin", "nodes": nodes, "starts_bytes": _starts_bytes(args.run_dir)}
    else:
        stopped = args.stopped is not None and args.stopped.exists()
        exits = read_exits(args.exits) if args.exits else []
        unhealthy = [node for node in nodes if node in args.unhealthy.split(",")]
        end = End(args.code, stopped, exits, _silent_nodes(args.run_dir), _down_nodes(nodes), unhealthy)
        reason, failed = end.cause()
        if unhealthy == nodes and len(nodes) > 1:
            failed = []  # The cause is common to all nodes, for example a shared file system. Others would fail too.
        locked_out = _was_locked_out(history, args.run_dir)
        # A folder that cannot be read has no checkpoint; that is no progress.
        counts = locked_out or args.checkpoint in ("", args.before)
        base |= {"locked_out": True} if locked_out else {}
        record = base | {"event": "end", "code": args.code, "reason": reason, "failed": failed, "counts": counts}
        history.add(record)
        decision = decide_end(history, end, limits)
    exclude = _exclusion(decision.exclude, job, len(nodes))
    if args.event == "begin" and decision.action == "requeue" and exclude == "-":
        decision = Decision("run", "")  # There is no other node.
    _append(args.run_dir, record | {"action": decision.action, "exclude": exclude})
    print(
        decision.action, decision.delay, exclude, decision.reason + (f", without {exclude}" if exclude != "-" else "")
    )


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"launchers.restarts: {error}")
