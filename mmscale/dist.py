"""Join the ranks of a run, and exchange small values between them.

The run may be started by a launcher, by ``srun``, or as a single process. The collectives are for sums, flags and error
messages that all ranks need. Not for: gradients and weights, which DeepSpeed communicates.

Small values are sent by gloo on the host, also if weights use NCCL. So these collectives never wait for the device. The
exception is ``World.gather_rows``, which uses the backend of the device.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as torch_dist
from torch import Tensor

from mmscale.errors import EngineError, LaunchError, UnsupportedError
from mmscale.io.rank_variables import NO_LAUNCHER, SRUN, TORCH, launched_rank

LISTENER_VARIABLE = "MMSCALE_LISTENER"
"""Environment variable with the descriptor of an inherited socket that listens at MASTER_PORT, for rank 0's store."""

_ERROR_BYTES = 1024
_MOST_CONNECTED = 64
"""Most ranks that gloo connects with each other at the start.

Otherwise each rank reads the addresses of all ranks from rank 0's store and opens a connection to each. 8,000 ranks
would read 4 TB, and each rank would open 8,000 files."""
_MOST_IN_A_RING = 64
"""Most ranks that reduce small values by gloo's ring, which passes 2 * (ranks - 1) messages one after the other: 16,000
for 8,000 ranks, several times in each step. More ranks use a tree, with 26 messages."""
_LAZY_GLOO = "TORCH_GLOO_LAZY_INIT"
_LOOPBACK = "127.0.0.1"
_PORT = "29500"
"""Port of rank 0 if the launcher gives none: torchrun's default."""


class DistributedSettings(Protocol):
    """The settings of ``init_distributed``."""

    @property
    def timeout_seconds(self) -> float: ...

    @property
    def device(self) -> str: ...


@dataclass(frozen=True)
class World:
    """This process as one of the ranks of a run.

    Attributes:
        rank: 0 .. ``world_size`` - 1.
        world_size: Number of processes of the run.
        local_rank: Number of this process on its machine.
        device: Device of its part of the model.
        timeout_seconds: Timeout of a collective. After it a rank that did not answer counts as lost.
        group: gloo group for collectives on the host; None is torch's default group.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    timeout_seconds: float = 600.0
    group: Any = field(default=None, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files of the run."""
        return self.rank == 0

    def gather_rows(self, rows: Tensor) -> list[Tensor]:
        """Return the rows of all ranks, in rank order, on the device of ``rows``. All ranks must call.

        Ranks may have different numbers of rows, or none. The backend of the device sends them (NCCL on CUDA).

        Raises:
            EngineError: another rank is lost or did not answer in time.
        """
        if self.world_size == 1:
            return [rows]
        counts = [int(length) for length in gather_numbers(self, len(rows))]
        mine = rows.new_zeros(max(1, *counts), *rows.shape[1:])
        mine[: len(rows)] = rows
        theirs = [torch.empty_like(mine) for _ in counts]
        try:
            torch_dist.all_gather(theirs, mine)
        except RuntimeError as error:
            raise peer_lost(self, error) from error
        return [each[:count] for each, count in zip(theirs, counts, strict=True)]


def init_distributed(settings: DistributedSettings) -> World:
    """Join the run. Reads the variables of a launcher or of SLURM. Without them the run has one rank.

    If all ranks are on this machine, this process listens on the loopback interface only. If several CPU ranks share a
    machine and ``OMP_NUM_THREADS`` is not set, torch uses one thread in each rank.

    Raises:
        LaunchError: variables of the launcher are missing or out of range, CUDA is configured but not available, this
            rank sees several GPUs but none for itself, or it cannot join.
    """
    kind = device_type(settings.device)
    prepare_deepspeed(kind)
    launched = _map_launcher_variables()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    # Without LOCAL_SIZE, DeepSpeed's stage 3 starts the program ``numactl`` for every bucket of gradients on a CPU.
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    device = _own_gpu(rank, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    elif int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) > 1 and "OMP_NUM_THREADS" not in os.environ:
        # On two cores, two ranks with two threads each take 2.8 s a step; with one thread each they take 1.0 s.
        torch.set_num_threads(1)
    timeout = timedelta(seconds=settings.timeout_seconds)
    if not torch_dist.is_initialized():
        _join(kind, device, rank, world_size, timeout, launched)
    group = torch_dist.new_group(backend="gloo", timeout=timeout) if kind == "cuda" else None
    return World(rank, world_size, local_rank, device, settings.timeout_seconds, group)


