"""After a killed writer or a full disk, the newest checkpoint is complete."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmscale.checkpoint import find_latest, list_checkpoints
from mmscale.checkpoint.config import CheckpointConfig
from mmscale.checkpoint.manifest import FileEntry, Manifest, SavedState, rank_files, seal
from mmscale.checkpoint.save import stale_checkpoints
from mmscale.run.train import due as is_due
from tests.engine.ranks import run_ranks

pytestmark = pytest.mark.fault


@pytest.mark.dist
def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    answer = run_ranks("tests.checkpoint.programs:killed_at_every_event", 1, {"directory": str(tmp_path)})[0]
    names = [name for name, _ in answer["found"]]
    assert len(names) >= 12, "the writer makes at least this many file operations"
    # Before the rename the old checkpoint is found, afterwards the new one.
    switch = names.index("step-00000004")
    assert switch >= 10
    assert set(names[:switch]) == {"step-00000003"}
    assert set(names[switch:]) == {"step-00000004"}
    assert all(problems == [] for _, problems in answer["found"])
    assert answer["names"] == ["step-00000003", "step-00000004", "step-00000005"], "partial folders are removed"


@pytest.mark.dist
@pytest.mark.parametrize("background", [False, True])
def test_one_rank_that_cannot_write_stops_all_with_its_reason(tmp_path: Path, background: bool) -> None:
    arguments = {"directory": str(tmp_path), "limit_bytes": 4096, "limited_rank": 1, "background": background}
    ranks = run_ranks("tests.checkpoint.programs:disk_full", 2, arguments)
    for rank in ranks:
        assert rank["messages"][0].startswith("rank 1: cannot write step-00000004")
        assert "File too large" in rank["messages"][0]
        assert (rank["problems"], rank["same"]) == ([], True)
    assert ranks[0]["names"] == ["step-00000003"]


@pytest.mark.dist
def test_a_background_writer_killed_at_any_moment_leaves_a_whole_checkpoint_and_reported(tmp_path: Path) -> None:
    answer = run_ranks("tests.checkpoint.programs:writers_killed_at_every_event", 1, {"directory": str(tmp_path)})[0]
    names = [name for name, _, _ in answer["found"]]
    switch = names.index("step-00000004")
    assert switch >= 8, "the writer makes at least this many file operations"
    assert set(names[:switch]) == {"step-00000003"}
    assert set(names[switch:]) == {"step-00000004"}
    assert all(problems == [] for _, problems, _ in answer["found"])
    *deaths, alive = [message for _, _, message in answer["found"]]
    assert alive is None
    assert all("the writer process ended unexpectedly (exit code -9)" in message for message in deaths), deaths
    assert answer["names"] == ["step-00000003", "step-00000004"], "partial folders are removed"


@pytest.mark.dist
@pytest.mark.parametrize("when_busy", ["wait", "skip"])
def test_a_save_while_another_is_written(tmp_path: Path, when_busy: str) -> None:
    arguments = {"directory": str(tmp_path), "when_busy": when_busy}
    for answer in run_ranks("tests.checkpoint.programs:busy", 2, arguments):
        assert answer["before"] == ["step-00000002"]
        assert answer["same"], "the checkpoint holds the state at the beginning of the save"
        assert answer["gone"]
        if when_busy == "wait":
            assert answer["names"] == ["step-00000002", "step-00000003", "step-00000004"]
            assert answer["notes"] == []
        else:
            assert answer["names"] == ["step-00000002", "step-00000003"]
            assert answer["notes"] == ["step 4 is not saved: step-00000003 is still being written"]


@pytest.mark.dist
def test_five_hundred_ways_to_damage_a_checkpoint_are_noticed_before_anything_changes(tmp_path: Path) -> None:
    answer = run_ranks("tests.checkpoint.programs:fuzz", 1, {"directory": str(tmp_path), "count": 500})[0]
    assert answer["missed"] == []
    assert answer["good"]
    assert len(answer["complaints"]) > 5, "each kind of damage has its own message"


@pytest.mark.dist
def test_an_older_checkpoint_is_used_only_if_configured(tmp_path: Path) -> None:
    for on_damage in ("stop", "previous"):
        arguments = {"directory": str(tmp_path / on_damage), "on_damage": on_damage}
        for outcome, notes in run_ranks("tests.checkpoint.programs:chosen", 2, arguments):
            if on_damage == "stop":
                assert "step-00000004 is damaged: rank-00001.safetensors" in outcome
                assert "checkpoint.on_damage=previous" in outcome
            else:
                assert outcome == "step-00000003"
                assert "rank-00001.safetensors" in notes[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system with space for one toy checkpoint but not for two. Needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}; another test uses a file size limit instead")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.dist
def test_a_full_disk_leaves_the_previous_checkpoint(small_disk: Path) -> None:
    directory = small_disk / "checkpoints"
    arguments = {"directory": str(directory), "limit_bytes": None, "limited_rank": 0}
    answer = run_ranks("tests.checkpoint.programs:disk_full", 1, arguments)[0]
    assert "No space left on device" in answer["messages"][0]
    assert (answer["names"], answer["problems"], answer["same"]) == (["step-00000003"], [], True)


def whole(folder: Path, step: int) -> Path:
    """Write a checkpoint with a valid manifest and files of the right sizes, but with meaningless content."""
    path = folder / f"step-{step:08d}"
    path.mkdir()
    files = {}
    for name in rank_files(0):
        (path / name).write_bytes(b"x" * step)
        files[name] = FileEntry(bytes=step, crc32=0)
    state = SavedState(step=step, stage_index=0, stage_step=step, tokens=0, samples=0, extra={})
    manifest = Manifest(
        format=2,
        state=state,
        stage="all",
        world_size=1,
        zero_stage=3,
        precision="fp32",
        optimizer_steps=step,
        parameters={},
        buffers={},
        tied={},
        model_config_values=None,
        files=files,
        versions={},
    )
    (path / "manifest.json").write_text(seal(manifest))
    return path


def steps_removed(folder: Path, newest: int, **keep: int | None) -> list[int]:
    stale = stale_checkpoints(folder / f"step-{newest:08d}", CheckpointConfig.model_validate(keep))
    return [int(path.name[5:]) for path in stale]


def test_retention_keeps_the_newest_and_the_round_ones(tmp_path: Path) -> None:
    for step in (100, 150, 200, 250):
        whole(tmp_path, step)
    (tmp_path / "notes").mkdir()
    assert steps_removed(tmp_path, 300, keep_last=2, keep_every=100) == [150]
    assert steps_removed(tmp_path, 300, keep_last=1) == [100, 150, 200, 250]
    assert steps_removed(tmp_path, 300, keep_last=3) == [100, 150]
    assert steps_removed(tmp_path, 300, keep_last=9) == []


def test_a_damaged_checkpoint_never_pushes_out_a_good_one(tmp_path: Path) -> None:
    for step in (100, 150, 200, 250):
        whole(tmp_path, step)
    for step in (200, 250):
        (tmp_path / f"step-{step:08d}" / "rank-00000.json").write_text("cut")
    assert steps_removed(tmp_path, 300, keep_last=2) == [100]
    (tmp_path / "step-00000150" / "manifest.json").unlink()
    assert steps_removed(tmp_path, 300, keep_last=2) == []
    assert steps_removed(tmp_path, 300, keep_last=1) == [100, 150, 200, 250]


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "none") is None
    (tmp_path / "step-00000007").mkdir()
    (tmp_path / "step-00000008.partial").mkdir()
    assert find_latest(tmp_path) is None
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000007"]


@pytest.mark.parametrize(("every", "due"), [(None, []), (3, [3, 6, 9]), (10, [10])])
def test_when_to_save(every: int | None, due: list[int]) -> None:
    config = CheckpointConfig(every_steps=every)
    assert [step for step in range(1, 11) if is_due(config.every_steps, step)] == due
