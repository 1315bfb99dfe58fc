"""Where the ranks of tests are born: a process that has imported what every rank needs, and forks one in a moment.

    test --one line of JSON--> nursery --fork--> rank        test <--exit code-- nursery

Each rank of its own would spend three seconds of a core on importing torch and DeepSpeed. Two nurseries take turns, so
that neighbours hash strings differently, as interpreters do that were started apart: what depends on the order of a set
is not the same on all ranks. Whole runs (tests/system) start every rank as a user does.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import selectors
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Child:
    """A forked process, with the few methods of ``subprocess.Popen`` that a test of ranks needs."""

    nursery: Nursery
    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or minus the signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self.nursery.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end.

        Raises:
            subprocess.TimeoutExpired: it goes on for longer than ``timeout`` seconds.
        """
        if self.returncode is None:
            end = os.pidfd_open(self.pid)
            try:
                with selectors.DefaultSelector() as selector:
                    selector.register(end, selectors.EVENT_READ)
                    if not selector.select(timeout):
                        raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout or 0)
            finally:
                os.close(end)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery:
    """This side of a nursery. It ends with this process: its standard input does."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        atexit.register(self.close)

    def close(self) -> None:
        """Ends the nursery, which has nothing to do any more once the ranks are done."""
        self._process.kill()
        self._process.wait()

    def ask(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def fork(self, call: str, arguments: list[Any], environment: dict[str, str], log: Path) -> Child:
        """Runs ``package.module:function(*arguments)`` in a new process of that environment; it prints to a log."""
        order = {"call": call, "arguments": arguments, "environment": environment, "log": str(log)}
        return Child(self, self.ask(order))


@functools.cache
def nursery(number: int) -> Nursery:
    """One of this test process's nurseries, started when it is first asked for."""
    return Nursery()


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What an import prints is no answer.
    _import_all()
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(_state(order["poll"]) if "poll" in order else _fork(order)), file=answers, flush=True)


def _import_all() -> None:
    from mmscale.dist import _prepare_deepspeed

    gc.disable()  # Nothing of this is ever garbage.
    _prepare_deepspeed("cpu")
    for name in (
        "mmscale.run.train",
        "mmscale.cli.main",
        "deepspeed.comm",
        "deepspeed.ops",
        "torch._dynamo",
        "torchvision",
    ):
        import_module(name)
    gc.freeze()
    gc.enable()


def _state(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _fork(order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _become(order["environment"], order["log"])
        module, _, name = order["call"].partition(":")
        getattr(import_module(module), name)(*order["arguments"])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _become(environment: dict[str, str], log: str) -> None:
    """Leaves behind what belongs to the nursery: its pipes, its environment."""
    os.environ.clear()
    os.environ.update(environment)
    null = os.open(os.devnull, os.O_RDONLY)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for old, new in ((null, 0), (written, 1), (written, 2)):
        os.dup2(old, new)
    os.closerange(3, 256)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


if __name__ == "__main__":
    _serve()
