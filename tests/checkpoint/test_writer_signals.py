"""Signals to the writer process, from its start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from mmscale.io.writer_process import WriteError, Writer
from tests.data_pipeline.io.test_ordered_pool import is_alive


def share(folder: str) -> dict[str, object]:
    return {"folder": folder, "names": ["a", "b"], "header_bytes": 0, "lengths": [], "metadata": {"tensors": {}}}


def test_a_signal_to_the_group_does_not_end_a_writer_that_is_starting(tmp_path: os.PathLike[str]) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    writer = Writer(4096)
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            os.kill(writer.pid, number)  # The interpreter needs far longer to start than these calls.
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before, "the trainer receives the signals again"
        writer.send("share", **share(str(tmp_path)))
        assert writer.result(None)
        assert sorted(os.listdir(tmp_path)) == ["a", "b"]
        os.kill(writer.pid, signal.SIGTERM)
        writer.send("share", **share(str(tmp_path)))
        with pytest.raises(WriteError, match="File exists"):
            writer.result(None)
    finally:
        writer.close()


@pytest.mark.parametrize(("number", "guess"), [(signal.SIGKILL, ": out of memory?"), (signal.SIGABRT, "")])
def test_only_the_signal_of_the_kernel_is_taken_for_a_lack_of_memory(number: signal.Signals, guess: str) -> None:
    writer = Writer(4096)
    try:
        os.kill(writer.pid, number)
        with pytest.raises(WriteError) as raised:
            writer.result(None)
        assert str(raised.value) == f"the writer process ended unexpectedly (exit code {-number}){guess}"
    finally:
        writer.close()


_TRAINER = """
import os, signal, time
from mmscale.io.writer_process import Writer
writer = Writer(4096)
fork = os.fork()
if fork == 0:
    time.sleep(600)
    os._exit(0)
print(writer.pid, fork, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_writer_ends_with_its_trainer_though_a_fork_holds_its_pipe() -> None:
    with subprocess.Popen([sys.executable, "-c", _TRAINER], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        writer, fork = map(int, trainer.stdout.readline().split())
        try:
            assert trainer.wait(60) == -signal.SIGKILL
            deadline = time.monotonic() + 60
            while is_alive(writer):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert is_alive(fork)
        finally:
            os.kill(fork, signal.SIGKILL)
