"""The rank of a process by the variables of each launcher, as their documentation gives them."""

from __future__ import annotations

import pytest

from mmscale.errors import LaunchError
from mmscale.io.rank_variables import launched_rank

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "none",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29400",
}
DEEPSPEED = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_UNIVERSE_SIZE": "8",
    "PMIX_RANK": "5",
}
INTEL_MPI = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
KUBEFLOW = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
INDEXED_JOB = {"JOB_COMPLETION_INDEX": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "job-0.job"}
DAEMONS = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
"""``srun`` started one daemon of MPI, or one torchrun, on each of two nodes."""


@pytest.mark.parametrize(
    ("variables", "launcher", "local"),
    [
        (TORCHRUN, "RANK and WORLD_SIZE", (1, 4)),
        (DEEPSPEED, "RANK and WORLD_SIZE", (1, 4)),
        (OPEN_MPI, "Open MPI", (1, 4)),
        (INTEL_MPI, "MPI", (1, 4)),
        (SRUN, "srun", (1, None)),
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}, "srun", (1, None)),
        (KUBEFLOW, "RANK and WORLD_SIZE", (0, None)),
        (KUBEFLOW | {"PET_NPROC_PER_NODE": "1"}, "RANK and WORLD_SIZE", (0, None)),
        (INDEXED_JOB, "a Kubernetes Indexed Job", (0, None)),
        (TORCHRUN | DAEMONS, "RANK and WORLD_SIZE", (1, 4)),
        (DEEPSPEED | DAEMONS, "RANK and WORLD_SIZE", (1, 4)),
        (OPEN_MPI | DAEMONS, "Open MPI", (1, 4)),
        (INTEL_MPI | DAEMONS, "MPI", (1, 4)),
        (SRUN | {"RANK": "5", "WORLD_SIZE": "8"}, "RANK and WORLD_SIZE", (1, None)),
        (SRUN | {"WORLD_SIZE": "8"}, "srun", (1, None)),
    ],
)
def test_rank_5_of_8(variables: dict[str, str], launcher: str, local: tuple[int, int | None]) -> None:
    found = launched_rank(variables)
    assert (found.rank, found.world_size) == (5, 8)
    assert found.launcher == launcher
    assert (found.local_rank, found.local_world_size) == local


@pytest.mark.parametrize(
    "variables", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, {"JOB_COMPLETION_INDEX": "3"}, {"PMI_RANK": "1"}]
)
def test_one_process(variables: dict[str, str]) -> None:
    found = launched_rank(variables)
    assert (found.launcher, found.rank, found.world_size) == ("no launcher", 0, 1)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": "1"}, "RANK=1 is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set but RANK is not"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 with WORLD_SIZE=4: the rank must be below"),
        ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK='one': expected a whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK='-1': expected a whole number"),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "8"}, "RANK=0 and WORLD_SIZE=8 contradict SLURM_PROCID=5"),
        (SRUN | {"WORLD_SIZE": "16"}, "WORLD_SIZE=16 contradicts rank 5 of 8 of srun: unset WORLD_SIZE"),
        (SRUN | {"RANK": "0"}, "RANK=0 contradicts rank 5 of 8 of srun: unset RANK"),
        (OPEN_MPI | {"RANK": "5", "WORLD_SIZE": "6"}, "contradict OMPI_COMM_WORLD_RANK=5 and OMPI_COMM_WORLD_SIZE=8"),
        (KUBEFLOW | {"PET_NPROC_PER_NODE": "8"}, "PET_NPROC_PER_NODE=8 but LOCAL_RANK is not set"),
        (INDEXED_JOB | {"JOB_COMPLETION_INDEX": "8"}, "JOB_COMPLETION_INDEX=8 with WORLD_SIZE=8"),
    ],
)
def test_variables_that_contradict_each_other(variables: dict[str, str], sentence: str) -> None:
    with pytest.raises(LaunchError, match=sentence):
        launched_rank(variables)
