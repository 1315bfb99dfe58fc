"""Runs with trackers that write to the disk, read back with the trackers' own readers."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import MakeRun, Run, kill_group

pytestmark = [pytest.mark.resume, pytest.mark.slow]
STEPS = 13
SETS = (
    "evaluation={every_steps: 6, captions: {num_images: 2}, sets: [{name: style, field: name, choices: 5, limit: 8, "
    "manifest: examples/emoji/shards/heldout-style-quick.manifest}]}"
)


def wandb_rows(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], set[str]]:
    """Return the history of all ``.wandb`` files in the order of their starts, the last configuration, and the commits.

    The format: blocks of 32 KiB after a header of 7 bytes, with records of crc (4), length (2) and type (1); a record
    that crosses blocks is in parts (types 2, 3, 4). Each is a protocol buffer ``Record``.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    ids = set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in _log_records(path.read_bytes()):
            record = Record.FromString(content)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                keys = [
                    (item.key or ".".join(item.nested_key), json.loads(item.value_json)) for item in record.history.item
                ]
                rows.append(dict(keys))
    return rows, config, ids


def _log_records(data: bytes) -> list[bytes]:
    """Return the records of a LevelDB log with wandb's header."""
    assert data[:4] == b":W&B"
    found, parts, offset = [], b"", 7
    while offset + 7 <= len(data):
        room = 32768 - offset % 32768
        if room < 7:
            offset += room
            continue
        length, kind = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
        if kind == 0:  # Padding.
            offset += room
            continue
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):
            found.append(parts)
            parts = b""
    return found


def losses(run: Run) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in run.metrics()}


def test_a_killed_run_continues_its_tracker_runs_and_repeats_no_step(
    fork_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = (tmp_path / "mlflow store").as_uri()
    words = (
        f"max_steps={STEPS}",
        "checkpoint.every_steps=5",
        "metrics.images_every=4",
        SETS,
        f"metrics.trackers=[{{kind: wandb, mode: offline, tags: [first]}}, {{kind: mlflow, tracking_uri: '{store}'}}]",
    )
    run = fork_run("tracked ü", 1, *words)
    process = run.start(slow_from=STEPS - 2)
    run.wait_for_step(process, 8)
    kill_group(process)
    killed_at = run.metrics()[-1]["step"]
    assert killed_at < STEPS, "the run was over before it was killed"
    output = run.finish()
    assert "resuming from" in output
    assert "not everything was sent" not in output
    expected = losses(run)
    assert list(expected) == list(range(1, STEPS + 1))

    rows, config, ids = wandb_rows(run.folder / "trackers/wandb")
    assert len(ids) == 1
    assert len(list((run.folder / "trackers/wandb/wandb").glob("offline-run-*"))) == 2
    assert [row["_step"] for row in rows if "loss" in row] == list(expected)
    assert {row["_step"]: row["loss"] for row in rows if "loss" in row} == expected
    # A run that is killed between a step's line and its images sends these after the resume.
    assert [row["_step"] for row in rows if row.get("samples/0._type") == "image-file"] == [1, 4, 8, 12]
    scores = {line["step"]: line["heldout/style/score"] for line in run.metrics() if "heldout/style/score" in line}
    assert list(scores) == [6, 12]
    assert {row["_step"]: row["heldout/style/score"] for row in rows if "heldout/style/score" in row} == scores
    (final,) = [row for row in rows if "final/style/score" in row]
    result = json.loads((run.folder / "result.json").read_text())
    assert (final["_step"], final["final/style/score"]) == (STEPS, result["heldout"]["style"]["score"])
    assert (final["heldout_results.nrows"], final["captions.nrows"]) == (1, 2)
    assert config["run_dir"] == str(run.folder)
    assert config["data.lanes"] == 4
    assert config["report"] == str((run.folder / "report.html").resolve())
    assert len(config["git_commit"]) in (0, 40)

    client = MlflowClient(store)
    (found,) = client.search_runs([client.get_experiment_by_name("mmscale").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_name == run.folder.name
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == list(expected.items())
    assert found.data.params["data.lanes"] == "4"
    assert found.data.tags["report"].endswith("report.html")
    names = [file.path for file in client.list_artifacts(found.info.run_id, "images")]
    counts: dict[str, int] = defaultdict(int)
    for name in names:
        if name.endswith(".png"):
            counts[name.split("+timestamp")[0]] += 1
    assert counts["images/samples~0+step+4"] == 1
    assert counts["images/samples~0+step+12"] == 1
    assert [f.path for f in client.list_artifacts(found.info.run_id, "config")] == [
        "config/start-1.json",
        "config/start-2.json",
    ]
