"""Trackers: what is sent, in which order, and what a run does without one."""

from __future__ import annotations

import http.server
import io
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from mmscale.errors import ConfigError
from mmscale.metrics.config import MetricsConfig
from mmscale.metrics.run_log import LoggedStage, RunLog
from mmscale.metrics.trackers import config as tracker_config
from mmscale.metrics.trackers import trackers as trackers_module
from mmscale.metrics.trackers.config import MlflowConfig, TrackerConfig, WandbConfig, check_trackers
from mmscale.metrics.trackers.follow import FOLDER, OUTBOX, STATE_FILE, Follower, State
from mmscale.metrics.trackers.messages import MOST_WAITING, Image, Record, Table, read_messages, write_message
from mmscale.metrics.trackers.trackers import RunFacts, Trackers
from tests.metrics.test_run_log import report, sums


class MemoryTracker:
    """A tracker that keeps what it gets, and refuses what real ones refuse: steps that do not ascend."""

    place = "memory"

    def __init__(self) -> None:
        self.run_id, self.last_step = "", None
        self.records: list[Record] = []
        self.failures = 0
        self.finished: bool | None = None

    def connect(self, run_id: str) -> MemoryTracker:
        self.run_id = run_id or "new"
        return self

    def send(self, records: list[Record]) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route to host\nsecond line")
        steps = [record.step for record in records]
        assert steps == sorted(set(steps))
        self.records += records

    def close(self, finished: bool) -> None:
        self.finished = finished

    def losses(self) -> list[tuple[int, float]]:
        return [(record.step, record.scalars["loss"]) for record in self.records if "loss" in record.scalars]


class Session:
    """One process that follows a run folder, run by hand."""

    def __init__(self, run_dir: Path, tracker: MemoryTracker, log_every: int = 1) -> None:
        self.notes: list[str] = []
        self.folder = run_dir / FOLDER / "wandb"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._follower = Follower(run_dir, self.folder, log_every, tracker.connect, self.notes.append)

    def run(self, *between: Any, finished: bool = True) -> bool:
        """Follow; call each of ``between`` while the training process lives, then end it."""
        calls = iter(between)

        def wait(seconds: float) -> bool:
            call = next(calls, None)
            if call is not None:
                call()
            return call is None

        return self._follower.run(wait, lambda: finished)


def write_steps(run_dir: Path, first: int, last: int, scale: float = 1.0) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            line = {"step": step, "stage": "all", "loss": scale / step, "seconds": 0.5, "tokens": 8, "applied": True}
            file.write(json.dumps({**line, "grad_norm": None}) + "\n")


