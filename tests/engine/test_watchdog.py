"""A hang on real ranks: the run ends in bounded time, with an exit code, and names rank, line and collective."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.watchdog import EXIT_HUNG, RECENT_STEPS, Heartbeat, Limits, Watchdog, explain
from tests.engine.programs import lanes_of, make_engine
from tests.engine.ranks import start_ranks

LIMIT = 4.0


def beat(step: int, phase: str, seconds: float, collective: str = "", place: str = "a.py:1 in f") -> Heartbeat:
    return Heartbeat(1, step, phase, seconds, collective, place)


def test_the_limit_of_a_step_lies_below_that_of_a_collective() -> None:
    engine = EngineConfig.model_validate({"timeout_seconds": 60})
    assert engine.watchdog.limits(engine.timeout_seconds) == Limits(step=30, other=3600)
    off = EngineConfig.model_validate({"timeout_seconds": 60, "watchdog": {"step_seconds": None}})
    assert off.watchdog.limits(off.timeout_seconds).step is None
    with pytest.raises(ValueError, match=r"watchdog\.step_seconds=60 must be less than timeout_seconds=60"):
        EngineConfig.model_validate({"timeout_seconds": 60, "watchdog": {"step_seconds": 60}})


def test_the_sentence_blames_who_does_not_wait() -> None:
    beats = [beat(41, "optimizer", 60, "all_reduce"), beat(41, "data", 61), beat(41, "optimizer", 60, "all_reduce")]
    assert explain(beats, []) == (
        "rank 1 has been in data of step 41 for 61 s (at a.py:1 in f) "
        "while ranks 0, 2 wait for it in all_reduce of step 41 (optimizer)"
    )


def test_the_sentence_blames_first_who_does_not_run() -> None:
    beats = [beat(7, "forward", 60, "all_gather"), None, beat(7, "data", 2)]
    said = explain(beats, [1, 2])
    assert said.startswith("rank 1 has never written a heartbeat; rank 2 does not run any more")
    assert "last in data of step 7" in said
    assert said.endswith("while rank 0 waits for it in all_gather of step 7 (forward)")


def test_where_all_wait_for_each_other_the_last_one_is_named() -> None:
    beats = [beat(8, "agreement", 60, "all_reduce"), beat(7, "optimizer", 60, "reduce_scatter")]
    assert explain(beats, []).startswith("rank 1 has been in optimizer of step 7 for 60 s, in reduce_scatter")


def test_alone_it_says_where_it_stands() -> None:
    assert explain([beat(3, "data", 9)], []) == "rank 0 has been in data of step 3 for 9 s (at a.py:1 in f)"


def test_a_heartbeat_has_the_median_time_of_the_last_steps(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, Limits(60, 60), 0, 1)
    watchdog.begin_start()
    for step, seconds in enumerate([900.0] + RECENT_STEPS * [70.0] + [1.0, 500.0, 2.0] + (RECENT_STEPS - 3) * [5.0], 1):
        watchdog.begin_step(step)
        watchdog.end_data()
        watchdog.end_step(seconds)
        if step == 2:
            assert watchdog.beat().own_seconds == pytest.approx(70, abs=1), "the first step is left out"
    assert watchdog.beat().own_seconds == pytest.approx(5, abs=1)
    watchdog.begin_start()
    assert watchdog.beat().own_seconds is None, "another stage has another model"


def test_the_time_of_a_step_includes_the_wait_for_data(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, Limits(60, 60), 0, 1)
    for step in (1, 2):
        watchdog.begin_step(step)
        time.sleep(0.05)
        watchdog.end_data()
        time.sleep(0.2)  # Not the rank's own time.
        watchdog.end_step(100.0)
    own = watchdog.beat().own_seconds
    assert own is not None
    assert own >= 100.05


def test_many_ranks_are_named_by_ranges() -> None:
    beats: list[Heartbeat | None] = [beat(9, "forward", 60, "all_gather") for _ in range(8000)]
    beats[4321] = beat(9, "data", 61)
    said = explain(beats, [])
    assert said.startswith("rank 4321 has been in data of step 9 for 61 s")
    assert said.endswith("while ranks 0-4320, 4322-7999 wait for it in all_gather of step 9 (forward)")
    said = explain(beats, list(range(100, 140)))
    assert "and 32 more ranks (100-139)" in said
    assert len(said) < 2000


def test_a_rank_that_does_not_report_repeats_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = Limits(step=0.8, other=0.8)
    reporter, other = (Watchdog(tmp_path, limits, rank, 32) for rank in (2, 1))
    assert reporter.reporters == range(0, 32, 2)
    (tmp_path / "heartbeats").mkdir()
    message = reporter._explain([None] * 32)
    assert message.startswith("rank 0 has never written a heartbeat; rank 1 has never")
    assert other._wait_for_verdict() == message
    (tmp_path / "heartbeats" / "verdict.json").unlink()
    assert other._wait_for_verdict().startswith("this rank hangs, and no other rank has named the cause")


def slow_then_stuck(world: World, folder: str) -> Any:
    """Run steps that exceed the limit only in sum, a long checkpoint, then let rank 1 sleep in a forward pass."""
    limits = Limits(step=LIMIT, other=60)
    watchdog = Watchdog(Path(folder), limits, world.rank, world.world_size)
    watchdog.start()
    engine = make_engine(world)
    engine.clock.on_phase = watchdog.enter
    nap = [0.0]
    engine.model.decoder.norm.register_forward_hook(lambda *_: time.sleep(nap[0]))
    for step in range(3):
        nap[0] = 0.45 * LIMIT * (step == 1)  # Twice a step, since there are two microbatches.
        watchdog.begin_step(step + 1)
        time.sleep(0.5 * LIMIT * (step == 1))
        engine.train_step(lanes_of(world, step))
    with watchdog.during("checkpoint"):
        time.sleep(1.5 * LIMIT)
    Path(folder, f"healthy-{world.rank}").touch()
    nap[0] = 1000.0 * (world.rank == 1)
    watchdog.begin_step(4)
    try:
        engine.train_step(lanes_of(world, 3))
    finally:
        watchdog.close()
    return None


@pytest.mark.dist
@pytest.mark.fault
def test_a_slow_run_is_left_alone_and_a_stuck_one_is_ended(tmp_path: Path) -> None:
    processes = start_ranks("tests.engine.test_watchdog:slow_then_stuck", 2, {"folder": str(tmp_path)}, tmp_path)
    try:
        codes = [process.wait(120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(tmp_path / f"log-{rank}.txt").read_text() for rank in (0, 1)]
    assert all((tmp_path / f"healthy-{rank}").exists() for rank in (0, 1)), logs
    assert codes == [EXIT_HUNG, EXIT_HUNG], logs
    for rank in (0, 1):
        (said,) = [line for line in logs[rank].splitlines() if "has been in" in line]
        assert f"rank {rank}: rank 1 has been in forward of step 4 for" in said
        assert "in <lambda>) while rank 0 waits for it in reduce_scatter" in said
    stacks = (tmp_path / "logs/hang-rank-1.txt").read_text()
    assert "slow_then_stuck" in stacks
    assert re.match(
        r"main thread: forward of step 4, in no collective, at engine/test_watchdog.py:\d+ in <lambda>\n", stacks
    )
    waiting = (tmp_path / "logs/hang-rank-0.txt").read_text()
    assert re.match(r"main thread: \w+ of step 4, in reduce_scatter\w*, at \S+\.py:\d+ in \w+\n", waiting)
