"""Run simulated ranks, one forked process each, and compare their collectives.

    this process --fork--> rank 0: program under CallRecorder --calls--> this process: are they equal on all ranks?
                 --fork--> rank 1: ...                          <--values of the other ranks--

A rank waits only for the values of small messages. So a rank that makes other calls than its peers cannot block them
for long: this process sees the first difference, reports it and ends all ranks. Forking shares the memory of imported
libraries, and takes no time to import them again. All ranks therefore have the same hash seed, so the check does not
find code that depends on the order of a set of strings.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor

from mmscale.check.recorder import Call, CallRecorder, is_own_file
from mmscale.errors import EngineError, MMScaleError

Program = Callable[[int, CallRecorder], None]
"""The code of a rank. It gets the number of the rank and the recorder, and runs inside the recorder's context."""
_MOST_PENDING = 500
"""Calls that a rank collects before it sends them."""
_Packed = tuple[str, tuple[int, ...], bytes]


@dataclass(frozen=True)
class Difference:
    """The first collective that differs between two ranks.

    Attributes:
        number: Number of the collective, from 0.
        ranks: A rank of the majority, and the rank that differs.
        calls: Their calls; None for a rank that makes no further call.
        errors: The errors that the two ranks raised at that point; empty for a rank without one.
    """

    number: int
    ranks: tuple[int, int]
    calls: tuple[Call | None, Call | None]
    errors: tuple[str, str] = ("", "")


class _Message(NamedTuple):
    """A message of a rank.

    Attributes:
        calls: Calls since the last message.
        members: Ranks that exchange values in the last call; empty if it needs no values.
        values: This rank's values for it.
        error: Error that ended the rank; empty if there is none.
        is_last: Whether the rank has ended.
    """

    calls: list[Call]
    members: tuple[int, ...] = ()
    values: tuple[_Packed, ...] = ()
    error: str = ""
    is_last: bool = False


class _Rank:
    """This process's view of one simulated rank."""

    def __init__(self, number: int, process: Any, connection: Connection) -> None:
        self.number, self.process, self.connection = number, process, connection
        self.calls: deque[Call] = deque()
        self.num_calls = 0
        self.waiting: _Message | None = None
        self.ended = False
        self.error = ""

    def read(self) -> None:
        """Read one message. A rank that died counts as ended with an error."""
        try:
            message: _Message = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            message = _Message([], error=f"its process ended with exit code {self.process.exitcode}", is_last=True)
        self.calls.extend(message.calls)
        self.num_calls += len(message.calls)
        if message.is_last:
            self.ended, self.error = True, message.error
        elif message.members:
            self.waiting = message


def compare_ranks(program: Program, world_size: int) -> tuple[int, Difference | None]:
    """Run ``program`` on simulated ranks. Return the number of collectives of a rank, and the first difference.

    Raises:
        EngineError: all ranks make equal calls, but the program raises an error; or this process has a process group.
    """
    if torch_dist.is_initialized():
        raise EngineError("this process already has a process group; start the check in a process of its own")
    ranks = list[_Rank]()
    context = multiprocessing.get_context("fork")
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        for number in range(world_size):
            here, there = context.Pipe()
            others = [here, *(each.connection for each in ranks)]
            # Daemons, so that they cannot outlive this process.
            process = context.Process(target=_serve, args=(program, number, world_size, there, others), daemon=True)
            process.start()
            there.close()
            ranks.append(_Rank(number, process, here))
        return _compare(ranks)
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()
            rank.connection.close()


