"""A power cut at any moment of a publication leaves either the old state or the new one on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline.io.atomic import write_whole
from mmscale.checkpoint import list_checkpoints, verify
from tests.checkpoint.hand_made import whole_pieces, write_checkpoint
from tests.checkpoint.power_cut import Disk

pytestmark = pytest.mark.fault

PARAMETERS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}
SHAPES = {name: tuple(values.shape) for name, values in PARAMETERS.items()}


def test_a_published_checkpoint_is_durable_before_an_older_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scratch = tmp_path / "checkpoints", tmp_path / "scratch"
    scratch.mkdir()
    pieces = [whole_pieces(PARAMETERS), []]
    old = write_checkpoint(folder, pieces, SHAPES, step=3)
    found: list[list[str]] = []

    def check(state: Path) -> None:
        paths = list_checkpoints(state)
        assert [verify(path) for path in paths] == [[] for _ in paths], "a folder with a final name is whole"
        found.append([path.name for path in paths])

    disk = Disk(folder, scratch)
    with monkeypatch.context() as patch:
        disk.watch(patch, check)
        new = write_checkpoint(folder, pieces, SHAPES, step=4, stale=[old])
    before, both, after = [old.name], [old.name, new.name], [new.name]
    assert all(state in (before, both, after) for state in found), "one of them is there at every moment"
    assert {before[0], both[-1]} <= {name for state in found for name in state}
    found.clear()
    disk.check_all(check)
    assert [path.name for path in folder.iterdir()] == after
    assert found == [both, after], "the new name is durable; the removal of the old one need not be"


@pytest.mark.parametrize("old", [b"old", None])
def test_a_file_is_replaced_whole_and_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes | None
) -> None:
    folder, scratch = tmp_path / "data", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    path = folder / "index.json"
    if old is not None:
        path.write_bytes(old)
    found: list[bytes | None] = []

    def check(state: Path) -> None:
        copy = state / path.name
        found.append(copy.read_bytes() if copy.exists() else None)

    disk = Disk(folder, scratch)
    with monkeypatch.context() as patch:
        disk.watch(patch, check)
        write_whole(path, b"new")
    assert set(found) == {old, b"new"}
    found.clear()
    disk.check_all(check)
    assert found == [b"new", b"new"]
