"""Record where and how a start of a run was made: machines, modules, variables, packages.

    RUN/starts/environment-0001.json    of start 1; rank 0 writes it

Variables are taken from a list of prefixes, and never if their name or value looks like a secret.
"""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from data_pipeline.io.atomic import as_utf8, write_whole
from mmscale.dist import World, gather_bytes

_PREFIXES = (
    *("SLURM_", "SRUN_", "OMPI_", "PMI_", "PMIX_", "KUBERNETES_", "JOB_COMPLETION_", "TORCHELASTIC_", "PET_"),
    *("CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_", "FI_", "MASTER_", "LOCAL_", "RANK", "WORLD_SIZE", "GROUP_RANK"),
    *("OMP_", "KMP_", "MKL_", "GOMP_", "MALLOC_", "LD_", "PATH", "PYTHON", "VIRTUAL_ENV", "CONDA_", "LMOD_"),
    *("LOADEDMODULES", "MODULEPATH", "TORCH", "PYTORCH_", "TRITON_", "DS_", "DEEPSPEED_", "HF_", "MMSCALE_"),
    *("APPTAINER", "SINGULARITY", "PYXIS_", "ENROOT_", "TMPDIR", "HOSTNAME", "ROCR_", "HIP_", "XDG_CACHE"),
)
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASS|PWD|CREDENTIAL|AUTH|COOKIE|JWT|PRIVATE|API|SIGNATURE|KEY", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"://[^/\s@]*@|[?&](sig|signature|token|key|password)=", re.IGNORECASE)
_MOST_LETTERS = 20_000


def variables() -> dict[str, str]:
    """Return the variables of this process that influence a run, sorted by name, without secrets."""
    return {
        name: value[:_MOST_LETTERS]
        for name, value in sorted(os.environ.items())
        if name.startswith(_PREFIXES) and not _SECRET_NAME.search(name) and not _SECRET_VALUE.search(value)
    }


def write_environment(path: Path, world: World) -> None:
    """Write the environment of this start to ``path`` on rank 0. All ranks must call.

    A file that cannot be written is left out: it is a record for people, and no start depends on it.

    Raises:
        EngineError: another rank is lost or did not answer in time.
    """
    hosts = gather_bytes(world, socket.gethostname().encode())
    if not world.is_main:
        return
    try:
        write_whole(path, as_utf8(json.dumps(_describe(hosts), indent=1, ensure_ascii=False) + "\n"), parents=True)
    except OSError as error:
        print(f"mmscale: {path}: cannot be written: {error.strerror}", file=sys.stderr, flush=True)


def _describe(hosts: list[bytes]) -> dict[str, Any]:
    nodes: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        nodes.setdefault(host.decode(errors="replace"), []).append(rank)
    has_cuda = torch.cuda.is_available()
    return {
        "command": sys.argv,
        "folder": os.getcwd(),
        "python": sys.executable,
        "system": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if has_cuda else "cpu",
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_cuda else None,
        "nodes": [{"host": host, "ranks": ranks} for host, ranks in nodes.items()],
        "modules": [name for name in os.environ.get("LOADEDMODULES", "").split(":") if name],
        "variables": variables(),
        "packages": _versions(),
    }


def _versions() -> dict[str, str]:
    """Return the versions of the installed packages by name, sorted; parse the metadata of each package once."""
    found = sorted((each.metadata for each in distributions()), key=lambda metadata: metadata["Name"].lower())
    return {metadata["Name"]: metadata["Version"] for metadata in found}
