"""Checks of one machine: installed packages, devices, the attention kernel, limits of the system, storage."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from mmscale.doctor.lines import Line
from mmscale.nn.attention_backends import resolve_backend

_SHOWN = ("deepspeed", "transformers", "flash-attn")
_DRIVER = Path("/proc/driver/nvidia/version")
_SHARED = Path("/dev/shm")
_LEAST_SHARED_BYTES = 64 << 20
"""A worker needs 4 KiB of ``/dev/shm``; NCCL needs up to 33 MiB a pair of GPUs that share no link."""
_FILES, _FILES_PER_RANK = 512, 2
"""Open files of a rank: libraries, shards and logs; and two sockets for each other rank."""
_STORAGE_BYTES = 64 << 20
_SLOW_STORAGE = 50e6
"""Bytes per second below which a checkpoint of a few gigabytes takes minutes."""
_FREE_BYTES = 10 << 30


def packages() -> Iterator[Line]:
    """Compare the installed packages with the ranges that this project declares."""
    wrong, count = [], 0
    try:
        declared = requires("mmscale") or []
    except PackageNotFoundError:
        yield Line("packages", "failure", "mmscale is not installed", "install it: pip install -e .")
        declared = []
    for text in declared:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
    if wrong:
        yield Line("packages", "failure", "; ".join(wrong), "install the package again: pip install -e .")
    elif declared:
        yield Line("packages", "ok", f"{count} required packages are in their ranges")
    shown = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in _SHOWN:
        with suppress(PackageNotFoundError):
            shown.append(f"{name} {version(name)}")
    yield Line("versions", "ok", ", ".join(shown))


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver; None without one."""
    with suppress(OSError):
        if found := re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", _DRIVER.read_text(errors="replace")):
            return found[1]
    return None


def devices() -> Iterator[Line]:
    """List the GPUs, and say why torch does not see them."""
    driver = driver_version()
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        yield Line("driver", "ok", f"NVIDIA {driver or 'unknown'}, CUDA {torch.version.cuda}, NCCL {nccl}")
        built_for = torch.cuda.get_arch_list()
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            free, total = torch.cuda.mem_get_info(index)
            found = f"{torch.cuda.get_device_name(index)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
            versions = [re.fullmatch(r"sm_(\d+)(\d)", each) for each in built_for]
            # Kernels run on devices of their own major version with an equal or higher minor version.
            if any(each and int(each[1]) == major and int(each[2]) <= minor for each in versions):
                yield Line(f"GPU {index}", "ok", found)
            else:
                remedy = f"install a torch that has kernels for sm_{major}{minor}; this one has {', '.join(built_for)}"
                yield Line(f"GPU {index}", "failure", f"{found}, compute capability {major}.{minor}", remedy)
    elif driver is not None:
        found = f"NVIDIA driver {driver}, but torch {torch.__version__} sees no device"
        remedy = "install a CUDA build of torch" if torch.version.cuda is None else "check CUDA_VISIBLE_DEVICES"
        yield Line("driver", "failure", found, remedy)
    else:
        yield Line("driver", "ok", "no NVIDIA driver: runs use the CPU")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Line("CPU", "ok", f"{cores} cores, {torch.get_num_threads()} threads a rank")


def attention() -> Iterator[Line]:
    """Name the attention kernel that ``engine.attention: auto`` takes, and the reason."""
    flash = importlib.util.find_spec("flash_attn") is not None
    for dtype in (torch.bfloat16, torch.float32):
        kernel = resolve_backend("auto", dtype)
        if kernel == "sdpa":
            reason = "the others need 16-bit values and compute capability 8.0"
            reason = reason if torch.cuda.is_available() else "torch sees no CUDA device"
        else:
            reason = "flash-attn is installed" if flash else "flash-attn is not installed"
        yield Line(f"attention in {str(dtype).removeprefix('torch.')}", "ok", f"{kernel}: {reason}")


def limits(world_size: int) -> Iterator[Line]:
    """Check the limits of this process: open files and shared memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _FILES + _FILES_PER_RANK * world_size
    if soft == resource.RLIM_INFINITY or soft >= needed:
        yield Line("open files", "ok", f"at most {'any number' if soft == resource.RLIM_INFINITY else f'{soft:,}'}")
    else:
        most = "" if hard == resource.RLIM_INFINITY else f"; the hard limit is {hard:,}"
        yield Line("open files", "failure", f"at most {soft:,}; {needed:,} needed", f"ulimit -n {needed}{most}")
    if not _SHARED.is_dir():
        yield Line("shared memory", "ok", "no /dev/shm on this system")
        return
    free = shutil.disk_usage(_SHARED).free
    if free >= _LEAST_SHARED_BYTES:
        yield Line("shared memory", "ok", f"{free / 1e9:.2f} GB free in /dev/shm")
    else:
        yield Line("shared memory", "failure", f"{free / 1e6:.1f} MB free in /dev/shm", "docker run --shm-size=1g")


def storage(folder: Path, rank: int) -> Iterator[Line]:
    """Write, replace and read a file in a folder, as checkpoints do."""
    data = os.urandom(_STORAGE_BYTES)
    path, temporary = folder / f".doctor-{rank}", folder / f".doctor-{rank}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            start = time.perf_counter()
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                with suppress(AttributeError, OSError):  # Read from the storage, not from the page cache.
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            temporary.replace(path)
            written = time.perf_counter()
            same = path.read_bytes() == data
            end = time.perf_counter()
        finally:
            for each in (path, temporary):
                each.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        remedy = "give --folder a folder that you can write"
        yield Line("storage", "failure", f"{folder}: cannot be written and read: {error.strerror}", remedy)
        return
    speeds = [len(data) / (written - start), len(data) / (end - written)]
    found = (
        f"{folder}: {speeds[0] / 1e6:,.0f} MB/s written, {speeds[1] / 1e6:,.0f} MB/s read, {free / 1e9:,.0f} GB free"
    )
    if not same:
        yield Line("storage", "failure", f"{folder}: the bytes read differ from those written", "replace this storage")
    elif min(speeds) < _SLOW_STORAGE:
        yield Line("storage", "warning", found, "checkpoints will be slow: use another folder")
    elif free < _FREE_BYTES:
        yield Line("storage", "warning", found, "free some space: a checkpoint needs 16 bytes a parameter")
    else:
        yield Line("storage", "ok", found)
