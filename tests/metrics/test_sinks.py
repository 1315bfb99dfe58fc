from __future__ import annotations

import json
import math
import resource
from pathlib import Path

import pytest

from mmscale.errors import MMScaleError
from mmscale.metrics.metrics_file import cut_back, read_metrics
from mmscale.metrics.sinks import JsonlSink, TensorBoardSink


def _write(path: Path, steps: list[int], tail: bytes = b"") -> None:
    path.write_bytes(b"".join(json.dumps({"step": step, "loss": 1 / step}).encode() + b"\n" for step in steps) + tail)


def test_resume_keeps_exactly_the_bytes_of_the_steps_done(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, [1, 2, 3, 4, 5])
    before = path.read_bytes().splitlines(keepends=True)
    sink = JsonlSink(path, start_step=3)
    sink.write({"step": 4, "loss": 0.5})
    sink.close()
    after = path.read_bytes().splitlines(keepends=True)
    assert after[:3] == before[:3]
    assert [json.loads(line)["step"] for line in after] == [1, 2, 3, 4]


@pytest.mark.parametrize("tail", [b'{"step": 4, "lo', b'{"step": 4, "loss": 2.0}', b"\x00\x00\x00\n", b"[4]\n", b"\n"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, [1, 2, 3], tail)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    assert cut_back(path, last_step=99) == 3
    assert path.read_bytes().count(b"\n") == 3
    assert path.read_bytes().endswith(b"\n")


def test_a_new_run_starts_with_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, [1, 2])
    JsonlSink(path, start_step=0).close()
    assert path.read_bytes() == b""


def test_cutting_back_leaves_the_old_file_if_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, [1, 2, 3])
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        cut_back(path, last_step=1)
    assert path.read_bytes() == before


def test_lines_are_readable_before_the_file_is_closed_and_floats_survive_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, start_step=0)
    loss = 0.1 + 0.2
    sink.write({"step": 1, "loss": loss})
    assert read_metrics(path)[0]["loss"].hex() == loss.hex()
    sink.close()


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, start_step=0)
    sink.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "nested": {"x": -math.inf}})
    sink.close()
    assert read_metrics(path) == [{"step": 1, "loss": None, "grad_norm": None, "nested": {"x": None}}]


def test_tensorboard_on_a_full_disk_is_one_error_and_no_traceback_of_a_thread(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for the full disk: a write fails in the middle of an event."""
    sink = TensorBoardSink(tmp_path, start_step=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(MMScaleError, match=r"tfevents.*: cannot be written: .*metrics\.tensorboard=false"):
            any(sink.scalars(step, {"loss": 1.0}) for step in range(1, 1000))
        sink.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capfd.readouterr().err == ""


def test_a_held_line_is_written_once_with_the_values_that_are_added(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, start_step=0)
    sink.write({"step": 1, "loss": 3.0})
    sink.write({"step": 2, "loss": 2.0}, hold=True)
    assert [record["step"] for record in read_metrics(path)] == [1]
    sink.amend(2, {"heldout/a/loss": math.nan})
    assert read_metrics(path)[1:] == [{"step": 2, "loss": 2.0, "heldout/a/loss": None}]
    sink.write({"step": 3, "loss": 1.0}, hold=True)
    sink.write({"step": 4, "loss": 0.5}, hold=True)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    sink.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]


def test_values_are_added_to_the_step_that_a_run_resumes_from(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, [1, 2, 3])
    sink = JsonlSink(path, start_step=2)
    before = path.read_bytes().splitlines(keepends=True)
    for value in (0.5, 0.25):  # The second time as after a kill.
        sink.amend(2, {"heldout/a/score": value})
        assert read_metrics(path)[1] == {"step": 2, "loss": 0.5, "heldout/a/score": value}
    sink.amend(7, {"heldout/a/score": 1.0})
    sink.write({"step": 3, "loss": 1.0})
    sink.close()
    assert path.read_bytes().splitlines(keepends=True)[0] == before[0]
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_tensorboard_hides_the_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, end, scale in ((0, 5, 1.0), (2, 4, 10.0)):
        sink = TensorBoardSink(tmp_path, start)
        for step in range(start + 1, end + 1):
            sink.scalars(step, {"loss": scale * step})
        sink.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