def _compare(ranks: list[_Rank]) -> tuple[int, Difference | None]:
    number = 0
    while True:
        open_ranks = {rank.connection: rank for rank in ranks if not rank.ended and rank.waiting is None}
        for connection in multiprocessing.connection.wait([*open_ranks], timeout=0 if not open_ranks else None):
            open_ranks[connection].read()  # type: ignore[index]
        while all(rank.calls for rank in ranks):
            calls = [rank.calls.popleft() for rank in ranks]
            if (difference := _difference(number, ranks, calls)) is not None:
                return number, difference
            number += 1
        # No rank without calls may still make one: it has ended, or waits for a message that the others do not send.
        silent = [rank.ended or rank.waiting is not None for rank in ranks]
        if any(rank.calls for rank in ranks):
            if all(silent) or any(rank.ended and not rank.calls for rank in ranks):
                return number, _difference(number, ranks, [rank.calls[0] if rank.calls else None for rank in ranks])
        elif all(rank.ended for rank in ranks):
            _raise_error(ranks)
            return number, None
        elif all(rank.waiting is not None for rank in ranks):
            _answer(ranks)
        elif all(silent):  # Some ended, some wait: these have made a call that the ended ones lack, so unreachable.
            raise EngineError("the simulated ranks stopped: " + "; ".join(rank.error for rank in ranks if rank.error))


def _difference(number: int, ranks: Sequence[_Rank], calls: Sequence[Call | None]) -> Difference | None:
    """Return the difference between the most frequent call and the first other one; None if all are equal."""
    keys = [None if call is None else call.compared for call in calls]
    usual = max(keys, key=lambda key: (keys.count(key), key is not None))
    odd = next((index for index, key in enumerate(keys) if key != usual), None)
    if odd is None:
        return None
    pair = keys.index(usual), odd
    errors = [ranks[index].error if calls[index] is None else "" for index in pair]
    return Difference(number, pair, (calls[pair[0]], calls[pair[1]]), (errors[0], errors[1]))


def _raise_error(ranks: Sequence[_Rank]) -> None:
    for rank in ranks:
        if rank.error:
            raise EngineError(f"simulated rank {rank.number}: {rank.error}")


def _answer(ranks: Sequence[_Rank]) -> None:
    """Send each rank the values of the ranks in its group."""
    values = [rank.waiting.values for rank in ranks if rank.waiting is not None]
    for rank in ranks:
        assert rank.waiting is not None
        rank.connection.send([values[member] for member in rank.waiting.members])
        rank.waiting = None


class _Link:
    """The rank's end of the connection: collects calls, and exchanges values."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pending: list[Call] = []

    def record(self, call: Call) -> None:
        self._pending.append(call)
        if len(self._pending) >= _MOST_PENDING:
            self.send()

    def send(self, error: str = "", *, is_last: bool = False) -> None:
        self._connection.send(_Message(self._pending, error=error, is_last=is_last))
        self._pending = []

    def exchange(self, call: Call, members: Sequence[int], tensors: list[Tensor]) -> list[list[Tensor]]:
        message = _Message([*self._pending, call], tuple(members), tuple(_pack(each) for each in tensors))
        self._pending = []
        self._connection.send(message)
        return [[_unpack(each) for each in packed] for packed in self._connection.recv()]


def _pack(tensor: Tensor) -> _Packed:
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data


def _unpack(packed: _Packed) -> Tensor:
    dtype, shape, data = packed
    if not data:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()).view(getattr(torch, dtype)).reshape(shape)


def _serve(
    program: Program,
    number: int,
    world_size: int,
    connection: Connection,
    others: Sequence[Connection],
) -> None:
    """Run the program as one rank, in its own process. Its output is dropped."""
    for other in others:  # The parent's ends. A rank that holds them would hide the end of another one.
        other.close()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    gc.freeze()  # DeepSpeed collects garbage for every engine; the inherited objects need no collection.
    link = _Link(connection)
    error = ""
    try:
        _join_fake_group(number, world_size)
        with CallRecorder(link.record, link.exchange) as recorder:
            program(number, recorder)
    except MMScaleError as raised:
        error = str(raised)
    except BaseException as raised:  # The parent process reports every error.
        error = _one_line(raised)
    with contextlib.suppress(OSError):
        link.send(error, is_last=True)
    os._exit(0)


def _one_line(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    last = next((each for each in reversed(frames) if is_own_file(each.filename)), frames[-1])
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text} ({'/'.join(last.filename.split('/')[-2:])}:{last.lineno} in {last.name})"


def _join_fake_group(rank: int, world_size: int) -> None:
    """Make this process a rank of a fake process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    own = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": 1}  # Nothing connects to the port.
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"), world_size)
    os.environ.update({name: str(value) for name, value in (own | sizes).items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    torch_dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
