"""Questions to SLURM and what a job asks too much, against stand-in commands that print SLURM's documented formats."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launchers import cluster
from launchers.cluster import NodeGroup, Partition, UnansweredError
from launchers.cluster_check import misfits
from launchers.slurm import Job

SCONTROL = """\
PartitionName=gpu AllowGroups=ALL Default=YES MaxNodes=UNLIMITED MaxTime=1-00:00:00 State=UP TotalNodes=6
PartitionName=cpu AllowGroups=ALL Default=NO MaxNodes=2 MaxTime=UNLIMITED State=UP TotalNodes=8
"""
SINFO = """\
gpu|4|64|gpu:h100:8(S:0-1)
gpu|2|32|gpu:a100:4,gpu:a30:2
cpu|8|128|(null)
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for stand-ins that is the whole PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def write(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def test_partitions_with_their_nodes(tools: Path) -> None:
    write(tools, "scontrol", f"cat <<'END'\n{SCONTROL}END")
    write(tools, "sinfo", f"cat <<'END'\n{SINFO}END")
    found = cluster.partitions()
    assert found[""] == found["gpu"]
    assert found["gpu"].groups == (NodeGroup(4, 64, 8), NodeGroup(2, 32, 6))
    assert (found["cpu"].most_nodes, found["cpu"].time_limit) == (2, "UNLIMITED")


GPU = Partition("gpu", "1-00:00:00", None, (NodeGroup(4, 64, 8), NodeGroup(2, 32, 4)))
CPU = Partition("cpu", "UNLIMITED", 2, (NodeGroup(8, 128, 0),))
KNOWN = {"": GPU, "gpu": GPU, "cpu": CPU}


@pytest.mark.parametrize(
    ("request_", "keys"),
    [
        ({"nodes": 4, "gpus_per_node": 8, "cpus_per_task": 8, "time": "24:00:00"}, []),
        ({"nodes": 6, "gpus_per_node": 4, "cpus_per_task": 8}, []),
        ({"nodes": 7, "gpus_per_node": 4}, ["nodes"]),
        ({"nodes": 5, "gpus_per_node": 8}, ["nodes"]),
        ({"nodes": 5, "gpus_per_node": 4, "cpus_per_task": 9}, ["nodes"]),
        ({"gpus_per_node": 9}, ["gpus_per_node"]),
        ({"gpus_per_node": 8, "cpus_per_task": 9, "time": "2-0"}, ["cpus_per_task", "time"]),
        ({"partition": "cpu", "nodes": 2, "ranks_per_node": 128, "time": "90-0"}, []),
        ({"partition": "cpu", "nodes": 3}, ["nodes"]),
        ({"partition": "cpu", "gpus_per_node": 1}, ["gpus_per_node"]),
        ({"partition": "gpuu"}, ["partition"]),
        ({"partition": "gpu,cpu", "gpus_per_node": 9}, []),
    ],
    ids=str,
)
def test_what_a_partition_cannot_give(tmp_path: Path, request_: dict[str, object], keys: list[str]) -> None:
    job = Job(("train",), tmp_path, **request_)  # type: ignore[arg-type]
    assert [problem.key for problem in misfits(job, KNOWN)] == keys


def test_an_unknown_partition_gets_the_nearest_name(tmp_path: Path) -> None:
    (problem,) = misfits(Job(("train",), tmp_path, partition="gpuu"), KNOWN)
    assert str(problem) == "--partition gpuu: no such partition; did you mean gpu? the cluster has cpu, gpu"


def test_a_scheduler_that_does_not_answer_is_not_waited_for(tools: Path) -> None:
    write(tools, "squeue", "exec sleep 60")
    began = time.monotonic()
    with pytest.raises(UnansweredError, match="squeue did not answer in 1 s"):
        cluster.call(["squeue"], seconds=1)
    assert time.monotonic() - began < 30


def test_jobs_of_a_run(tools: Path) -> None:
    write(
        tools,
        "squeue",
        "echo \"$@\" >args; printf '7|RUNNING|None|n[1-2]\\n8|PENDING|Dependency|\\n'".replace(
            "args", str(tools / "args")
        ),
    )
    first, second = cluster.jobs_named("mmscale-a")
    assert (first.number, first.state, first.nodes, first.is_pending) == ("7", "RUNNING", "n[1-2]", False)
    assert (second.number, second.reason, second.is_pending) == ("8", "Dependency", True)
    assert "--name=mmscale-a" in (tools / "args").read_text()


def test_a_controller_out_of_reach_differs_from_a_rejected_request(tools: Path) -> None:
    write(tools, "scancel", "echo 'scancel: error: Invalid job id 9' >&2; exit 1")
    with pytest.raises(cluster.LaunchError, match="Invalid job id") as caught:
        cluster.cancel(["9"])
    assert not isinstance(caught.value, UnansweredError)
    write(tools, "scancel", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(UnansweredError):
        cluster.cancel(["9"])