def _own_gpu(rank: int, local_rank: int) -> torch.device:
    """Return the GPU of this rank: number 0 if it sees one GPU only (``srun --gpus-per-task=1``)."""
    count = torch.cuda.device_count()
    if count > 1 and local_rank >= count:
        raise LaunchError(
            f"rank {rank} is number {local_rank} on its machine, where it sees {count} GPUs: start one rank for each, "
            "and let CUDA_VISIBLE_DEVICES show each rank one GPU or all of them"
        )
    number = min(local_rank, count - 1)
    for name in {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys():
        os.environ[name] = str(number)  # DeepSpeed takes it for the number of the GPU, and wants both equal.
    return torch.device("cuda", number)


def device_type(wanted: str) -> str:
    """Return ``cuda`` or ``cpu`` for ``engine.device``.

    Raises:
        UnsupportedError: CUDA is configured, but torch finds no CUDA device.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(
            "engine.device=cuda: torch sees no CUDA device here; set engine.device=cpu or check the driver"
        )
    return wanted


def prepare_deepspeed(device_type: str) -> None:
    """Set the environment variables that DeepSpeed reads when it is imported."""
    if device_type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # 4.3 s -> 2.5 s for the first engine; nothing is compiled.
    os.environ.setdefault("DS_LOG_LEVEL", "warning")


def start_deepspeed(world: World) -> None:
    """Import DeepSpeed and let it use the existing process group. It may be called more than once.

    Only DeepSpeed's errors are logged. On a CPU, DeepSpeed does not compile its C++ extension ``shm_comm``: that takes
    80 s the first time, and fails without a compiler.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed\..*|torch\.distributed.*")
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm in a notebook without ipywidgets.
    import deepspeed
    import deepspeed.comm
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if world.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed(dist_backend=torch_dist.get_backend(), verbose=False)


def _map_launcher_variables() -> bool:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Return whether the run has several ranks."""
    env = os.environ
    found = launched_rank(env)
    env.update(RANK=str(found.rank), WORLD_SIZE=str(found.world_size), LOCAL_RANK=str(found.local_rank))
    if found.launcher == SRUN.name:
        nodes = env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES"))
        if nodes == "1" or (nodes is None and "MASTER_ADDR" not in env):
            env.update(LOCAL_WORLD_SIZE=str(found.world_size), MASTER_ADDR=_LOOPBACK)
        env.setdefault("MASTER_PORT", str(20_000 + int(env.get("SLURM_JOB_ID", "0")) % 20_000))
    elif found.local_world_size is not None:
        env["LOCAL_WORLD_SIZE"] = str(found.local_world_size)
        if found.local_world_size == found.world_size and "MASTER_PORT" not in env:  # MPI on one machine.
            env.update(MASTER_ADDR=_LOOPBACK, MASTER_PORT=_PORT)
    if found.launcher not in (NO_LAUNCHER, TORCH.name):
        env.setdefault("MASTER_PORT", _PORT)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing and found.world_size > 1:
        raise LaunchError(
            f"rank {found.rank} of {found.world_size} by {found.launcher}, but {' and '.join(missing)} is not set: "
            "give every rank the address of rank 0's machine and a free port there, or start with torchrun or "
            "`mmscale launch`"
        )
    return found.world_size > 1


def _join(
    device_type: str, device: torch.device, rank: int, world_size: int, timeout: timedelta, launched: bool
) -> None:
    options: dict[str, Any] = {"timeout": timeout}
    if device_type == "cuda":
        options["device_id"] = device
    backend = "nccl" if device_type == "cuda" else "gloo"
    os.environ.setdefault("MASTER_ADDR", _LOOPBACK)
    os.environ.setdefault("MASTER_PORT", _PORT)  # DeepSpeed reads it. A run with one rank opens no port.
    one_machine = _is_one_machine()
    if one_machine:
        _stay_on_loopback()
    if not launched:
        torch_dist.init_process_group(backend, store=torch_dist.HashStore(), rank=0, world_size=1, **options)
        return
    configure_gloo(world_size)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        # torchrun serves a store itself. Across machines, use torch's store, which listens on all interfaces.
        if one_machine and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
            store: torch_dist.Store = _loopback_store(rank, world_size, timeout)
        else:
            store, _, _ = next(torch_dist.rendezvous("env://", rank, world_size, timeout=timeout))
        check_device_types(store, rank, world_size, device_type)
        torch_dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, **options)
    except (RuntimeError, ValueError, OSError) as error:
        raise LaunchError(f"rank {rank} of {world_size} could not join the run at {address}: {error}") from error


def configure_gloo(world_size: int) -> None:
    """Let gloo connect two ranks of a large run only when they first exchange a message. Call it before any group.

    An environment variable of the user takes precedence.
    """
    if world_size > _MOST_CONNECTED:
        os.environ.setdefault(_LAZY_GLOO, "1")


def _is_one_machine() -> bool:
    """Return whether all ranks are on this machine, by the launcher's variables."""
    env = os.environ
    if env["WORLD_SIZE"] == "1":
        return True
    if "LOCAL_WORLD_SIZE" in env:
        return env["LOCAL_WORLD_SIZE"] == env["WORLD_SIZE"]
    return env["MASTER_ADDR"] in (_LOOPBACK, "localhost", "::1")


def _stay_on_loopback() -> None:
    """Let gloo and NCCL use loopback, even if the environment sets another interface for runs across machines."""
    loopback = "lo" if sys.platform == "linux" else "lo0"
    os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=f"={loopback}")


