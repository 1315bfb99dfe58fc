"""Stop requests: signals set a flag, SLURM sets the deadline, and a second Ctrl-C stops at once."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from mmscale.dist import World
from mmscale.engine.stop import StopRequest, listen_for_stop

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with listen_for_stop() as request:
        assert not request.should_stop(ALONE)
        os.kill(os.getpid(), number)
        assert request.should_stop(ALONE)
        assert number.name in str(request.reason)
    assert signal.getsignal(number) is before


def test_sigterm_twice_is_still_one_request_and_ctrl_c_twice_interrupts() -> None:
    with listen_for_stop() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.should_stop(ALONE)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_deadline_of_a_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    assert not StopRequest(margin_seconds=50).should_stop(ALONE)
    request = StopRequest(margin_seconds=200)
    assert request.should_stop(ALONE)
    assert "SLURM" in str(request.reason)
