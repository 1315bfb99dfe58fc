"""Time and memory of the phases of a step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from mmscale.dist import World
from mmscale.engine.step_clock import StepClock, StepSpans, peak_memory, peak_since_reset, reset_peak
from tests.engine.programs import LANES, lanes_of, make_engine
from tests.engine.ranks import run_ranks

CPU = torch.device("cpu")


def timed_step(world: World) -> list[Any]:
    """Run a step with a fake clock: 1 s for the forward of a block, 1,000 s for each collective, else 0."""
    from deepspeed.comm import comm

    from mmscale.dist import start_deepspeed

    start_deepspeed(world)
    told = Counter({"seconds": 0, "collectives": 0, "waits": 0})

    class Late:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self, *args: Any, **kwargs: Any) -> Any:
            told["seconds"] += 10_000
            told["waits"] += 1
            return self.work.wait(*args, **kwargs)

        def is_completed(self) -> Any:
            return self.work.is_completed()

    def slow(collective: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            told["seconds"] += 1_000
            told["collectives"] += 1
            work = collective(*args, **kwargs)
            return Late(work) if work is not None and kwargs.get("async_op") else work

        return call

    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "reduce", "broadcast"):
        setattr(comm.cdb, name, slow(getattr(comm.cdb, name)))
    engine = make_engine(world)
    engine.clock = StepClock(CPU, lambda: told["seconds"])

    def think(*_: Any) -> None:
        told["seconds"] += 1

    engine.model.decoder.blocks[0].register_forward_hook(think)
    told.clear()
    report = engine.train_step(lanes_of(world, 0))
    spans = report.spans
    return [spans.seconds, told, spans.peak_bytes, engine.clock.pop_spans().seconds, spans.own_seconds]


@pytest.mark.dist
def test_time_is_split_by_phase_and_collectives_count_wherever_they_happen() -> None:
    microbatches = LANES // 2
    for seconds, told, peaks, left, own in run_ranks("tests.engine.test_sight:timed_step", 2):
        expected = 1_000 * told["collectives"] + 10_000 * told["waits"]
        assert told["collectives"] > told["waits"] > 0
        assert seconds["communication"] == expected
        assert seconds["forward"] + seconds["backward"] + seconds["optimizer"] == expected + microbatches
        assert seconds["forward"] % 1_000 == microbatches
        assert own == microbatches, "waiting for other ranks does not count"
        assert seconds["backward"] > 0, "gradients are reduced in backward"
        assert peaks == {}
        assert left == {}


def test_phases_may_repeat_and_communication_is_counted_once() -> None:
    time = [0.0]
    clock = StepClock(CPU, lambda: time[0])
    for _ in range(2):
        with clock.phase("forward"):
            time[0] += 1
            with clock.communicating(), clock.communicating():
                time[0] += 0.25

    def fails() -> None:
        time[0] += 3
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"), clock.phase("backward"), clock.communicating():
        fails()
    spans = clock.pop_spans()
    assert spans.seconds == {"forward": 2.5, "communication": 3.5, "backward": 3.0}
    assert spans.own_seconds == 2.0
    with clock.communicating():
        time[0] += 1
    with clock.phase("optimizer"):
        time[0] += 0.5
    assert clock.pop_spans() == StepSpans({"communication": 1.0, "optimizer": 0.5}, {}, 0.5)


def test_a_phase_knows_its_own_memory_and_the_process_keeps_its_mark() -> None:
    if not reset_peak(CPU):
        pytest.skip("this system does not reset the peak of a process")
    size = 96 << 20
    clock = StepClock(CPU)
    clock.memory = True
    with clock.phase("forward"):
        held = torch.ones(size // 4)
    del held
    between = torch.ones(2 * size // 4)  # Outside of phases.
    del between
    with clock.phase("backward"):
        pass
    peaks = clock.pop_spans().peak_bytes
    assert peaks["forward"] - peaks["backward"] > 0.9 * size
    assert peak_since_reset(CPU) < peaks["forward"] - 0.9 * size
    assert peak_memory().rss_bytes > peaks["backward"] + 1.9 * size