def _loopback_store(rank: int, world_size: int, timeout: timedelta) -> torch_dist.TCPStore:
    """Return a store on loopback. The server of torch's ``env://`` would listen on all interfaces."""
    port = int(os.environ["MASTER_PORT"])
    listener = None
    if rank == 0:
        inherited = os.environ.pop(LISTENER_VARIABLE, None)
        listener = int(inherited) if inherited else socket.create_server((_LOOPBACK, port)).detach()
    return torch_dist.TCPStore(_LOOPBACK, port, world_size, rank == 0, timeout, master_listen_fd=listener)


def check_device_types(store: torch_dist.Store, rank: int, world_size: int, device_type: str) -> None:
    """Check that all ranks have the same device type. All ranks must call, before the process group is created.

    With different types the ranks would use different backends and hang.

    Raises:
        LaunchError: two ranks differ; every rank raises.
    """
    store.set(f"mmscale/device/{rank}", device_type)
    if rank == 0:
        types = [store.get(f"mmscale/device/{other}").decode() for other in range(world_size)]
        odd = next((other for other, found in enumerate(types) if found != device_type), None)
        verdict = "" if odd is None else f"rank {odd} would train on {types[odd]}, rank 0 on {device_type}"
        store.set("mmscale/device", f"-{verdict}")
    if verdict := store.get("mmscale/device").decode()[1:]:
        store.set(f"mmscale/device/{rank}/read", "")
        if rank == 0:  # This process may serve the store, so wait until all ranks have read it.
            store.wait([f"mmscale/device/{other}/read" for other in range(world_size)])
        raise LaunchError(
            f"{verdict}: check the driver on the machine of the rank without CUDA (nvidia-smi), or set engine.device"
        )


