"""A real SLURM cluster of virtual nodes on this machine, for tests: ``python -m tests.slurm.cluster 2``.

    munged + slurmctld + one slurmd for each node n1, n2, ...     all in one folder, each node with an address 127.0.1.N

It needs Debian's packages slurmctld, slurmd and munge, but no systemd, cgroups or database. The nodes share the file
system, the cores and the host name of this machine. The clocks of SLURM are short, so that tests are short.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
KILL_WAIT_SECONDS = 10
"""Seconds between SIGTERM and SIGKILL when SLURM ends a step."""
GRACE_SECONDS = 120
"""Most seconds that a preempted job has to save."""
_FIRST_PORT = 26_800
_CONF = """\
ClusterName=mmscale
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits for cred_expire seconds, 120 by default, before it starts again.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
KillWait={kill_wait}
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=5
TreeWidth=65533
BatchStartTimeout=15
InactiveLimit=0
MinJobAge=86400
ReturnToService=2
PartitionName=low Nodes=ALL Default=YES State=UP MaxTime=INFINITE DefaultTime=60 PriorityTier=1 GraceTime={grace}
PartitionName=high Nodes=ALL State=UP MaxTime=INFINITE DefaultTime=60 PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """Return the programs of SLURM that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


class Cluster:
    """A cluster of ``nodes`` virtual nodes, named n1, n2, ... Call ``up`` first and ``down`` in any case.

    Args:
        folder: An empty folder. Its path must be shorter than 70 characters, because it holds UNIX sockets.
        nodes: Number of nodes, at most 99.

    Attributes:
        conf: The configuration file, for the variable ``SLURM_CONF``.
        nodes: Names of the nodes.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self._folder, self.nodes = folder, [f"n{number}" for number in range(1, nodes + 1)]
        self.conf = folder / "slurm.conf"
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))},
            "SLURM_CONF": str(self.conf),
            "PATH": _path(),
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def up(self) -> None:
        """Start all daemons and wait until all nodes are idle.

        Raises:
            RuntimeError: a program is missing, or a daemon does not answer; the message has the end of its log.
        """
        if absent := missing():
            raise RuntimeError(f"SLURM is not installed ({', '.join(absent)} not found): {INSTALL}")
        folder, port = self._folder, _free_ports(len(self.nodes) + 1)
        text = _CONF.format(
            folder=folder, port=port, user=getpass.getuser(), kill_wait=KILL_WAIT_SECONDS, grace=GRACE_SECONDS
        )
        for number, name in enumerate(self.nodes, 1):
            text += f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.1.{number} Port={port + number}"
            text += " CPUs=8 RealMemory=8000 State=UNKNOWN\n"
            (folder / f"spool-{name}").mkdir()
        (folder / "state").mkdir()
        self.conf.write_text(text)
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        names = ("socket", "key-file", "pid-file", "log-file", "seed-file")
        files = ("munge.sock", "munge.key", "munged.pid", "munged.log", "munge.seed")
        options = [f"--{name}={folder / file}" for name, file in zip(names, files, strict=True)]
        self._spawn("munged", "munged", "--foreground", "--force", *options)
        self._wait("munged", lambda: (folder / "munge.sock").exists())
        self._spawn("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        self._wait("slurmctld", lambda: " UP" in self.call("scontrol", "ping", check=False))
        for name in self.nodes:
            self.start(name)

    def down(self) -> None:
        """Kill all daemons and all processes of all jobs."""
        for name in self.nodes:
            self.crash(name)
        for process in self._daemons.values():
            process.kill()
            process.wait()
        self._daemons.clear()

    def start(self, node: str) -> None:
        """Start the slurmd of a node, if it does not run, and wait until SLURM can use the node."""
        if node not in self._daemons or self._daemons[node].poll() is not None:
            self._spawn(node, "slurmd", "-D", "-N", node, "-f", str(self.conf))
        usable = {"IDLE", "ALLOCATED", "MIXED", "COMPLETING"}
        self._wait(f"slurmd-{node}", lambda: set(self.state_of(node).split("+")) <= usable)

    def settle(self) -> None:
        """Cancel all jobs, start the nodes that are down, and wait until all nodes are idle."""
        for node in self.nodes:
            self.start(node)
        self.call("scancel", "--quiet", f"--user={getpass.getuser()}", check=False)
        self._wait("slurmctld", lambda: all(self.state_of(node) == "IDLE" for node in self.nodes))

    def kill_slurmd(self, node: str) -> None:
        """Kill the slurmd of a node. The processes of its jobs run on."""
        self._daemons[node].kill()
        self._daemons[node].wait()

    def crash(self, node: str) -> None:
        """Kill the slurmd of a node and every process of a job there, as a crash of the machine does."""
        if node in self._daemons:
            self.kill_slurmd(node)
        while pids := self.processes(node):  # A process may fork while the others are being killed.
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def processes(self, node: str) -> list[int]:
        """Return the running processes of jobs on a node, each with its slurmstepd."""
        marks = {f"SLURM_CONF={self.conf}".encode(), f"SLURMD_NODENAME={node}".encode()}
        found = set()
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z" and marks <= set((path / "environ").read_bytes().split(b"\0")):
                    found.add(int(path.name))
                    # slurmstepd overwrites its own environment, so only its children show where it runs.
                    if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                        found.add(int(parent))
        return sorted(found)

    def state_of(self, node: str) -> str:
        """Return the state of a node, for example ``IDLE`` or ``DOWN*``; empty if SLURM does not answer."""
        shown = self.call("scontrol", "show", "node", node, "-o", check=False)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word).get("State", "")

    def call(self, *command: str, check: bool = True) -> str:
        """Run a command of SLURM, and return what it prints."""
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def _spawn(self, name: str, *command: str) -> None:
        with (self._folder / f"start-{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _wait(self, log: str, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                path = self._folder / f"{log}.log"
                tail = path.read_text(errors="replace")[-2000:] if path.exists() else "it wrote no log"
                raise RuntimeError(f"{log} does not answer after {seconds:.0f} s: {tail}")
            time.sleep(0.1)


def _free_ports(count: int) -> int:
    """Return the first of ``count`` consecutive ports that nobody listens at."""
    for first in range(_FIRST_PORT, _FIRST_PORT + 4000, 100):
        with contextlib.ExitStack() as sockets:
            try:
                for port in range(first, first + count):
                    sockets.enter_context(socket.create_server(("0.0.0.0", port)))
            except OSError:
                continue
            return first
    raise RuntimeError(f"no {count} consecutive ports are free")


@contextlib.contextmanager
def running(nodes: int) -> Iterator[Cluster]:
    """Yield a cluster in a temporary folder. Its commands and ``SLURM_CONF`` are in ``os.environ`` meanwhile."""
    before = {name: os.environ.get(name) for name in ("SLURM_CONF", "PATH")}
    with tempfile.TemporaryDirectory(prefix="mmscale-slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder), nodes)
        try:
            cluster.up()
            os.environ.update(SLURM_CONF=str(cluster.conf), PATH=_path())
            yield cluster
        finally:
            cluster.down()
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def main() -> None:
    """Start a cluster for a shell, until the shell ends."""
    with running(int(sys.argv[1])) as cluster:
        print(f"{len(cluster.nodes)} nodes; exit ends the cluster", file=sys.stderr)
        subprocess.run([os.environ.get("SHELL", "bash")], check=False)


if __name__ == "__main__":
    main()
