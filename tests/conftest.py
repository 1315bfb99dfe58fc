"""What all tests share: one thread, no network for hubs, shapes checked at run time, reproducible properties."""

from __future__ import annotations

import gc
import multiprocessing.forkserver as forkserver
import os
from collections.abc import Iterator
from typing import Any

# Before torch is imported: two cores are shared by all ranks that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

pytest_plugins = ["tests.parity_table", "tests.slurm.fixture", "tests.gpu.fixture"]

# Signatures such as ``Float[Tensor, "T D"]`` are checked at every call in tests, and cost nothing in production.
install_import_hook(["mmscale.nn", "mmscale.models", "mmscale.objectives"], "beartype.beartype")

# Neither a deadline nor a check of the speed: a test must not fail because the machine is busy.
settings.register_profile(
    "house", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, print_blob=True
)
settings.load_profile("house")


_SET_BY_RUNS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("DS_ACCELERATOR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCHDYNAMO_DISABLE"),
)


def _without_new_variables() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _SET_BY_RUNS}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


# A run in a test's own process sets these variables. Programs that later tests start would read them as a launcher's or
# a user's.
without_variables_of_this_file = pytest.fixture(scope="module", autouse=True)(_without_new_variables)
without_variables_of_this_test = pytest.fixture(autouse=True)(_without_new_variables)


def pytest_configure() -> None:
    import torch

    torch.set_num_threads(1)
    # The fork server of this process imports what its first user names. Workers of later users would each import the
    # rest, which takes 3 s of torch for a loader's worker.
    forkserver.set_forkserver_preload(["data_pipeline.loader.loader", "torchvision.io", "data_pipeline.prepare.ingest"])
    setattr(forkserver, "set_forkserver_preload", lambda modules: None)  # noqa: B010 - For mypy it is a constant.


def pytest_collection_finish() -> None:
    """Modules and collected tests live to the end: the garbage collector need not go over them again and again."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadfile``, but each block of the pages is a unit: as one file they would outlast all other tests."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFileOrBlock(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "docs/test_commands.py::test_block" in nodeid else super()._split_scope(nodeid)

    return ByFileOrBlock(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: of two processes neither is left alone with them at the end."""
    items.sort(key=lambda item: not str(item.path.parent).endswith(("tests/system", "tests/docs")))
