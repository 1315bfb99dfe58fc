"""Fixtures of all tests with the marker ``slurm``: they share one cluster of three virtual nodes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import INSTALL, Cluster, missing, running


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """Start a cluster. ``SLURM_CONF`` and ``PATH`` of this process then lead to it."""
    if absent := missing():
        pytest.fail(f"tests with the marker slurm need SLURM ({', '.join(absent)} not found): {INSTALL}")
    with running(3) as cluster:
        yield cluster


@pytest.fixture
def cluster(slurm_cluster: Cluster) -> Cluster:
    """The cluster, with all nodes up and without jobs of an earlier test."""
    slurm_cluster.settle()
    return slurm_cluster
