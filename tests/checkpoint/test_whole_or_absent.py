"""Writers that die and disks that are full: what is found afterwards is whole."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmscale.checkpoint import find_latest, list_checkpoints, prune
from mmscale.checkpoint.config import CheckpointConfig
from tests.engine.ranks import run_ranks

pytestmark = pytest.mark.fault


@pytest.mark.dist
def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    answer = run_ranks("tests.checkpoint.programs:killed_at_every_event", 1, {"directory": str(tmp_path)})[0]
    names = [name for name, _ in answer["found"]]
    assert len(names) >= 12, "the writer touches the disk more often than that"
    # Up to the rename the old one is found, from then on the new one.
    switch = names.index("step-00000004")
    assert switch >= 10
    assert set(names[:switch]) == {"step-00000003"}
    assert set(names[switch:]) == {"step-00000004"}
    assert all(problems == [] for _, problems in answer["found"])
    assert answer["names"] == ["step-00000003", "step-00000004", "step-00000005"], "leftovers are swept away"


@pytest.mark.dist
def test_one_rank_that_cannot_write_stops_all_with_its_reason(tmp_path: Path) -> None:
    arguments = {"directory": str(tmp_path), "limit_bytes": 4096, "limited_rank": 1}
    ranks = run_ranks("tests.checkpoint.programs:disk_full", 2, arguments)
    for rank in ranks:
        assert rank["said"][0].startswith("rank 1: cannot write step-00000004")
        assert "File too large" in rank["said"][0]
        assert (rank["problems"], rank["same"]) == ([], True)
    assert ranks[0]["names"] == ["step-00000003"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds one toy checkpoint but not two. Mounting needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}; the file size limit above is tested instead")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.dist
def test_a_full_disk_leaves_the_previous_checkpoint(small_disk: Path) -> None:
    directory = small_disk / "checkpoints"
    arguments = {"directory": str(directory), "limit_bytes": None, "limited_rank": 0}
    answer = run_ranks("tests.checkpoint.programs:disk_full", 1, arguments)[0]
    assert "No space left on device" in answer["said"][0]
    assert (answer["names"], answer["problems"], answer["same"]) == (["step-00000003"], [], True)


def test_retention_keeps_the_newest_and_the_round_ones(tmp_path: Path) -> None:
    for step in (100, 150, 200, 250, 300):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / "notes").mkdir()
    prune(tmp_path, CheckpointConfig(keep_last=2, keep_every=100))
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{step:08d}" for step in (100, 200, 250, 300)]
    prune(tmp_path, CheckpointConfig(keep_last=1))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000300"]
    assert (tmp_path / "notes").is_dir()


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "none") is None
    (tmp_path / "step-00000007").mkdir()
    (tmp_path / "step-00000008.partial").mkdir()
    assert find_latest(tmp_path) is None
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000007"]


@pytest.mark.parametrize(("every", "due"), [(None, []), (3, [3, 6, 9]), (10, [10])])
def test_when_to_save(every: int | None, due: list[int]) -> None:
    config = CheckpointConfig(every_steps=every)
    assert [step for step in range(1, 11) if config.due(step)] == due
