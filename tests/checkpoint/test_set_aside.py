"""A damaged checkpoint is renamed, so that its step can be saved again."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from mmscale.checkpoint import choose, find_latest, list_checkpoints, verify
from mmscale.checkpoint.config import CheckpointConfig
from mmscale.checkpoint.manifest import list_set_aside
from mmscale.checkpoint.save import stale_checkpoints
from mmscale.cli.main import main
from mmscale.errors import CheckpointError, DamagedError
from tests.checkpoint.toy_checkpoint import ALONE, flip_byte, make_checkpoint
from tests.engine.ranks import run_ranks

pytestmark = pytest.mark.fault

PREVIOUS = CheckpointConfig(on_damage="previous")


@pytest.mark.dist
def test_a_run_repairs_a_checkpoint_that_was_damaged_without_a_change_of_size(tmp_path: Path) -> None:
    stories = run_ranks("tests.checkpoint.set_aside_programs:run", 1, {"folder": str(tmp_path)})[0]
    expected = {
        "inside": (["step-00000004", "step-00000004.damaged", "step-00000006"], [6, 0, 6]),
        "the end": (["step-00000002", "step-00000004", "step-00000004.damaged"], [4, 0, 4]),
        "boundary": (["step-00000002.damaged", "step-00000003", "step-00000004"], [4, 1, 2]),
        "the only one": (["step-00000002.damaged", "step-00000004"], [4, 0, 4]),
    }
    for name, (names, end) in expected.items():
        story = stories[name]
        assert story["message"] is None, name
        assert story["names"] == names, name
        assert story["end"] == end, name
        assert not any(story["problems"].values()), (name, story["problems"])
    assert "was saved in stage 1 ('two'), but the configuration has 1 stage" in stories["fewer stages"]["message"]


@pytest.mark.dist
def test_the_ranks_use_one_list_and_rename_once(tmp_path: Path) -> None:
    """Rank 1 sees an empty folder. Without a common list it would verify another checkpoint than rank 0 and hang."""
    for step in (2, 4, 6):
        make_checkpoint(tmp_path, step)
    for step in (4, 6):
        flip_byte(tmp_path / f"step-{step:08d}")
    (tmp_path / "step-00000006.damaged").mkdir()
    answers = run_ranks("tests.checkpoint.set_aside_programs:choose_late", 2, {"directory": str(tmp_path)})
    assert [answer["path"] for answer in answers] == ["step-00000002"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000002",
        "step-00000004.damaged",
        "step-00000006.damaged",
        "step-00000006.damaged-2",
    ]
    assert "set aside as step-00000006.damaged-2" in answers[0]["notes"][1]
    assert [len(answer["notes"]) for answer in answers] == [4, 2]


def test_what_was_set_aside_does_not_count_and_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    for step in (4, 8):
        make_checkpoint(folder, step)
    flip_byte(folder / "step-00000008")
    with pytest.raises(DamagedError, match=r"checkpoint\.on_damage=previous"):
        choose(ALONE, folder, CheckpointConfig())
    assert list_set_aside(folder) == []
    notes: list[str] = []
    assert choose(ALONE, folder, PREVIOUS, notes.append) == folder / "step-00000004"
    assert "checksum" in notes[0]
    (aside,) = list_set_aside(folder)
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000004"]
    assert stale_checkpoints(folder / "step-00000012", CheckpointConfig(keep_last=2)) == []
    assert main(["checkpoint", "list", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(row["name"], row["whole"], row.get("set_aside", False)) for row in rows] == [
        ("step-00000004", True, False),
        ("step-00000008.damaged", False, True),
    ]
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    assert f"mmscale checkpoint verify {aside}" in capsys.readouterr().out.replace("\n", "").replace("  ", " ")
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0, "a run that was repaired is good"
    assert main(["checkpoint", "verify", str(aside)]) == 1
    shutil.rmtree(folder / "step-00000004")
    capsys.readouterr()
    assert main(["checkpoint", "list", str(tmp_path)]) == 1
    assert "renamed because damaged: step-00000008.damaged" in " ".join(capsys.readouterr().err.split())


def test_a_checkpoint_that_cannot_be_read_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk error or missing permission may be temporary: nothing is renamed, and the run does not start again."""

    def fail(path: Path) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    make_checkpoint(tmp_path, 4)
    monkeypatch.setattr("mmscale.checkpoint.reshard.crc32_of", fail)
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error") as raised:
        choose(ALONE, tmp_path, PREVIOUS)
    assert not isinstance(raised.value, DamagedError)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_a_copy_under_another_step_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (4, 6):
        make_checkpoint(tmp_path, step)
    copy = shutil.copytree(tmp_path / "step-00000004", tmp_path / "step-00000009")
    assert find_latest(tmp_path) == tmp_path / "step-00000006"
    notes: list[str] = []
    assert choose(ALONE, tmp_path, CheckpointConfig(), notes.append) == tmp_path / "step-00000006"
    assert "step-00000009 holds the checkpoint of step 4" in notes[0]
    assert "remove it, or name it step-00000004" in notes[0]
    assert stale_checkpoints(tmp_path / "step-00000012", CheckpointConfig(keep_last=2)) == [tmp_path / "step-00000004"]
    assert "holds the checkpoint of step 4" in verify(copy)[0]
    assert main(["checkpoint", "list", str(tmp_path), "--json"]) == 0
    *_, last = json.loads(capsys.readouterr().out)["checkpoints"]
    assert (last["name"], last["whole"]) == ("step-00000009", False)
    assert "name it step-00000004" in last["problem"]
    # If the only folder has a wrong name, the run stops with an error instead of starting again.
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"step-{step:08d}")
    with pytest.raises(CheckpointError, match="name it step-00000004"):
        choose(ALONE, tmp_path, PREVIOUS)
    assert copy.is_dir()
    assert verify(copy.rename(tmp_path / "kept")) == [], "a folder without a step in its name may hold any step"


def test_a_folder_with_another_name_format_is_no_checkpoint(tmp_path: Path) -> None:
    shutil.move(make_checkpoint(tmp_path, 4), tmp_path / "step-000000004")
    assert list_checkpoints(tmp_path) == []


def test_a_damaged_checkpoint_that_cannot_be_renamed_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 4):
        make_checkpoint(tmp_path, step)
    damaged = tmp_path / "step-00000004"
    flip_byte(damaged)

    def refuse(path: Path, suffix: str) -> Path:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"{path}{suffix}")

    monkeypatch.setattr("mmscale.checkpoint.load.set_aside", refuse)
    with pytest.raises(CheckpointError, match=f"^{damaged} is damaged and cannot be renamed: Permission denied$"):
        choose(ALONE, tmp_path, PREVIOUS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


def test_a_run_that_has_no_whole_checkpoint_says_that_it_starts_again(tmp_path: Path) -> None:
    notes: list[str] = []
    assert choose(ALONE, tmp_path, PREVIOUS, notes.append) is None
    assert notes == []
    make_checkpoint(tmp_path, 2)
    flip_byte(tmp_path / "step-00000002")
    assert choose(ALONE, tmp_path, PREVIOUS, notes.append) is None
    assert notes[1:] == [
        f"{tmp_path / 'step-00000002'} is set aside as step-00000002.damaged; remove it when you no longer need it",
        f"no usable checkpoint is left in {tmp_path}: the run starts again at its first step",
    ]