def test_each_step_is_sent_once_with_its_messages_and_the_newest_waits_for_them(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    session = Session(tmp_path, tracker)
    sent: list[list[int]] = []

    def add() -> None:
        sent.append([record.step for record in tracker.records])
        write_message(session.folder / OUTBOX, "samples", Record(3, images={"samples/0": Image(b"png", "a cat")}))
        write_steps(tmp_path, 4, 5)

    write_steps(tmp_path, 1, 3)
    assert session.run(add)
    assert sent == [[1, 2]]
    assert [record.step for record in tracker.records] == [1, 2, 3, 4, 5]
    assert tracker.records[2].images == {"samples/0": Image(b"png", "a cat")}
    assert tracker.records[0].scalars == {
        "loss": 1.0, "seconds": 0.5, "tokens": 8.0, "applied": 1.0, "tokens_per_second": 16.0
    }  # fmt: skip
    assert tracker.finished is True
    assert not list((session.folder / OUTBOX).iterdir())
    assert session.notes == ["run new, memory"]


def test_a_resumed_run_repeats_no_step_and_no_message(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    write_steps(tmp_path, 1, 13)
    session = Session(tmp_path, tracker)
    write_message(session.folder / OUTBOX, "samples", Record(12, scalars={"first": 1.0}))
    session.run(finished=False)
    assert tracker.finished is False
    (tmp_path / "metrics.jsonl").unlink()
    write_steps(tmp_path, 1, 10)
    write_steps(tmp_path, 11, 15)
    session = Session(tmp_path, tracker)
    write_message(session.folder / OUTBOX, "samples", Record(12, scalars={"again": 1.0}))
    write_message(session.folder / OUTBOX, "heldout", Record(13, scalars={"late": 1.0}))
    session.run()
    assert tracker.losses() == [(step, 1 / step) for step in range(1, 16)]
    assert {name for record in tracker.records for name in record.scalars} >= {"first", "late"}
    assert not any("again" in record.scalars for record in tracker.records)
    assert State.read(session.folder / STATE_FILE) == State("new", 15, {"samples": 12, "heldout": 13})


def test_a_roll_back_replaces_the_file_and_the_abandoned_step_that_was_not_sent(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    write_steps(tmp_path, 1, 5)

    def roll_back() -> None:
        old = tmp_path / "metrics.jsonl"
        kept = old.read_bytes().splitlines(keepends=True)[:2]
        new = tmp_path / "new"
        new.write_bytes(b"".join(kept))
        os.replace(new, old)
        write_steps(tmp_path, 3, 6, scale=100.0)

    Session(tmp_path, tracker).run(roll_back)
    # Steps 3 and 4 were sent before the roll back; step 5 was not, so it is that of the second attempt.
    assert tracker.losses() == [(1, 1.0), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4), (5, 20.0), (6, 100 / 6)]


def test_a_tracker_that_fails_gets_every_step_later_and_is_named_once(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    tracker.failures = 2
    write_steps(tmp_path, 1, 250)
    session = Session(tmp_path, tracker)
    assert session.run(lambda: None, lambda: write_steps(tmp_path, 251, 260))
    assert [step for step, _ in tracker.losses()] == list(range(1, 261))
    assert [note for note in session.notes if "no route" in note] == [
        "no route to host (training continues; steps that were not sent wait in the run folder)"
    ]
    tracker.failures = 99
    write_steps(tmp_path, 261, 262)
    assert not Session(tmp_path, tracker).run()


def test_log_every_thins_the_steps_and_no_message(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    write_steps(tmp_path, 1, 10)
    session = Session(tmp_path, tracker, log_every=4)
    write_message(session.folder / OUTBOX, "heldout", Record(6, scalars={"heldout/a/score": 0.5}))
    session.run()
    assert [record.step for record in tracker.records] == [4, 6, 8]


def test_messages_survive_the_disk_and_too_many_are_refused(tmp_path: Path) -> None:
    table = Table(["set", "score"], [["a | b", 0.5], ["ü", None]])
    assert write_message(tmp_path, "held out/ü", Record(7, {"a": 1.5}, {"x": Image(b"\x00\xff", "c")}, {"t": table}))
    (message,) = read_messages(tmp_path, 7)
    assert message.record == Record(7, {"a": 1.5}, {"x": Image(b"\x00\xff", "c")}, {"t": table})
    assert read_messages(tmp_path, 6) == []
    (tmp_path / "000000000001-bad.json").write_text('{"step": 1')
    assert [m.record.step for m in read_messages(tmp_path, 9)] == [7]
    for step in range(100, 100 + MOST_WAITING - 1):
        assert write_message(tmp_path, "x", Record(step))
    assert not write_message(tmp_path, "x", Record(999))


@contextmanager
def server(answer: int | None) -> Iterator[str]:
    """Serve on the loopback interface: answer with this status, or accept and never answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            body = b'{"errors": [{"message": "unauthorized"}]}'
            self.send_response(answer or 500)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST  # noqa: N815

        def log_message(self, *words: object) -> None:
            return None

    if answer is None:
        with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
            yield f"http://127.0.0.1:{silent.getsockname()[1]}"
        return
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.mark.fault
@pytest.mark.parametrize("answer", [None, 401])
def test_a_run_goes_on_without_its_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int | None) -> None:
    """The server hangs, or rejects the key: every step is in ``metrics.jsonl``, and the run says what was not sent."""
    monkeypatch.setattr(trackers_module, "STOPPED_SECONDS", 2.0 if answer is None else 60.0)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    printed = io.StringIO()
    with server(answer) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        blocks = (WandbConfig(), MlflowConfig(tracking_uri=address))
        with Trackers(tmp_path, blocks, 1) as trackers:
            console = Console(file=printed, width=500)
            log = RunLog(tmp_path, MetricsConfig(tensorboard=False), 0, 3, console, trackers)
            trackers.start(RunFacts("run", {"seed": 1}, "abc", {"start": 1}), log.print_line)
            processes = [link._process for link in trackers._links]
            for step in (1, 2, 3):
                log.step(step, report(), sums())
            log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    said = printed.getvalue()
    for kind in ("wandb", "mlflow"):
        assert said.count(f"{kind}: not everything was sent; the tracker has the steps up to 0.") == 1
        if answer is not None:
            assert said.count(f"{kind}: ") == 2, said
            assert "unauthorized" in said
    assert all(process is not None and process.returncode is not None for process in processes)
    assert "Traceback" not in said


def test_a_full_disk_costs_a_message_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    with Trackers(tmp_path, (WandbConfig(mode="offline"),), 1) as trackers:

        def full(*words: object, **more: object) -> None:
            raise OSError(28, "No space left on device", "start.json")

        monkeypatch.setattr(trackers_module, "write_whole", full)
        monkeypatch.setattr("mmscale.metrics.trackers.messages.write_whole", full)
        trackers.start(RunFacts("run", {}, None, {}), lines.append)
        trackers.scalars(3, "heldout", {"a": 1.0})
        trackers.table(4, "heldout", ["a"], [[1]])
        trackers.print_notes()
    assert lines == [
        "wandb: not started: start.json: No space left on device",
        "wandb: the heldout of step 3 were dropped: the tracker does not take them",
    ]


def test_a_missing_package_is_found_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_config, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"metrics\.trackers\.0=wandb: .*pip install 'mmscale\[wandb\]'"):
        check_trackers([WandbConfig()])


def test_a_name_is_a_block_and_each_kind_occurs_once() -> None:
    assert MetricsConfig(trackers=["wandb", {"kind": "mlflow", "project": "p"}]).trackers == (
        WandbConfig(),
        MlflowConfig(project="p"),
    )
    with pytest.raises(ValidationError, match="one tracker of each kind"):
        MetricsConfig(trackers=["wandb", {"kind": "wandb", "mode": "offline"}])
    with pytest.raises(ValidationError, match="'wandb', 'mlflow', 'trackio'"):
        TypeAdapter(TrackerConfig).validate_python("tensorboard")


def test_other_ranks_and_runs_without_trackers_write_nothing(tmp_path: Path) -> None:
    with Trackers(tmp_path, (), 1) as trackers:
        assert not trackers
        trackers.start(RunFacts("run", {}, None, {}), lambda line: pytest.fail(line))
        trackers.table(1, "t", ["a"], [])
    assert not list(tmp_path.iterdir())


def test_tables_and_scalars_reach_tensorboard_too(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, MetricsConfig(), 0, 1, Console(file=io.StringIO()))
    log.begin_stage(LoggedStage("all"))
    log.scalars(1, "heldout", {"heldout/style/score": 0.25})
    log.table(1, "results", ["set", "score"], [["a|b", 0.5]])
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("heldout/style/score")] == [(1, 0.25)]
    text = events.Tensors("results/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines() == ["| set | score |", "| --- | --- |", "| a\\|b | 0\\.5 |"]