def all_reduce_sum(world: World, values: Mapping[str, float]) -> dict[str, float]:
    """Sum each named value over all ranks in float64, in one message.

    All ranks must call, with the same names in the same order.

    Raises:
        EngineError: another rank is lost or did not answer in time.
    """
    return dict(zip(values, _reduce(world, [*values.values()], torch_dist.ReduceOp.SUM), strict=True))


def all_reduce_sum_list(world: World, values: Sequence[float]) -> list[float]:
    """Sum the arrays of all ranks, element by element, in float64. All ranks must call, with arrays of equal length.

    Raises:
        EngineError: another rank is lost or did not answer in time.
    """
    return _reduce(world, values, torch_dist.ReduceOp.SUM)


def all_reduce_max(world: World, value: float) -> float:
    """Return the largest value of any rank. All ranks must call.

    Raises:
        EngineError: another rank is lost or did not answer in time.
    """
    return _reduce(world, [value], torch_dist.ReduceOp.MAX)[0]


def any_rank(world: World, flag: bool) -> bool:
    """Return whether ``flag`` is true on any rank. All ranks must call.

    Raises:
        EngineError: another rank is lost or did not answer in time.
    """
    return _reduce(world, [float(flag)], torch_dist.ReduceOp.MAX)[0] > 0


def _reduce(world: World, values: Sequence[float], operation: Any) -> list[float]:
    if world.world_size == 1:
        return [float(value) for value in values]
    buffer = torch.tensor(values, dtype=torch.float64)
    try:
        if world.world_size > _MOST_IN_A_RING:
            _tree_reduce(world, buffer, operation)
        else:
            torch_dist.all_reduce(buffer, operation, group=world.group)
    except RuntimeError as error:
        raise peer_lost(world, error) from error
    return [float(value) for value in buffer.tolist()]


def num_messages(world_size: int) -> int:
    """Return the messages that follow one another in an all-reduce of small values among ``world_size`` ranks."""
    return 2 * (world_size - 1) if world_size <= _MOST_IN_A_RING else 2 * (world_size - 1).bit_length()


def _tree_reduce(world: World, buffer: Tensor, operation: Any) -> None:
    """Reduce along a binomial tree to rank 0, then broadcast: all ranks get the same bits. Mutates ``buffer``."""
    received, distance = torch.empty_like(buffer), 1
    while distance < world.world_size:
        if world.rank & distance:
            torch_dist.send(buffer, world.rank - distance, group=world.group)
            break
        if world.rank + distance < world.world_size:
            torch_dist.recv(received, world.rank + distance, group=world.group)
            if operation == torch_dist.ReduceOp.SUM:
                buffer += received
            else:
                torch.maximum(buffer, received, out=buffer)
        distance *= 2
    torch_dist.broadcast(buffer, 0, group=world.group)


def peer_lost(world: World, error: RuntimeError) -> EngineError:
    """Return the error to raise for a failed collective."""
    reason = str(error).strip().partition("\n")[0]
    return EngineError(f"rank {world.rank}: a peer is lost ({reason}); start the same command again to resume")


def is_peer_lost(error: RuntimeError) -> bool:
    """Return whether a collective raised ``error``. gloo raises a plain RuntimeError."""
    return isinstance(error, torch_dist.DistError) or "gloo" in str(error)


