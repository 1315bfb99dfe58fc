"""``mmscale launch`` rejects wrong requests before it starts or submits anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.cli.main import main

TINY = str(Path(__file__).resolve().parents[1] / "system/tiny.yaml")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["local", TINY, "--ranks", "0"], "Invalid value for '--ranks'"),
        (["local", TINY, "--ranks", "-3"], "Invalid value for '--ranks'"),
        (["local", TINY, "--ranks", "9"], "world size 9 does not fit data.lanes"),
        (["local", TINY, "--ranks", "2", "data.datasets.0.manifest=gone"], "gone: no such file"),
        (["slurm", TINY, "--nodes", "0"], "Invalid value for '--nodes'"),
        (["slurm", TINY, "--nodes", "9"], "world size 9 does not fit data.lanes"),
        (["slurm", TINY, "--time", "3"], "the limit is 180 s, but the ranks save and stop 180 s before"),
        (["slurm", TINY, "--time", "soon"], "expected minutes, minutes:seconds"),
        (["slurm", TINY, "--account", "lab\ntouch trail"], "line break"),
    ],
)
def test_a_wrong_request_is_refused_once_and_leaves_nothing(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(["launch", *words, f"run_dir={folder}"]) == 2
    said = capsys.readouterr().err
    assert said.count(sentence) == 1
    assert not folder.exists()
