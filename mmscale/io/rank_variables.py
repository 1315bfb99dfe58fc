"""Read this process's rank from the environment variables of any launcher.

The first row whose variables are set applies. ``mpirun`` and ``mpiexec`` start their daemons with ``srun``, so the
variables of ``srun`` come after theirs.

| launcher                                    | rank                   | number of ranks        |
|---------------------------------------------|------------------------|------------------------|
| torchrun, deepspeed, launch local, Kubeflow | RANK                   | WORLD_SIZE             |
| Open MPI                                    | OMPI_COMM_WORLD_RANK   | OMPI_COMM_WORLD_SIZE   |
| MPICH, Intel MPI                            | PMI_RANK               | PMI_SIZE               |
| srun                                        | SLURM_PROCID           | SLURM_STEP_NUM_TASKS   |
| Kubernetes Indexed Job                      | JOB_COMPLETION_INDEX   | WORLD_SIZE             |
| none                                        | 0                      | 1                      |

Source: documentation of torchrun, Open MPI ("Environment variables set for MPI applications"), Intel MPI, srun and
Kubernetes; ``deepspeed/launcher/launch.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmscale.errors import LaunchError


@dataclass(frozen=True)
class LaunchedRank:
    """This process, by the variables of its launcher.

    Attributes:
        launcher: Name of the launcher, for messages.
        rank: 0 .. ``world_size`` - 1.
        world_size: Number of processes.
        local_rank: Number of this process on its machine; 0 if the launcher does not give it.
        local_world_size: Number of processes on this machine; None if the launcher does not give it.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None


@dataclass(frozen=True)
class _Launcher:
    """The variables of a launcher."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str

    def is_in(self, env: Mapping[str, str]) -> bool:
        return self.rank in env and self.size in env


TORCH = _Launcher("RANK and WORLD_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OPEN_MPI = _Launcher(
    "Open MPI",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
_PMI = _Launcher("MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
# A batch script and a shell inside an allocation have SLURM_PROCID too. Only ``srun`` sets SLURM_STEP_NUM_TASKS.
SRUN = _Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "")
_INDEXED_JOB = _Launcher("a Kubernetes Indexed Job", "JOB_COMPLETION_INDEX", "WORLD_SIZE", "LOCAL_RANK", "")
_OTHERS = (_OPEN_MPI, _PMI, SRUN)
_PER_MACHINE = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE", "LOCAL_WORLD_SIZE")
"""Variables of launchers that start the ranks of a machine, and that may themselves be started by ``srun`` or MPI."""
NO_LAUNCHER = "no launcher"


def launched_rank(env: Mapping[str, str]) -> LaunchedRank:
    """Return the rank of this process; rank 0 of 1 without a launcher.

    Raises:
        LaunchError: a variable is missing or no number, the rank is not below the number of ranks, or two launchers
            contradict each other.
    """
    other = next((launcher for launcher in _OTHERS if launcher.is_in(env)), None)
    if other is _PMI and SRUN.is_in(env) and (env[_PMI.rank], env[_PMI.size]) == (env[SRUN.rank], env[SRUN.size]):
        other = SRUN  # ``srun --mpi=pmi2`` sets both. Its own variables also have the number on the machine.
    if TORCH.is_in(env):
        found = _read(TORCH, env, other)
        if not any(name in env for name in _PER_MACHINE) and other is not None:
            _require_equal(found, _read(other, env, None), other)
        _require_one_process(env)
        return found
    if other is not None:
        found = _read(other, env, None)
        _require_half(env, found, other)
        return found
    if _INDEXED_JOB.is_in(env):
        return _read(_INDEXED_JOB, env, None)
    for name, missing in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name in env:
            raise LaunchError(
                f"{name}={env[name]} is set but {missing} is not: set both in each process, or unset {name} to train "
                "in one process"
            )
    return LaunchedRank(NO_LAUNCHER, 0, 1, 0, None)


def _read(launcher: _Launcher, env: Mapping[str, str], other: _Launcher | None) -> LaunchedRank:
    """Read the variables of a launcher. ``other`` gives the number on the machine if this one does not."""
    rank, size = _number(env, launcher.rank), _number(env, launcher.size)
    if rank >= size:
        raise LaunchError(
            f"{launcher.rank}={rank} with {launcher.size}={size}: the rank must be below the number of ranks"
        )
    names = (launcher.local_rank, other.local_rank if other is not None else "")
    local = next((_number(env, name) for name in names if name in env), 0)
    # The deepspeed launcher sets LOCAL_SIZE and CROSS_SIZE. A rank itself sets LOCAL_SIZE for DeepSpeed.
    local_size = "LOCAL_SIZE" if launcher is TORCH and "CROSS_SIZE" in env else launcher.local_size
    return LaunchedRank(launcher.name, rank, size, local, _number(env, local_size) if local_size in env else None)


def _number(env: Mapping[str, str], name: str) -> int:
    text = env[name]
    if not (text.isascii() and text.isdigit()):
        raise LaunchError(
            f"{name}={text!r}: expected a whole number; a launcher sets this variable, so do not export it"
        )
    return int(text)


def _require_equal(mine: LaunchedRank, theirs: LaunchedRank, other: _Launcher) -> None:
    """Reject RANK and WORLD_SIZE that differ from those of ``srun`` or MPI, unless that started a single process."""
    if theirs.world_size > 1 and (mine.rank, mine.world_size) != (theirs.rank, theirs.world_size):
        raise LaunchError(
            f"RANK={mine.rank} and WORLD_SIZE={mine.world_size} contradict {other.rank}={theirs.rank} and "
            f"{other.size}={theirs.world_size} of {other.name}: unset RANK and WORLD_SIZE, which were probably "
            "exported before the ranks started"
        )


def _require_half(env: Mapping[str, str], found: LaunchedRank, other: _Launcher) -> None:
    for name, value in (("RANK", found.rank), ("WORLD_SIZE", found.world_size)):
        if name in env and found.world_size > 1 and env[name] != str(value):
            raise LaunchError(
                f"{name}={env[name]} contradicts rank {found.rank} of {found.world_size} of {other.name}: unset {name}"
            )


def _require_one_process(env: Mapping[str, str]) -> None:
    """Reject a pod of Kubeflow that is to run several processes: its RANK is the number of the pod."""
    per_pod = env.get("PET_NPROC_PER_NODE", "1")
    if per_pod.isdigit() and int(per_pod) > 1 and "LOCAL_RANK" not in env:
        raise LaunchError(
            f"PET_NPROC_PER_NODE={per_pod} but LOCAL_RANK is not set: this pod runs {per_pod} ranks, so start them "
            "with torchrun -m mmscale.cli.main train ..., or set nprocPerNode to 1"
        )
