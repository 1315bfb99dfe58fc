"""Runs on damaged data through the command line: the samples that they skip and list."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.shards.index import extent
from data_pipeline.shards.manifest import Manifest
from tests.system.conftest import REPO, TINY, MakeRun, Run, kill_group

pytestmark = [pytest.mark.fault, pytest.mark.resume]

STEPS = 14
SHARDS = REPO / "examples/emoji/shards"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Return a configuration with a copy of the quickstart's shards in which a byte of every twelfth sample differs."""
    old = Manifest.open(SHARDS / "train-quick.manifest")
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(old.num_shards):
        tar = old.shard_path(number)
        for path in (tar, tar.with_name(tar.name + ".index")):
            shutil.copy2(path, folder / path.relative_to(SHARDS))
    manifest = Manifest.open(shutil.copy2(old.path, folder))
    rng = np.random.default_rng(2)
    for sample in range(0, manifest.num_samples, 12):
        number, row = manifest.locate(sample)
        index = manifest.open_index(number)
        members = index.row(row).members
        first, end = extent(members)
        member = members[0]
        assert first <= member.offset < end
        times = index.tar_path.stat()
        with index.tar_path.open("r+b") as file:
            file.seek(member.offset + int(rng.integers(member.size)))
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 0x40]))
        os.utime(index.tar_path, ns=(times.st_atime_ns, times.st_mtime_ns))
    dataset: dict[str, Any] = {
        "name": "emoji",
        "manifest": str(manifest.path),
        "template": {"kind": "caption", "answers": ["{name}"]},
        "transforms": {"kind": "fixed", "size": 32, "augment": {"shift": 0.1}},
    }
    data = {"datasets": [dataset], "faults": {"on_error": "quarantine"}}
    config = tmp_path / "damaged.yaml"
    config.write_text(json.dumps({"base": str(TINY), "data": data}))
    return config


def listed(run: Run) -> list[dict[str, Any]]:
    """Return the lists of all ranks, by step and lane."""
    lines = [json.loads(line) for path in (run.folder / "faults").iterdir() for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["step"], line["lane"], line["index"]))


def curve(run: Run) -> list[tuple[Any, ...]]:
    return [(line["step"], line["loss"], line["samples"], line.get("faults/checksum")) for line in run.metrics()]


def children(process: int) -> list[int]:
    threads = Path(f"/proc/{process}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


def loader_workers(process: int, command: bytes = b"") -> list[int]:
    """Return the forked descendants of a process: those with the command line of their parent."""
    mine = Path(f"/proc/{process}/cmdline").read_bytes()
    below = [worker for child in children(process) for worker in loader_workers(child, mine)]
    return [process, *below] if mine == command else below


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_over_damaged_data_survives_the_death_of_a_worker_of_a_rank_and_of_everything(
    make_run: MakeRun, fork_run: MakeRun, damaged: Path
) -> None:
    whole = fork_run("whole", 2, f"max_steps={STEPS}", config=damaged)
    whole.finish()
    faults = listed(whole)
    assert {line["kind"] for line in faults} == {"checksum"}
    assert all(line["index"] % 12 == 0 and line["offset"] % 512 == 0 for line in faults)
    assert len(list((whole.folder / "faults").iterdir())) == 2, "each rank has a list"
    by_step = Counter(line["step"] for line in faults)
    assert {step: count for step, _, _, count in curve(whole) if count} == by_step

    killed = make_run("killed", 2, f"max_steps={STEPS}", "data.workers=1", "data.prefetch=1", config=damaged)
    process = killed.start()
    killed.wait_for_step(process, 3)
    os.kill(loader_workers(process.pid)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "loader worker 0 exited without an error message" in output
    assert "Traceback" not in output
    assert killed.metrics()[-1]["step"] < STEPS

    process = killed.start()
    killed.wait_for_step(process, 7)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0, output
    assert killed.metrics()[-1]["step"] < STEPS

    process = killed.start()
    killed.wait_for_step(process, 10)
    kill_group(process)
    killed.finish()
    assert curve(killed) == curve(whole)
    assert listed(killed) == faults
