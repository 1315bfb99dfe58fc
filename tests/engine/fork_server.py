"""Servers that import the modules of a rank once, and fork ranks and commands for tests within milliseconds.

    tests --lines of JSON--> fork server --fork--> rank        tests <--exit codes-- fork server

A new interpreter for each rank would spend three seconds of CPU time on importing torch and DeepSpeed. Ranks alternate
between two fork servers with different hash seeds, as with separately started interpreters. So code that depends on the
order of a set behaves differently on different ranks. Whole runs (``tests/system``) can use the servers too, since
imports take half of the time of a short run. All workers of pytest-xdist share the two servers.

``Commands`` forks ``mmscale`` in the same way, for a shell that runs many short commands.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import json
import os
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, TextIO
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
SLOW_FROM = "SLOW_FROM_STEP"
"""Variable of a forked command: the number of the first step after which its run waits a second."""


@dataclass
class Child:
    """A forked process, with the methods of ``subprocess.Popen`` that the tests use."""

    server: ForkServer
    pid: int
    log: Path
    returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or minus the signal number; None while the process runs."""
        if self.returncode is None:
            self.returncode = self.server.request({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code.

        Raises:
            subprocess.TimeoutExpired: the process runs for more than ``timeout`` seconds.
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

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for the end and return the output."""
        self.wait(timeout)
        return self.log.read_text(), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """A connection to a fork server. The first test process that connects starts it; it ends after the last one."""

    def __init__(self, number: int) -> None:
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())
        self._address = Path(tempfile.gettempdir()) / f"mmscale-{run}-{number}"
        with open(__file__) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # Of several processes one starts the server.
            self._stream = self._connect() or self._start()

    def _connect(self) -> TextIO | None:
        """Return a stream to the server; None if there is none."""
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.connect(str(self._address))
            stream = client.makefile("rw")
            if stream.readline():  # A server that is about to end accepts no more.
                return stream
        return None

    def _start(self) -> TextIO:
        self._address.unlink(missing_ok=True)  # Left by a server that was killed.
        self._process = process = subprocess.Popen(
            [sys.executable, __file__, "ranks", str(self._address)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            start_new_session=True,
        )
        assert process.stdout
        assert process.stdout.read() == b"ready\n"
        stream = self._connect()
        assert stream
        return stream

    def request(self, request: dict[str, Any]) -> Any:
        print(json.dumps(request), file=self._stream, flush=True)
        answer = self._stream.readline()
        if not answer:
            raise RuntimeError("the fork server ended, or could not answer; its traceback is in the standard error")
        return json.loads(answer)

    def fork(self, call: str, arguments: list[Any], environment: dict[str, str], log: Path) -> Child:
        """Run ``package.module:function(*arguments)`` in a new process, with its output in ``log``."""
        request = {"call": call, "arguments": arguments, "environment": environment, "log": str(log)}
        return Child(self, self.request(request), log)


def fork_program(program: str, *words: str, log: Path, number: int = 0) -> Child:
    """Run Python code with the arguments ``words``, in a new session of a new process that has imported all modules.

    Args:
        program: The code.
        words: ``sys.argv[1:]``.
        log: File for the output.
        number: Number of the fork server. Each has its own hash seed.
    """
    call = "tests.engine.fork_server:run_program"
    return fork_server(number).fork(call, [program, words], dict(os.environ), log)


def run_program(program: str, words: list[str]) -> None:
    os.setsid()
    sys.argv[1:] = words
    exec(program, {"__name__": "__main__"})


@functools.cache
def fork_server(number: int) -> ForkServer:
    """Return the connection of this test process to fork server ``number``."""
    return ForkServer(number)


class ForkedRank(subprocess.Popen[bytes]):
    """``python -m mmscale.cli.main WORDS`` without a new interpreter.

    The process is a child of the launcher, with the session, files and variables that the launcher sets.
    """

    def _execute_child(
        self,
        args: list[str],
        executable: None,
        preexec_fn: Callable[[], None],
        close_fds: bool,
        pass_fds: tuple[int, ...],
        cwd: None,
        env: dict[str, str],
        *rest: Any,
    ) -> None:
        ends = rest[3:9]  # Pipe ends of the child and of this process for standard input, output and error.
        files = [inherited if end < 0 else end for inherited, end in enumerate((ends[0], ends[3], ends[5]))]
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            self._close_pipe_fds(*ends)
            return
        try:
            os.setsid()
            preexec_fn()
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _become(env, *files, keep=pass_fds)
            _enter(args[3:])
        finally:
            os._exit(1)


def run_command(words: list[str]) -> None:
    """Run ``mmscale WORDS`` in a new session, and fork the ranks that it launches."""
    from launchers import local

    os.setsid()
    forking = SimpleNamespace(Popen=ForkedRank, DEVNULL=subprocess.DEVNULL)
    with mock.patch.object(local, "subprocess", forking):
        _enter(words)


def _enter(words: list[str]) -> NoReturn:
    from mmscale.cli.main import entry

    sys.argv = ["mmscale", *words]
    if SLOW_FROM in os.environ:
        _slow_down(int(os.environ[SLOW_FROM]))
    entry()


def _slow_down(first: int) -> None:
    """Wait a second after the line of each step from ``first`` on."""
    from mmscale.metrics.sinks import JsonlSink

    write = JsonlSink.write

    def write_slowly(sink: JsonlSink, record: dict[str, Any], **options: Any) -> None:
        write(sink, record, **options)
        if record["step"] >= first:
            time.sleep(1)

    JsonlSink.write = write_slowly  # type: ignore[method-assign]


_CLIENT = """\
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as commands:
    commands.connect(sys.argv[1])
    socket.send_fds(commands, [b"files"], [0, 1, 2])
    commands.sendall(json.dumps([sys.argv[2:], os.getcwd(), dict(os.environ)]).encode())
    commands.shutdown(socket.SHUT_WR)
    code = int(commands.recv(16) or 1)
sys.exit(128 - code if code < 0 else code)
"""


class Commands:
    """A server that forks ``mmscale`` for each call of a client script.

    The command gets the client's arguments, folder, environment and standard files. The client returns the command's
    exit code. The modules are already imported, so a command starts in milliseconds instead of two seconds.
    """

    def __init__(self, folder: Path) -> None:
        """Start the server.

        Args:
            folder: New empty folder for the socket.
        """
        self._address = folder / "socket"
        command = [sys.executable, __file__, "commands", str(self._address)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout
        assert self._process.stdout.readline() == b"ready\n"

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def write_client(self, path: Path) -> None:
        """Write the executable that replaces the script ``mmscale``."""
        command = [sys.executable, "-SEc", _CLIENT, str(self._address)]
        path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        path.chmod(0o755)


def _serve_commands(address: str) -> None:
    answers = os.dup(1)
    os.dup2(2, 1)
    # Use the import path of the installed script, not that of this file.
    sys.path[0] = str(Path(sys.executable).parent)
    _import_all()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        os.write(answers, b"ready\n")
        os.close(answers)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # The kernel reaps the child processes.
        while True:
            client, _ = listener.accept()
            if not os.fork():
                listener.close()
                _answer(client)
            client.close()


def _answer(client: socket.socket) -> NoReturn:
    """Run one command in a child process and send its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(client, len(b"files"), 3)
    words, folder, environment = json.loads(b"".join(iter(lambda: client.recv(1 << 16), b"")))
    pid = os.fork()
    if not pid:
        code = 1
        try:
            _become(environment, *files)
            os.chdir(folder)
            _enter(words)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    for file in (0, 1, 2, *files):  # Only the command may hold the client's files open.
        os.close(file)
    client.sendall(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def _serve(address: str) -> None:
    """Answer the requests of all test processes, until the last of them has closed its connection."""
    answers = os.dup(1)
    os.dup2(2, 1)  # Output of imports must not reach the client.
    _import_all()
    streams: dict[socket.socket, TextIO] = {}
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(address)
        listener.listen()
        selector.register(listener, selectors.EVENT_READ)
        os.write(answers, b"ready\n")
        os.close(answers)
        while True:
            ready = selector.select(timeout=None if streams else 60)
            for client in [key.fileobj for key, _ in ready]:
                assert isinstance(client, socket.socket)
                if client is listener:
                    client, _ = listener.accept()
                    streams[client] = client.makefile("rw")
                    selector.register(client, selectors.EVENT_READ)
                    is_open = _answer_client(streams[client], is_new=True)
                else:
                    is_open = _answer_client(streams[client])
                if not is_open:
                    selector.unregister(client)
                    with contextlib.suppress(OSError):
                        streams.pop(client).close()
                    client.close()
            if not streams:
                os.unlink(address)
                return


def _answer_client(stream: TextIO, *, is_new: bool = False) -> bool:
    """Greet a new client, or answer one request. Return whether the connection stays open.

    A client that was killed, or whose request fails, must not end the server of the other test processes.
    """
    try:
        if is_new:
            answer: Any = {}
        elif line := stream.readline():
            request = json.loads(line)
            answer = _state(request["poll"]) if "poll" in request else _fork(request)
        else:
            return False
        print(json.dumps(answer), file=stream, flush=True)
    except (OSError, ValueError):
        traceback.print_exc()
        return False
    return True


def _import_all() -> None:
    from mmscale.dist import prepare_deepspeed

    gc.disable()  # The imported objects live until the end.
    prepare_deepspeed("cpu")
    for name in (
        "mmscale.run.train",
        "mmscale.cli.main",
        "mmscale.cli.launch",
        "mmscale.cli.train",
        "launchers.local",
        "deepspeed.comm",
        "deepspeed.ops",
        "torch._dynamo",
        "torchvision",
    ):
        import_module(name)
    _ = import_module("deepspeed.ops").__compatible_ops__  # Its first reader compiles programs to find out what works.
    gc.freeze()
    gc.enable()


def _state(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        dummy = os.open(os.devnull, os.O_RDONLY)
        written = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        _become(request["environment"], dummy, written, written)
        module, _, name = request["call"].partition(":")
        getattr(import_module(module), name)(*request["arguments"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _become(environment: dict[str, str], *files: int, keep: tuple[int, ...] = ()) -> None:
    """Replace the environment and the open files of the fork server."""
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files):
        os.dup2(file, number)
    for file in {*range(3, 256)} - {*keep}:
        with contextlib.suppress(OSError):
            os.close(file)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


if __name__ == "__main__":
    {"ranks": _serve, "commands": _serve_commands}[sys.argv[1]](sys.argv[2])
