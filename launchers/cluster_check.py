"""Compare a job with the partitions of the cluster before it is submitted.

sbatch accepts many jobs that can never start: they wait in the queue for ever.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

from launchers.cluster import Partition
from launchers.slurm import Job, Problem, seconds_of


def misfits(job: Job, partitions: Mapping[str, Partition]) -> Iterator[Problem]:
    """Yield what the cluster cannot give to a job.

    Args:
        job: The job. Its name of a partition may be a list with commas; then only the names are checked.
        partitions: The result of ``launchers.cluster.partitions``.
    """
    names = job.partition.split(",") if job.partition else [""]
    known = sorted(name for name in partitions if name)
    unknown = [name for name in names if name and name not in partitions]
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        yield Problem(
            "partition", f"--partition {name}", f"no such partition; {hint}the cluster has {', '.join(known)}"
        )
    if unknown or len(names) > 1 or names[0] not in partitions:
        return
    partition = partitions[names[0]]
    yield from _size_problems(job, partition)
    yield from _time_problems(job, partition)


def _size_problems(job: Job, partition: Partition) -> Iterator[Problem]:
    tasks = job.gpus_per_node or job.ranks_per_node
    cores = tasks * (job.cpus_per_task or 1)
    where = f"partition {partition.name}"
    most_gpus = max((group.gpus for group in partition.groups), default=0)
    most_cores = max((group.cpus for group in partition.groups), default=0)
    if job.gpus_per_node > most_gpus:
        yield Problem(
            "gpus_per_node", f"--gpus-per-node {job.gpus_per_node}", f"a node of {where} has at most {most_gpus} GPUs"
        )
    if cores > most_cores:
        need = f"the ranks of a node need {tasks} x {job.cpus_per_task or 1} = {cores} cores"
        yield Problem(
            "cpus_per_task",
            f"--cpus-per-task {job.cpus_per_task or 1}",
            f"{need}, and a node of {where} has at most {most_cores}",
        )
    if job.gpus_per_node > most_gpus or cores > most_cores:
        return
    fitting = [group.count for group in partition.groups if group.gpus >= job.gpus_per_node and group.cpus >= cores]
    most = min(sum(fitting), partition.most_nodes or sum(fitting))
    if job.nodes + job.spares > most:
        yield Problem(
            "nodes",
            f"--nodes {job.nodes}" + (f" --spares {job.spares}" if job.spares else ""),
            f"{where} gives a job at most {most} nodes with {job.gpus_per_node} GPUs and {cores} cores",
        )


def _time_problems(job: Job, partition: Partition) -> Iterator[Problem]:
    try:
        limit, wanted = seconds_of(partition.time_limit), None if job.time is None else seconds_of(job.time)
    except ValueError:
        return  # Reported with the job, or a limit in a notation that is not documented.
    if limit is not None and wanted is not None and wanted > limit:
        yield Problem("time", f"--time {job.time}", f"partition {partition.name} allows at most {partition.time_limit}")
