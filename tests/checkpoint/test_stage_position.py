"""The stages of a configuration must be consistent with the position of the checkpoint that a run resumes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.checkpoint import TrainState
from mmscale.config import load
from mmscale.errors import ConfigError
from mmscale.run.config import RunConfig
from mmscale.run.folder import check_position
from tests.checkpoint.toy_checkpoint import make_checkpoint
from tests.engine.ranks import ROOT


@pytest.mark.parametrize(
    ("words", "position", "message"),
    [
        (
            ["stages=[{name: read, steps: 6}]"],
            (9, 1, 3),
            r"saved in stage 1 \('all'\), .* has 1 stage: \['read'\]; put",
        ),
        (["stages.0.steps=9"], (9, 1, 3), "stage 1, which began after 6 steps; .* it begins after 9"),
        (["stages.0.steps=4"], (5, 0, 5), "stages.0.steps=4: .* already 5 steps into stage 'read'"),
        (["stages.0.steps=9"], (6, 0, 6), None),
        (["stages.0.steps=4", "max_steps=4"], (5, 0, 5), None),
        (["max_steps=2"], (9, 1, 3), None),
    ],
)
def test_stages_must_match_the_position_of_the_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    position: tuple[int, int, int],
    message: str | None,
) -> None:
    monkeypatch.chdir(ROOT)
    config = load("tests/system/stages.yaml", [f"run_dir={tmp_path}", *words], RunConfig).value
    path = make_checkpoint(tmp_path)
    if message is None:
        check_position(config, TrainState(*position), path)
        return
    with pytest.raises(ConfigError, match=message):
        check_position(config, TrainState(*position), path)