def lowest_rank_error(world: World, message: str | None) -> str | None:
    """Return the error message of the lowest rank that has one, else None. All ranks must call.

    The result is the same on all ranks, so that all can raise the same error. Otherwise one rank would fail while the
    others wait for it. With several ranks, the message is cut to 1,024 bytes and begins with its rank.

    Raises:
        EngineError: another rank is lost or did not answer in time.
    """
    if world.world_size == 1:
        return message
    mine = world.rank if message else world.world_size
    lowest = int(-_reduce(world, [-float(mine)], torch_dist.ReduceOp.MAX)[0])
    if lowest == world.world_size:
        return None
    # Only now send a text, and only that of one rank: texts of all ranks would be 8 MB on each of 8,000 ranks.
    text = (message or "").encode()[:_ERROR_BYTES]
    buffer = torch.zeros(_ERROR_BYTES, dtype=torch.uint8)
    if world.rank == lowest:
        buffer[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    try:
        torch_dist.broadcast(buffer, lowest, group=world.group)
    except RuntimeError as error:
        raise peer_lost(world, error) from error
    found = bytes(buffer.tolist()).rstrip(b"\0").decode(errors="replace")
    return f"rank {lowest}: {found}"


def raise_on_any_rank(world: World, message: str | None, kind: type[Exception]) -> None:
    """Raise ``kind`` on all ranks if any rank has an error message. All ranks must call.

    The error has the message of the lowest such rank.

    Raises:
        EngineError: another rank is lost or did not answer in time.
    """
    if (found := lowest_rank_error(world, message)) is not None:
        raise kind(found)


def gather_numbers(world: World, value: float) -> list[float]:
    """Return the values of all ranks, in rank order, on every rank. All ranks must call.

    Raises:
        EngineError: another rank is lost or did not answer in time.
    """
    values = [0.0] * world.world_size
    values[world.rank] = value
    return all_reduce_sum_list(world, values)


def all_equal(world: World, digest: bytes) -> bool:
    """Return whether all ranks have the same digest. All ranks must call, with digests of the same length.

    Raises:
        EngineError: another rank is lost or did not answer in time.
    """
    parts = [float(int.from_bytes(digest[start : start + 6], "big")) for start in range(0, len(digest), 6)]
    # A float64 represents six bytes exactly. One all-reduce gives the maximum and the negated minimum.
    largest = _reduce(world, [*parts, *(-part for part in parts)], torch_dist.ReduceOp.MAX)
    return all(high == -low for high, low in zip(largest[: len(parts)], largest[len(parts) :], strict=True))


def broadcast_bytes(world: World, data: bytes) -> bytes:
    """Return rank 0's ``data`` on all ranks. All ranks must call; ``data`` of the other ranks is ignored.

    Raises:
        EngineError: another rank is lost or did not answer in time.
    """
    if world.world_size == 1:
        return data
    length = int(gather_numbers(world, len(data))[0])
    buffer = torch.zeros(max(1, length), dtype=torch.uint8)
    if world.is_main and data:
        buffer[:length] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        torch_dist.broadcast(buffer, 0, group=world.group)
    except RuntimeError as error:
        raise peer_lost(world, error) from error
    return buffer[:length].numpy().tobytes()


def gather_bytes(world: World, data: bytes) -> list[bytes]:
    """Return the ``data`` of all ranks, in rank order, on rank 0. Return an empty list elsewhere. All ranks must call.

    Raises:
        EngineError: another rank is lost or did not answer in time.
    """
    if world.world_size == 1:
        return [data]
    lengths = [int(size) for size in gather_numbers(world, len(data))]
    mine = torch.zeros(max(1, *lengths), dtype=torch.uint8)
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else mine[:0]
    theirs = [torch.empty_like(mine) for _ in lengths] if world.is_main else None
    try:
        torch_dist.gather(mine, theirs, group=world.group)
    except RuntimeError as error:
        raise peer_lost(world, error) from error
    return [buffer[:n].numpy().tobytes() for buffer, n in zip(theirs or (), lengths, strict=False)]


def shutdown(world: World, *, patience_seconds: float = 5.0) -> None:
    """Leave the process group. Waits at most ``patience_seconds``, whatever the state of the other ranks.

    A world of one rank keeps its group until the process ends: DeepSpeed remembers the first group, so a notebook could
    otherwise train only once.
    """
    if not torch_dist.is_initialized() or world.world_size == 1:
        return
    leaving = threading.Thread(target=torch_dist.destroy_process_group, daemon=True)
    leaving.start()
    leaving.join(patience_seconds)
