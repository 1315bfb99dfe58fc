"""Twenty random faults in one run, which then has the values of an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
from collections.abc import Callable

import pytest

from benchmarks.torture import _family, differences
from mmscale.metrics.goodput import read_goodput
from tests.system.conftest import MakeRun, Process, kill_group
from tests.system.test_resume import curve

STEPS = 240
WORDS = (
    f"max_steps={STEPS}",
    "checkpoint.every_steps=3",
    "data.lanes=2",
    "model.decoder.dropout=0.1",
    "model.decoder.num_layers=2",
    "model.vision.num_layers=1",
    "model.connector.every=2",
    # Both less than the timeout of a collective (60 s): a rank may stop during a checkpoint, too.
    "engine.watchdog={step_seconds: 8, other_seconds: 45}",
)


def kill_rank(process: Process, rank: int) -> None:
    os.kill(_family(process.pid)[0][rank], signal.SIGKILL)


def stop_rank(process: Process, rank: int) -> None:
    os.kill(_family(process.pid)[0][rank], signal.SIGSTOP)


def lose_machine(process: Process, rank: int) -> None:
    for pid in [*_family(process.pid)[0], process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_launcher(process: Process, rank: int) -> None:
    process.kill()


def ask_to_stop(process: Process, rank: int) -> None:
    process.send_signal((signal.SIGUSR1, signal.SIGTERM)[rank])


def fill_disk(process: Process, rank: int) -> None:
    """Let every write of the ranks fail with EFBIG, as on a full disk with ENOSPC."""
    for pid in _family(process.pid)[0]:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, 0))


FAULTS: dict[Callable[[Process, int], None], tuple[int, int]] = {
    kill_rank: (5, 1),
    stop_rank: (2, 76),
    lose_machine: (4, -9),
    kill_launcher: (3, -9),
    ask_to_stop: (4, 75),
    fill_disk: (2, 1),
}
"""How often each fault happens, and the exit code of the launcher after it."""


@pytest.mark.slow
@pytest.mark.resume
@pytest.mark.dist
def test_twenty_random_faults_change_no_value(fork_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    whole = fork_run("whole", 2, *WORDS)
    whole.finish()
    draw = random.Random(19)
    faults = [fault for fault, (times, _) in FAULTS.items() for _ in range(times)]
    draw.shuffle(faults)
    run = fork_run("run", 2, *WORDS)
    for number, fault in enumerate(faults, 1):
        process = run.start()
        try:
            run.wait_for_step(process, (run.metrics() or [{"step": 0}])[-1]["step"] + draw.randint(1, 5))
            fault(process, draw.randrange(2))
            output, _ = process.communicate(timeout=120)
        finally:
            kill_group(process)
        what = f"fault {number}, {fault.__name__}: {output}"
        assert process.returncode == FAULTS[fault][1], what
        assert run.metrics()[-1]["step"] < STEPS, what
    run.finish()
    assert curve(run) == curve(whole)
    assert differences(whole.folder, run.folder) == (0.0, 0.0)
    goodput = read_goodput(run.folder)
    assert goodput is not None
    assert goodput.starts == len(faults) + 1 == 21
    assert goodput.repeated > 0, "lost steps"
    seconds = f"{goodput.training:.0f} s of steps in {goodput.wall:.0f} s"
    with capsys.disabled():
        print(f"\n{len(faults)} faults, goodput {goodput.share:.0%}: {seconds}")
